"""What each model of a system would have written at every place of a text that is there: one block pass of each."""

from __future__ import annotations

from dataclasses import dataclass

from collm.decoding.collaborative import Flow, gate_of
from collm.evaluation.likelihood import LAWS, GivenText
from collm.types import BASE
from collm.values import Answer, Fault, Query, Reply
from collm.views import Text


@dataclass(frozen=True, slots=True)
class Would:
    """A model at one place: its most probable token, and the log-probability of the one that stands there."""

    token_id: int
    log_prob: float
    given_log_prob: float


@dataclass(frozen=True, slots=True)
class Place:
    """One place of a text. `by_model`: base first; None for a tool with nothing to say, a text for why it failed.

    `gate`: `[1+K]`, empty without one.
    """

    by_model: tuple[Would | str | None, ...]
    gate: tuple[float, ...]


def would_write(given: GivenText, text: Text, into: list[Place]) -> Flow:
    """A flow that writes nothing; a model that fails costs the others nothing.

    Args:
        text: its views hold the prompts and all of the completion but the last token (`likelihood.scored_text`).
        into: one for each token of the completion.
    """
    for start in range(0, len(given.completion), LAWS):
        gold = given.completion[start : start + LAWS]
        end = start + len(gold)
        replies = yield tuple(
            Query(z, text.views[z], len(prompt) + end - 1, len(gold), given=gold)
            for z, prompt in enumerate(given.prompts)
        )
        assert replies is not None
        into.extend(_place(replies_at) for replies_at in zip(*replies, strict=True))
    return "stop"


def _place(replies: tuple[Reply, ...]) -> Place:
    base = replies[BASE]
    gate = gate_of(base.log_gate) if isinstance(base, Answer) else ()
    return Place(tuple(map(_would, replies)), gate)


def _would(reply: Reply) -> Would | str | None:
    if isinstance(reply, Fault):
        return reply.reason
    if reply is None:
        return None
    assert reply.given_log_prob is not None
    if reply.top_token_id is None:
        return "its server does not tell what it would have written"
    return Would(reply.top_token_id, reply.top_log_prob, reply.given_log_prob)
