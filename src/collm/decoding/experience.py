"""What an engine has seen of its models: what their passes cost, and how often they agree."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from collm.decoding.drafts import BlockCost, best_draft, best_stride
from collm.types import BASE

SHORTEST_PIECE, FIRST_PIECE, LONGEST_PIECE = 8, 64, 1024
"""Tokens of a long prompt read in one pass beside texts that decode: at least, while costs are unknown, at most."""
DELAY = 0.75
"""The part of a usual pass by which such a piece may make it longer. A CPU computes what it reads: 32 tokens may take
it three passes."""
UNKNOWN_PIECE = 32
"""Tokens of the first piece of all where passes have a time limit."""
IN_STEP = 1.5
"""Texts of a pass of the base, on average, from which on they draft in step."""
PRIOR_TOKENS, PRIOR_GAP = 64.0, 4.0
"""What is believed of the gap between deferrals, and how firmly: those that are pending have not been counted."""


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

    def observe(self, rows: int, tokens: float, seconds: float) -> None:
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
        return float(self.blocks()(tokens))

    def blocks(self, rows: float | None = None) -> BlockCost:
        """`block` as it stands now, for many numbers of tokens at once; `rows`: of a curve, if not as lately."""
        if self.curve:
            own, (at, seconds) = rows or self.rows, np.array(self.curve).T
            # As `_on_curve`, of many numbers of tokens.
            return lambda tokens: (
                self._factor / own * np.interp(tokens * own, at, seconds) * np.maximum(1, tokens * own / at[-1])
            )
        rows, slope, least = self.rows, self.slope, 0.1 * self._seconds
        fixed = self._seconds - slope * self._tokens
        return lambda tokens: np.maximum(fixed + slope * rows * tokens, least) / rows


def _on_curve(curve: Sequence[tuple[int, float]], tokens: float) -> float:
    """Linear between the points; beyond the last one, in proportion."""
    if tokens > curve[-1][0]:
        return curve[-1][1] * tokens / curve[-1][0]
    last = bisect_left(curve, (tokens, 0.0))
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
    drafted: dict[int, int] = field(default_factory=dict)
    """By assistant that takes turns with the base on one device: passes of the base since its last one."""
    _strides: dict[int, int] = field(default_factory=dict)

    def share_device(self, assistants: Iterable[int]) -> None:
        """These take turns with the base."""
        self.drafted = dict.fromkeys(assistants, 0)

    def stride(self, assistant: int) -> int | None:
        """Passes of the base from one pass of this assistant to its next, if all texts draft in step; None where each
        text goes at its own pace.

        Where a pass over many texts costs what one over a single text does, whoever waits for a dear model wastes the
        others' passes, and whoever does not join a pass of it, his own place there. So all draft on, and all are judged
        at once. In step go texts whose models take turns on one device, of known costs (`expect`).
        """
        costs, base = self.costs, self.costs.get(BASE)
        if base is None or not base.curve or base.rows < IN_STEP or assistant not in self.drafted:
            return None
        found = self._strides.get(assistant)
        if found is None and assistant in costs:
            tally = self.tallies.get(assistant, Tally())
            gap = (self.tokens + PRIOR_TOKENS) / (tally.deferred + PRIOR_TOKENS / PRIOR_GAP)
            agreement = (tally.agreed + 0.5) / (tally.deferred + 1)
            both = base.blocks(), costs[assistant].blocks(base.rows)
            deferrals, _ = best_draft(gap, agreement, 0.0, *both)  # no runs: others would wait for each token
            found = self._strides[assistant] = best_stride(gap, agreement, *both) if deferrals > 1 else 0
        return found

    def _passed(self, model: int, passes: int = 1) -> None:
        if model == BASE:
            for assistant in self.drafted:
                self.drafted[assistant] += passes
        elif model in self.drafted:
            self.drafted[model] = 0
            self._strides.pop(model, None)

    def expect(self, model: int, curve: Sequence[tuple[int, float]]) -> None:
        """What the passes of a model have been measured to cost: seconds by tokens, ascending, two points or more."""
        if len(curve) > 1 and model not in self.costs:
            tokens, seconds = zip(*curve, strict=True)
            # More tokens never take less time: a dip is noise, and would draw plans to it.
            self.costs[model] = PassCosts(seen=3, curve=tuple(zip(tokens, accumulate(seconds, max), strict=True)))

    def observe_pass(self, model: int, rows: int, tokens: float, seconds: float, passes: int = 1) -> None:
        """Some passes in one call, of so many tokens each on average, and seconds."""
        self._passed(model, passes)
        self.costs.setdefault(model, PassCosts()).observe(rows, tokens, seconds)

    def observe_reading(self, model: int, decoding: int, read: int, seconds: float) -> None:
        """A pass that read so many tokens of prompts, beside those that decoded."""
        self._passed(model)
        cost = self.costs.get(model)
        # What the pass would have cost anyway is not the price of reading.
        anyway = 0.0 if cost is None else min(cost.pass_seconds(max(1, decoding)), 0.9 * seconds)
        found = (seconds - anyway) / read
        known = self.reading.setdefault(model, found)
        self.reading[model] = known + 0.3 * (found - known)

    def reading_tokens(self, model: int, decoding: int) -> int:
        """Tokens of a prompt that take `DELAY` of a usual pass, or of one over so many that decode."""
        cost, reading = self.costs.get(model), self.reading.get(model)
        if cost is None or not reading:
            return FIRST_PIECE
        return min(LONGEST_PIECE, max(SHORTEST_PIECE, int(DELAY * cost.usual(decoding) / reading)))

    def readable(self, model: int, decoding: int, seconds: float) -> int:
        """Tokens of a prompt that take at most so many seconds beside those that decode; at least one."""
        cost, reading = self.costs.get(model), self.reading.get(model)
        if reading is None:
            return UNKNOWN_PIECE
        if reading <= 0:
            return LONGEST_PIECE
        anyway = 0.0 if cost is None or not decoding else cost.pass_seconds(decoding)
        return min(LONGEST_PIECE, max(1, int((seconds - anyway) / reading)))

    def knows(self, assistant: int) -> bool:
        return all(model in self.costs and self.costs[model].seen >= 3 for model in (BASE, assistant))
