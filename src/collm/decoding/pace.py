"""When to draft and how far: what one model's look-ahead costs, and what it saves (`drafts`).

Speculation never changes a text, so everything here may be an estimate, wall-clock times included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from collm.decoding.drafts import best_draft
from collm.decoding.experience import Experience, Tally
from collm.types import BASE

EVERY = 1 << 30
"""As many as there may be."""


class Leave(NamedTuple):
    """How far a model may write on by itself, where it can: so many tokens, past so many deferrals. Tokens that are
    given are drafted in any case; None leaves the number to the deferrals."""

    tokens: int | None = None
    passing: int = 0


class Pace(Protocol):
    """How far one text's drafts may go."""

    def leave(self, pending: int) -> Leave:
        """How far the base may draft on, with so many deferrals pending."""
        ...

    def asks(self, assistant: int, pending: int) -> bool:
        """Whether this assistant is asked now, with so many deferrals to it pending, rather than drafting goes on."""
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

    def leave(self, pending: int) -> Leave:
        return Leave(None, self.num_deferrals - 1 - pending)

    def asks(self, assistant: int, pending: int) -> bool:
        return pending >= self.num_deferrals

    def run(self, assistant: int) -> int:
        return self.num_run

    def observe(self, author: int, agreed: bool) -> None:
        pass


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
        self._assistant = BASE + 1
        """The one that is likely to be asked next: that of the last deferral."""
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
        """Deferrals, the present one counted, that are best pending when the assistant is asked; 1 = plain."""
        return self._best(assistant)[0]

    def leave(self, pending: int) -> Leave:
        assistant = self._assistant
        stride = self._engine.stride(assistant)
        if stride is None:
            return Leave(None, self.deferrals(assistant) - 1 - pending)
        return Leave(max(1, stride - self._engine.drafted[assistant]), EVERY)

    def asks(self, assistant: int, pending: int) -> bool:
        self._assistant = assistant
        stride = self._engine.stride(assistant)
        return pending >= self._best(assistant)[0] if stride is None else self._engine.drafted[assistant] >= stride

    def run(self, assistant: int) -> int:
        return self._best(assistant)[1] if self._engine.stride(assistant) is None else 0

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
