"""What looking ahead costs, and what it saves, by the costs of passes.

Two ways to look ahead, with `c_B(n)`, `c_A(n)` the seconds of a pass over `n` tokens of base and assistant:

- The base drafts through its deferrals until D of them are pending, then the assistant judges all of them in one pass.
  With the agreement a = P(the assistant writes what the base drafted | deferred) and the gap g = tokens per deferral,
  a cycle costs `D g c_B(1) + c_A(D g)` and settles `1 + a + ... + a^(D-1)` deferrals (Leviathan et al. 2023, eq. 1).
- The assistant drafts n tokens beyond one of its own, then the base checks all their gates in one pass: with
  b = P(the next token is deferred to it, too), `c_A(g) + n c_A(1) + c_B(n+1)` for `1 + b + ... + b^n` tokens.

D = 1 and n = 0 are plain decoding: `c_B(1) + c_A(g)` per deferred token, for the assistant reads what it has missed.
"""

from __future__ import annotations

import math
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

MAX_DEFERRALS = 16
MAX_RUN = 16
MAX_STRIDE = 64
MIN_GAIN = 0.03
"""Share of a cost that drafting, or drafting further, must promise to save; below it the estimates decide nothing."""


Numbers = TypeVar("Numbers", float, NDArray[np.float64])
"""A number, or an array of them: plans are compared all at once."""


class BlockCost(Protocol):
    """Seconds by tokens, number by number."""

    def __call__(self, tokens: Numbers, /) -> Numbers: ...


def plain_cost(gap: float, base: BlockCost, assistant: BlockCost) -> float:
    """Seconds per deferred token of plain decoding."""
    return base(1.0) + assistant(gap)


def draft_cost(num_deferrals: Numbers, gap: float, agreement: float, base: BlockCost, assistant: BlockCost) -> Numbers:
    """Expected seconds per deferred token if the base drafts until `num_deferrals` are pending.

    The base steps between two deferrals, which plain decoding takes as well, are not counted.
    """
    cycle = num_deferrals * gap * base(1.0) + assistant(num_deferrals * gap)
    return cycle / _geometric(agreement, num_deferrals) - (gap - 1) * base(1.0)


def run_cost(num_run: Numbers, gap: float, continuation: float, base: BlockCost, assistant: BlockCost) -> Numbers:
    """Expected seconds per deferred token if the assistant drafts `num_run` tokens beyond each of its own."""
    cycle = assistant(gap) + num_run * assistant(1.0) + base(num_run + 1)
    return cycle / _geometric(continuation, num_run + 1)


def best_draft(
    gap: float, agreement: float, continuation: float, base: BlockCost, assistant: BlockCost
) -> tuple[int, int]:
    """The number of pending deferrals and the length of a run that are expected to cost least; at most one drafts.

    With a `continuation` of 0 no run can pay.
    """
    plain = plain_cost(gap, base, assistant)
    by_base = draft_cost(np.arange(2.0, MAX_DEFERRALS + 1), gap, agreement, base, assistant)
    least, least_run = by_base.min(), math.inf
    if continuation:
        by_assistant = run_cost(np.arange(1.0, MAX_RUN + 1), gap, continuation, base, assistant)
        least_run = by_assistant.min()
    if min(least, least_run) > (1 - MIN_GAIN) * plain:
        return 1, 0
    return (2 + int(by_base.argmin()), 0) if least <= least_run else (1, 1 + int(by_assistant.argmin()))


def best_stride(gap: float, agreement: float, base: BlockCost, assistant: BlockCost) -> int:
    """How many tokens all texts draft in step until the assistant judges them, so that one that is settled costs least.

    Each stands with probability q = 1 - (1 - a) / g, so that of n tokens `1 + q + ... + q^(n-1)` are settled. Those
    behind the last deferral, g - 1, are not judged; if all before them stand, they are read the next time instead. Of
    strides that cost nearly the same it is the shortest: less is lost where a text ends, or where an estimate errs.
    """
    stands, drafted = 1 - (1 - agreement) / gap, np.arange(1.0, MAX_STRIDE + 1)
    read = drafted - (gap - 1) * (1 - stands**drafted)
    costs = (drafted * base(1.0) + assistant(np.maximum(1.0, read))) / _geometric(stands, drafted)
    return 1 + int(np.argmax(costs <= (1 + MIN_GAIN) * costs.min()))


def _geometric(ratio: float, terms: Numbers) -> Numbers:
    """1 + ratio + ... + ratio^(terms - 1)."""
    return terms if math.isclose(ratio, 1) else (1 - ratio**terms) / (1 - ratio)
