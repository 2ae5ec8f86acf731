"""A served model among models with other tokenizers (`collm.cuts`).

A server chooses among all tokens and tells a few of the most probable ones. What may come is taken from those; how
probable it was that a chunk opens at all, a sum over the whole law, nobody tells: closing factors are taken for 1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from collm.cuts import NEVER, Cuts
from collm.values import UNKNOWN, Answer, Draw, Fault, Query, Reply

NUM_TOP = 20
"""Most probable tokens that are asked for: what a vLLM tells at most, unless it is told otherwise."""
TRIES = 4
"""Draws of the server's that are looked at, until one may come; then the most probable one that may is taken."""


@dataclass(frozen=True)
class Openings:
    """Which of a model's tokens may come; `first_bytes` as in `cuts.Codec`."""

    cuts: Cuts
    first_bytes: Sequence[int]

    def allow(self, token_id: int, last_byte: int, opens: bool) -> bool:
        """May the token stand behind this byte? With `opens`, it has to open a chunk."""
        first = self.first_bytes[token_id] if 0 <= token_id < len(self.first_bytes) else NEVER
        return first != NEVER and (not opens or self.cuts.opens(last_byte, first))

    def best(self, answer: Answer, last_byte: int, opens: bool) -> tuple[int, float] | None:
        """The most probable one that may come, of those that were told, with its log-probability."""
        told = sorted({*answer.top, (answer.token_id, answer.log_prob)}, key=lambda pair: -pair[1])
        return next((pair for pair in told if self.allow(pair[0], last_byte, opens)), None)

    async def choose(self, ask: Callable[[Draw], Awaitable[Reply]], query: Query, last_byte: int) -> Reply:
        """The next token of one prefix: the server's own choice, if that may come, else the most probable one that may.

        None, an abstention, where something has to open and nothing that was told does.

        Args:
            ask: the server's next token by a draw, with its most probable ones.
        """
        opens, draw = query.opens, query.draw
        tries = TRIES if draw.temperature else 1
        for attempt in range(tries):
            found = await ask(replace(draw, seed=draw.seed ^ (attempt << 56)))
            if not isinstance(found, Answer):
                return found
            if self.allow(found.token_id, last_byte, opens):
                break
        assert isinstance(found, Answer)
        chosen: tuple[int, float] | None = (found.token_id, found.log_prob)
        if not self.allow(found.token_id, last_byte, opens):
            chosen = self.best(found, last_byte, opens)
        if chosen is None:
            return None if opens else Fault("the most probable tokens that the server tells are none of a text")
        top, top_log_prob = self.best(found, last_byte, True) or (None, UNKNOWN)
        return found._replace(
            token_id=chosen[0],
            log_prob=chosen[1],
            top_token_id=top,
            top_log_prob=top_log_prob,
            top=found.top[: query.num_top],
        )
