"""Intervals and paired tests over per-example scores; numpy only.

Where examples come in groups of near-duplicates, their scores are not independent: whole groups are resampled then
(cluster bootstrap; Davison and Hinkley 1997, section 3.8), which gives the wider intervals that such data deserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_BLOCK = 4_000_000  # resampled values held at once: 32 MB


def _clusters(
    values: NDArray[np.float64], groups: Sequence[str] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum of the values and number of examples of each group, `[G]` each, in the order in which groups appear.

    Without groups, every example is one.
    """
    if groups is None:
        return values, np.ones(len(values))
    if len(groups) != len(values):
        raise ValueError(f"there are {len(values)} scores, but groups of {len(groups)} examples")
    number: dict[str, int] = {}
    indices = [number.setdefault(group, len(number)) for group in groups]
    return np.bincount(indices, weights=values).astype(np.float64), np.bincount(indices).astype(np.float64)


def _resampled_means(
    values: NDArray[np.float64], groups: Sequence[str] | None, resamples: int, seed: int
) -> NDArray[np.float64]:
    sums, sizes = _clusters(values, groups)
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(sums))
    blocks = []
    for start in range(0, resamples, rows):
        indices = rng.integers(0, len(sums), size=(min(rows, resamples - start), len(sums)))
        blocks.append(sums[indices].sum(axis=1) / sizes[indices].sum(axis=1))
    return np.concatenate(blocks)


def _one_value(scores: Sequence[float], sums: NDArray[np.float64], sizes: NDArray[np.float64]) -> float | None:
    """The mean that all groups have, where they have one and the same: resampling shows no spread then. None for scores
    on a scale of their own, of which no bound is known."""
    value = float(sums[0] / sizes[0])
    bounded = min(scores) >= 0 and max(scores) <= 1
    return value if bounded and np.allclose(sums, value * sizes, rtol=0, atol=1e-9) else None


def _others(groups: int, tail: float) -> float:
    """The largest share of other values that so many draws of one and the same leave open, at a chance of `tail`
    (Clopper and Pearson 1934)."""
    return 1 - float(tail ** (1 / groups))


def bootstrap_ci(
    scores: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Where all examples (or groups) have one value, as a single one has, resampling shows no spread although the truth
    may well differ: as many others as an exact (Clopper-Pearson) bound leaves room for may all be 0, or all be 1, each
    group counted as one trial. Where every score is 0, or every one is 1, that is the bound of a binomial share.

    Args:
        groups: the group of each example, if whole groups shall be resampled.

    Raises:
        ValueError: without scores, or with groups of another number of examples.
    """
    if not scores:
        raise ValueError("no scores to take an interval of")
    values = np.asarray(scores, dtype=np.float64)
    tail = (1 - level) / 2
    sums, sizes = _clusters(values, groups)
    value = _one_value(scores, sums, sizes)
    if value is not None:
        others = _others(len(sums), tail)
        return value * (1 - others), value * (1 - others) + others
    low, high = np.quantile(_resampled_means(values, groups, resamples, seed), [tail, 1 - tail])
    return float(low), float(high)


def sign_flip_test(differences: Sequence[float] | NDArray[np.float64], *, seed: int = 0) -> float:
    """Two-sided p-value of paired differences, one for each example or the sum of each group of near-duplicates, `[G]`.

    If two systems do not differ, each difference might as well have the other sign: the share of all 2^G choices of
    signs whose sum lies as far from 0 as the one seen (Fisher 1935, section 21). Exact where the differences are whole
    numbers, as sums of right and wrong answers are; over examples that is McNemar's exact test (McNemar 1947). Else,
    and where tens of thousands differ, of `RESAMPLES` random choices, and then never below 1 / (RESAMPLES + 1).
    """
    found = np.abs(np.asarray(differences, dtype=np.float64))
    seen = abs(float(np.asarray(differences, dtype=np.float64).sum()))
    sizes = found[found > 0]
    middle = int(sizes.sum())
    if (sizes == np.round(sizes)).all() and middle * len(sizes) < 10**9:
        chances = np.zeros(2 * middle + 1)  # of each sum, from -middle to middle
        chances[middle] = 1
        for size in sizes.astype(int):
            moved = np.zeros_like(chances)
            moved[size:] += chances[:-size] / 2
            moved[:-size] += chances[size:] / 2
            chances = moved
        far = np.abs(np.arange(-middle, middle + 1)) >= round(seen)
        return min(1.0, float(chances[far].sum()))
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(sizes))
    as_far = 0
    for start in range(0, RESAMPLES, rows):
        signs = rng.integers(0, 2, size=(min(rows, RESAMPLES - start), len(sizes))) * 2 - 1
        as_far += int((np.abs(signs @ sizes) >= seen - 1e-9 * sizes.sum()).sum())
    return (as_far + 1) / (RESAMPLES + 1)


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Mean of `second - first` with its bootstrap interval and the p-value of `sign_flip_test`."""

    difference: float
    ci95: tuple[float, float]
    p_value: float


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    groups: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Two systems on the same examples: the interval resamples, and the test turns around, examples or whole groups.

    (A bootstrap's own p-value rejects too often where the two differ on few examples: with eight of them, in 8 % of
    trials instead of 5.) Where all differences are one and the same, as where there is none, the interval has room for
    others as in `bootstrap_ci`, of -1 or 1 here.

    Raises:
        ValueError: for lists of different lengths, or empty ones.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired scores must be of the same examples, not {len(first)} and {len(second)} scores")
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    sums, sizes = _clusters(difference, groups)
    value, tail = _one_value([*first, *second], sums, sizes), 0.025
    if value is not None:
        others = _others(len(sums), tail)
        low, high = value * (1 - others) - others, value * (1 - others) + others
    else:
        low, high = np.quantile(_resampled_means(difference, groups, resamples, seed), [tail, 1 - tail])
    p_value = sign_flip_test(sums, seed=seed)
    return PairedDifference(float(difference.mean()), (float(low), float(high)), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for being one of several tests (Holm 1979), in the order given.

    The share of families of tests in which a true null hypothesis is rejected at `p < alpha` stays below alpha,
    whatever the tests have to do with one another.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
