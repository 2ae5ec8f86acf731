"""The fastest a pair could write, given what its forward passes cost and how often its models agree.

Pure functions of measured numbers, which share no code with the engine they judge. Deferrals and agreements are taken
to be independent from token to token, every text that waits for a pass is taken to share one with all the others, and
nothing but forward passes takes time.

Symbols: r = share of deferred tokens (`rate`), g = 1/r tokens from one deferral to the next, a = P(the assistant writes
what the base would have written | deferred), b = P(the next token is deferred, too | deferred), c_B(n) and c_A(n) =
seconds of a pass over n tokens of each row. All results are seconds in which every row of the batch writes one token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MAX_DRAFT = 32
"""Pending deferrals, or drafted tokens of a run, up to which the best length is sought."""


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a forward pass by (rows, tokens of each row), as measured; linear in between and beyond."""

    seconds: Mapping[tuple[int, int], float]

    def __call__(self, width: float, rows: float = 1) -> float:
        by_rows = {
            measured: _line(width, {w: s for (r, w), s in self.seconds.items() if r == measured})
            for measured in {r for r, _ in self.seconds}
        }
        return max(0.0, _line(rows, by_rows))


def _line(at: float, values: Mapping[int, float]) -> float:
    """Linear interpolation; beyond the ends, the nearest two points go on (one point alone is a constant)."""
    known = sorted(values)
    if len(known) == 1:
        return values[known[0]]
    upper = min(max(int(np.searchsorted(known, at)), 1), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    return values[low] + (at - low) * (values[high] - values[low]) / (high - low)


@dataclass(frozen=True)
class Ceilings:
    """Seconds per token of each row; see the functions of these names."""

    plain: float
    speculative: float
    oracle: float

    @classmethod
    def of(
        cls, base: PassCosts, assistant: PassCosts, rate: float, agreement: float, again: float, rows: int = 1
    ) -> Ceilings:
        plain_seconds = plain(base, assistant, rate, rows)
        drafts = [drafting(base, assistant, rate, agreement, d, rows) for d in range(1, MAX_DRAFT + 1)]
        runs = [running(base, assistant, rate, again, n, rows) for n in range(MAX_DRAFT + 1)]
        return cls(plain_seconds, min(plain_seconds, *drafts, *runs), oracle(base, assistant, rate, agreement, rows))


def plain(base: PassCosts, assistant: PassCosts, rate: float, rows: int = 1) -> float:
    """Every row asks the base at every token; those that defer share one pass of the assistant before the next.

    The assistant reads the g tokens since it was last asked. Of `rows` rows a binomial number defers at once.
    """
    if rate == 0:
        return base(1, rows)
    asked = [math.comb(rows, k) * rate**k * (1 - rate) ** (rows - k) for k in range(rows + 1)]
    return base(1, rows) + sum(share * assistant(1 / rate, k) for k, share in enumerate(asked) if k)


def drafting(
    base: PassCosts, assistant: PassCosts, rate: float, agreement: float, num_deferrals: int, rows: int = 1
) -> float:
    """The base drafts until `num_deferrals` = D are pending, the assistant judges them in one pass.

    A cycle costs `D g c_B(1) + c_A(D g)` and settles `1 + a + ... + a^(D-1)` deferrals of g tokens each.
    """
    if rate == 0:
        return base(1, rows)
    drafted = num_deferrals / rate
    return (drafted * base(1, rows) + assistant(drafted, rows)) * rate / _geometric(agreement, num_deferrals)


def running(base: PassCosts, assistant: PassCosts, rate: float, again: float, num_drafted: int, rows: int = 1) -> float:
    """The assistant drafts n = `num_drafted` tokens beyond each of its own, the base checks their gates in one pass.

    `(n + 1) c_A(1) + c_B(n + 1)` for `1 + b + ... + b^n` deferred tokens; the others cost a base step each, and at the
    start of each run the assistant first reads what the base wrote since the last one.
    """
    if rate == 0:
        return base(1, rows)
    cycle = (num_drafted + 1) * assistant(1, rows) + base(num_drafted + 1, rows)
    runs = rate * (1 - again)
    catching_up = assistant((1 - rate) / runs + 1, rows) - assistant(1, rows) if runs else 0.0
    return (1 - rate) * base(1, rows) + rate * cycle / _geometric(again, num_drafted + 1) + runs * catching_up


def oracle(base: PassCosts, assistant: PassCosts, rate: float, agreement: float, rows: int = 1) -> float:
    """Base steps, and one pass of the assistant only where it really writes another token; nothing is thrown away."""
    differing = rate * (1 - agreement)
    return base(1, rows) + (differing * assistant(1 / differing, rows) if differing else 0.0)


def _geometric(ratio: float, terms: int) -> float:
    """1 + ratio + ... + ratio^(terms - 1)."""
    return float(sum(ratio**i for i in range(terms)))
