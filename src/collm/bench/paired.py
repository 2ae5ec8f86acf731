"""Interleaved paired runs: on a noisy machine only the ratio of neighbours in time says something."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios with a 95 % bootstrap interval (2.5 % and 97.5 % quantiles of resampled medians)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float], seed: int = 0) -> Ratio:
        values = np.array(ratios)
        draws = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
        low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def in_turn(runs: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """What each run gives in each round, after one round of warming up; the order turns from round to round.

    A run is called with the number of its round, 0 being the one that is thrown away.
    """
    results: dict[str, list[T]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names:
            result = runs[name](number)
            if number:
                results[name].append(result)
        names.append(names.pop(0))
    return results


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run in each round; see `in_turn`."""

    def timed(run: Callable[[], object]) -> Callable[[int], float]:
        def call(_: int) -> float:
            start = time.perf_counter()
            run()
            synchronise(device)
            return time.perf_counter() - start

        return call

    return in_turn({name: timed(run) for name, run in runs.items()}, rounds)


def synchronise(device: str | torch.device) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
