"""Nudging: a large untuned model writes, and where it is in doubt a small tuned one writes a word.

Fei et al. 2024, arXiv 2410.09300. Our base is the small tuned model that nudges, the assistant the large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from collm.decoding.collaborative import Flow, ModelFailed, ask, ends_text, gate_of, required
from collm.decoding.policies import to_nats
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import Answer, Reply
from collm.views import Text

WRITER = 1
DEFAULT_THRESHOLD = 0.4


@dataclass(frozen=True, slots=True)
class Nudging:
    """`threshold`: the writer is in doubt where its largest probability lies below it.

    `starts_word`: whether a token begins a new word, which a flow cannot know, for it sees no text.
    """

    starts_word: Callable[[int], bool] = field(repr=False)
    threshold: float = DEFAULT_THRESHOLD
    needs_gate: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ("the small tuned model that nudges", "the large untuned one that writes")

    def in_doubt(self, writer: Answer) -> bool:
        return -writer.top_log_prob > to_nats(self.threshold)


def nudging(text: Text, params: SamplingParams, method: Nudging, eos: Sequence[frozenset[int]]) -> Flow:
    """The writer is asked at the start of the text, after each of its own tokens, and after each word of the base.

    The base ends the text: an end that the writer wants is a doubt, and an end that the base wants belongs to its
    word. The base is not asked where the writer is sure, so that such steps have no gate and no `base_token_id`.
    """
    nudged, draw = False, params.draw
    while text.length < params.max_tokens:
        base: Answer | None = None
        writer: Answer | None = None
        fault: str | None = None
        if nudged:  # does its word go on?
            [reply] = yield from ask(text, [BASE], draw, num_top=params.top_log_probs)
            base = required(reply)
            nudged = ends_text(base.token_id, BASE, eos) or not method.starts_word(base.token_id)
        if not nudged:
            [reply] = yield from ask(text, [WRITER], draw, num_top=params.top_log_probs)
            writer, fault = usable_writer(reply, params)
            wants_end = writer is not None and ends_text(writer.token_id, WRITER, eos)
            nudged = writer is None or wants_end or method.in_doubt(writer)
        if nudged and base is None:
            [reply] = yield from ask(text, [BASE], draw, num_top=params.top_log_probs)
            base = required(reply)
        author, answer = (BASE, base) if nudged else (WRITER, writer)
        assert answer is not None
        text.append(answer.token_id)
        yield Step(
            answer.token_id,
            author,
            answer.log_prob,
            () if base is None else gate_of(base.log_gate),
            None if base is None else base.top_token_id,
            fault=fault,
            signal=None if writer is None else -writer.top_log_prob,
            top=answer.top,
        )
        if ends_text(answer.token_id, author, eos):
            return "stop"
    return "length"


def usable_writer(reply: Reply, params: SamplingParams) -> tuple[Answer | None, str | None]:
    """The writer's answer, or why there is none and the base writes in its place."""
    if isinstance(reply, Answer):
        return reply, None
    if reply is None:
        raise ModelFailed("the assistant abstains, and nudging lets it write: use a language model, not a tool")
    if params.on_assistant_error == "fail":
        raise ModelFailed(reply.reason)
    return None, reply.reason
