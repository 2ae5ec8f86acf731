"""Which examples make a step, in which order."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from collm.data.collate import IGNORED, Row


class EpochSampler(Sampler[int]):
    """All examples in an order that depends on (seed, epoch) alone; `grouped`: those of like length in one step.

    The Trainer's own sampler draws from the global random state, so that a resumed run, or one on more processes,
    would see other batches.

    Args:
        switches: `rope_switches`; no step has examples from both sides of one, if there are whole steps on each side
            (`evened`).
    """

    def __init__(
        self, lengths: Sequence[int], step_size: int, seed: int, grouped: bool = True, switches: Sequence[int] = ()
    ) -> None:
        self.lengths, self.step_size, self.seed, self.grouped, self.epoch = list(lengths), step_size, seed, grouped, 0
        self.sides = _sides(self.lengths, switches)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if not self.grouped and len(self.sides) == 1:
            yield from torch.randperm(len(self.lengths), generator=generator).tolist()
            return
        steps: list[list[int]] = []
        for side in self.sides:
            if self.grouped:
                lengths = [self.lengths[i] for i in side]
                order = get_length_grouped_indices(lengths, self.step_size, generator=generator)
            else:
                order = torch.randperm(len(side), generator=generator).tolist()
            steps += [[side[i] for i in order[k : k + self.step_size]] for k in range(0, len(order), self.step_size)]
        # They come sorted from long (hard) to short (easy) examples. A short last step stays last.
        whole = sum(len(step) == self.step_size for step in steps)
        shuffled = torch.randperm(whole, generator=generator).tolist()
        for i in [*shuffled, *range(whole, len(steps))]:
            yield from steps[i]


def evened(rows: Sequence[Row], unit: int, switches: Sequence[int], *, always: bool = False) -> list[Row]:
    """Rows on one side of the `switches` after those on another, each side filled up to whole units by rows that have
    no labelled token and so count nothing.

    Args:
        unit: rows that are cut into batches together.
        always: also where all rows are on one side.
    """
    sides = _sides([len(row["input_ids"]) for row in rows], switches)
    if len(sides) == 1 and not always:
        return list(rows)
    found: list[Row] = []
    for side in sides:
        first = rows[side[0]]
        filler: Row = {**first, "labels": np.full_like(first["labels"], IGNORED)}
        found += [*(rows[i] for i in side), *[filler] * (-len(side) % unit)]
    return found


def _sides(lengths: Sequence[int], switches: Sequence[int]) -> list[list[int]]:
    """Indices by side, in order; at least one side."""
    sides: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        sides.setdefault(bisect_left(switches, length), []).append(i)
    return [sides[key] for key in sorted(sides)] or [[]]


def evaluation_steps(num_rows: int, step_size: int, epochs: float, evaluations: int) -> int:
    """Steps between evaluations, at least 1, so that `evaluations` of them fit and the last falls on the last step."""
    total = max(1, math.ceil(math.ceil(num_rows / step_size) * epochs))
    return max(1, math.ceil(total / evaluations))
