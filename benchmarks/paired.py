"""Interleaved paired runs: on a noisy machine only the ratio of neighbours in time says something."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with a 95 % bootstrap interval (2.5 % and 97.5 % quantiles of resampled medians)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: list[float], seed: int = 0) -> Ratio:
        values = np.array(ratios)
        draws = np.random.default_rng(seed).integers(len(values), size=(10_000, len(values)))
        low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
        return cls(float(np.median(values)), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interleave(runs: dict[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run in each round, after one round of warming up; the order turns from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds + 1):
        for name in names:
            start = time.perf_counter()
            runs[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
        names.append(names.pop(0))
    return seconds


def report(result: dict[str, object], ratios: dict[str, Ratio], out: Path) -> None:
    """Print what was measured, where, and write it as JSON."""
    result = {
        **result,
        "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, out)
