"""When to draft and how far: what one model's look-ahead costs, and what it saves.

Speculation never changes a text, so everything here may be an estimate, wall-clock times included.

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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from collm.types import BASE

MAX_DEFERRALS = 16
MAX_RUN = 16
SHORTEST_PIECE, FIRST_PIECE, LONGEST_PIECE = 32, 256, 1024
"""Tokens of a long prompt read in one pass beside texts that decode: at least, while costs are unknown, at most."""
MIN_GAIN = 0.03
"""Share of a deferral's cost that drafting must promise to save; below it the estimates decide nothing."""


class Pace(Protocol):
    """How far one text's drafts may go."""

    def deferrals(self, assistant: int) -> int:
        """Deferrals to this assistant, the present one counted, that may be pending before it is asked; 1 = plain."""
        ...

    def run(self, assistant: int) -> int:
        """Tokens it may draft beyond its last one before the base checks the gates; 0 = plain."""
        ...

    def observe(self, author: int, agreed: bool) -> None:
        """A token was written; `agreed`: the base would have written the same."""
        ...


@dataclass(frozen=True, slots=True)
class FixedPace:
    """The same distance always: for tests and measurements."""

    num_deferrals: int = 1
    num_run: int = 0

    def deferrals(self, assistant: int) -> int:
        return self.num_deferrals

    def run(self, assistant: int) -> int:
        return self.num_run

    def observe(self, author: int, agreed: bool) -> None:
        pass


@dataclass(slots=True)
class PassCosts:
    """Seconds of a model's passes as a line over their tokens, fitted as they come; old ones are forgotten slowly.

    Until passes of several widths have been seen, a token more is taken to cost `PRIOR_SLOPE` of a pass.

    Where passes were measured beforehand (`LanguageModel.pass_curve`: on a GPU a hundred tokens may cost as much as
    one, and then suddenly twice as much), it is that curve, by a factor that is fitted.
    """

    PRIOR_SLOPE = 0.04
    FORGETTING = 0.97
    seen: int = 0
    rows: float = 1.0
    curve: tuple[tuple[int, float], ...] = ()
    _factor: float = 1.0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _variance: float = 0.0
    _covariance: float = 0.0

    def observe(self, rows: int, tokens: int, seconds: float) -> None:
        if self.seen >= 5:
            seconds = min(seconds, 3 * self.pass_seconds(tokens))  # a hiccup of the machine, not a cost
        self.seen += 1
        self._weight = 1 + self.FORGETTING * self._weight
        share = 1 / self._weight
        self.rows += share * (rows - self.rows)
        off_tokens, off_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * off_tokens
        self._seconds += share * off_seconds
        if self.curve:
            self._factor += share * (seconds / _on_curve(self.curve, tokens) - self._factor)
            return
        self._variance += share * (off_tokens * (tokens - self._tokens) - self._variance)
        self._covariance += share * (off_tokens * (seconds - self._seconds) - self._covariance)

    @property
    def slope(self) -> float:
        return max(0.0, (self._covariance + self.PRIOR_SLOPE * self._seconds) / (self._variance + 1))

    def pass_seconds(self, tokens: float) -> float:
        """Of a pass over so many tokens, of all its rows together."""
        if self.curve:
            return self._factor * _on_curve(self.curve, tokens)
        return max(self._seconds + self.slope * (tokens - self._tokens), 0.1 * self._seconds)

    def usual(self, tokens: float) -> float:
        """Of a pass as they have been lately, or over so many tokens if that is more."""
        return max(self._seconds, self.pass_seconds(tokens))

    def block(self, tokens: float) -> float:
        """One row's share of a pass in which every row brings so many tokens."""
        return self.blocks()(tokens)

    def blocks(self) -> BlockCost:
        """`block` as it stands now, for many numbers of tokens at once."""
        if self.curve:
            return lambda tokens: self.pass_seconds(tokens * self.rows) / self.rows
        rows, slope, least = self.rows, self.slope, 0.1 * self._seconds
        fixed = self._seconds - slope * self._tokens
        return lambda tokens: max(fixed + slope * rows * tokens, least) / rows


def _on_curve(curve: Sequence[tuple[int, float]], tokens: float) -> float:
    """Linear between the points; beyond the last one, as between the last two."""
    last = next((n for n, (at, _) in enumerate(curve) if tokens <= at), len(curve) - 1)
    (low, below), (high, above) = curve[max(0, last - 1)], curve[max(1, last)]
    return max(below, below + (tokens - low) * (above - below) / (high - low))


@dataclass(slots=True)
class Tally:
    """What happened at deferrals to one assistant."""

    deferred: float = 0.0
    agreed: float = 0.0
    continued: float = 0.0


@dataclass(slots=True)
class Experience:
    """What all texts of an engine have shown so far: pass costs, and the prior of a new text's tallies."""

    costs: dict[int, PassCosts] = field(default_factory=dict)
    reading: dict[int, float] = field(default_factory=dict)
    """By model: seconds for a token of a prompt."""
    tokens: float = 0.0
    tallies: dict[int, Tally] = field(default_factory=dict)

    def expect(self, model: int, curve: Sequence[tuple[int, float]]) -> None:
        """What the passes of a model have been measured to cost: seconds by tokens, ascending, two points or more."""
        if len(curve) > 1 and model not in self.costs:
            self.costs[model] = PassCosts(seen=3, curve=tuple(curve))

    def observe_pass(self, model: int, rows: int, tokens: int, seconds: float) -> None:
        self.costs.setdefault(model, PassCosts()).observe(rows, tokens, seconds)

    def observe_reading(self, model: int, decoding: int, read: int, seconds: float) -> None:
        """A pass that read so many tokens of prompts, beside those that decoded."""
        cost = self.costs.get(model)
        # What the pass would have cost anyway is not the price of reading.
        anyway = 0.0 if cost is None else min(cost.pass_seconds(max(1, decoding)), 0.9 * seconds)
        found = (seconds - anyway) / read
        known = self.reading.setdefault(model, found)
        self.reading[model] = known + 0.3 * (found - known)

    def reading_tokens(self, model: int, decoding: int) -> int:
        """Tokens of a prompt that take as long as a usual pass, or one over so many that decode."""
        cost, reading = self.costs.get(model), self.reading.get(model)
        if cost is None or not reading:
            return FIRST_PIECE
        return min(LONGEST_PIECE, max(SHORTEST_PIECE, int(cost.usual(decoding) / reading)))

    def readable(self, model: int, decoding: int, seconds: float) -> int:
        """Tokens of a prompt that take at most so many seconds beside those that decode; at least one."""
        cost, reading = self.costs.get(model), self.reading.get(model)
        if reading is None:
            return SHORTEST_PIECE
        if reading <= 0:
            return LONGEST_PIECE
        anyway = 0.0 if cost is None or not decoding else cost.pass_seconds(decoding)
        return min(LONGEST_PIECE, max(1, int((seconds - anyway) / reading)))

    def knows(self, assistant: int) -> bool:
        return all(model in self.costs and self.costs[model].seen >= 3 for model in (BASE, assistant))


class AdaptivePace:
    """Drafts as far as pays best, judged by this text's own tallies, with those of the engine as their prior."""

    PRIOR_DEFERRALS = 8.0
    PRIOR_TOKENS = 32.0
    RENEWED = 8.0

    def __init__(self, experience: Experience) -> None:
        self._engine = experience
        self._tokens = 0.0
        self._tallies: dict[int, Tally] = {}
        self._last = BASE
        self._plans: dict[int, tuple[float, tuple[int, int]]] = {}

    def observe(self, author: int, agreed: bool) -> None:
        self._tokens += 1
        self._engine.tokens += 1
        if author != BASE:
            for tallies in (self._tallies, self._engine.tallies):
                tally = tallies.get(author)
                if tally is None:
                    tally = tallies[author] = Tally()
                tally.deferred += 1
                tally.agreed += agreed
                tally.continued += author == self._last
        self._last = author

    def deferrals(self, assistant: int) -> int:
        return self._best(assistant)[0]

    def run(self, assistant: int) -> int:
        return self._best(assistant)[1]

    def _best(self, assistant: int) -> tuple[int, int]:
        """The best plan, made anew every `RENEWED` deferrals (earlier while there are few): making one costs time."""
        if not self._engine.knows(assistant):
            return 1, 0
        tally = self._tallies.get(assistant)
        seen = 0.0 if tally is None else tally.deferred
        until, plan = self._plans.get(assistant, (0.0, (1, 0)))
        if seen >= until:
            gap, agreement, continuation = self._estimates(assistant)
            costs = self._engine.costs
            plan = best_draft(gap, agreement, continuation, costs[BASE].blocks(), costs[assistant].blocks())
            self._plans[assistant] = (seen + min(max(1.0, seen), self.RENEWED), plan)
        return plan

    def _estimates(self, assistant: int) -> tuple[float, float, float]:
        """Gap, agreement and continuation of this text, drawn towards those of all texts."""
        own, pool = self._tallies.get(assistant, Tally()), self._engine.tallies.get(assistant, Tally())
        rate = (pool.deferred + 1) / (self._engine.tokens + 5)
        rate = (own.deferred + self.PRIOR_TOKENS * rate) / (self._tokens + self.PRIOR_TOKENS)

        def share(hits: float, pooled_hits: float) -> float:
            prior = (pooled_hits + 0.5) / (pool.deferred + 1)
            return (hits + self.PRIOR_DEFERRALS * prior) / (own.deferred + self.PRIOR_DEFERRALS)

        return 1 / min(1.0, rate), share(own.agreed, pool.agreed), share(own.continued, pool.continued)


class BlockCost(Protocol):
    def __call__(self, tokens: float, /) -> float: ...


def plain_cost(gap: float, base: BlockCost, assistant: BlockCost) -> float:
    """Seconds per deferred token of plain decoding."""
    return base(1) + assistant(gap)


def draft_cost(num_deferrals: int, gap: float, agreement: float, base: BlockCost, assistant: BlockCost) -> float:
    """Expected seconds per deferred token if the base drafts until `num_deferrals` are pending.

    The base steps between two deferrals, which plain decoding takes as well, are not counted.
    """
    cycle = num_deferrals * gap * base(1) + assistant(num_deferrals * gap)
    return cycle / _geometric(agreement, num_deferrals) - (gap - 1) * base(1)


def run_cost(num_run: int, gap: float, continuation: float, base: BlockCost, assistant: BlockCost) -> float:
    """Expected seconds per deferred token if the assistant drafts `num_run` tokens beyond each of its own."""
    cycle = assistant(gap) + num_run * assistant(1) + base(num_run + 1)
    return cycle / _geometric(continuation, num_run + 1)


def best_draft(
    gap: float, agreement: float, continuation: float, base: BlockCost, assistant: BlockCost
) -> tuple[int, int]:
    """The number of pending deferrals and the length of a run that are expected to cost least; at most one drafts."""
    plain = plain_cost(gap, base, assistant)
    by_base = {d: draft_cost(d, gap, agreement, base, assistant) for d in range(2, MAX_DEFERRALS + 1)}
    by_assistant = {n: run_cost(n, gap, continuation, base, assistant) for n in range(1, MAX_RUN + 1)}
    deferrals, run = min(by_base, key=by_base.__getitem__), min(by_assistant, key=by_assistant.__getitem__)
    if min(by_base[deferrals], by_assistant[run]) > (1 - MIN_GAIN) * plain:
        return 1, 0
    return (deferrals, 0) if by_base[deferrals] <= by_assistant[run] else (1, run)


def _geometric(ratio: float, terms: int) -> float:
    """1 + ratio + ... + ratio^(terms - 1)."""
    return terms if math.isclose(ratio, 1) else (1 - ratio**terms) / (1 - ratio)
