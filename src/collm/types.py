"""What users get back: written tokens, whole texts, and what they cost.

Nothing here knows a torch module, a tokenizer or a file. What travels between decoders and models is in
`collm.values`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

BASE = 0
"""Index of the base model; assistants are 1..K."""

FinishReason = Literal["stop", "length", "abstained", "error", "cancelled"]
"""`"error"`: a model failed in the middle, `Generation.error` says how; the text so far is kept."""
Drafted = Literal["", "accepted", "recovered"]
Unit = Literal["token", "chunk"]
"""What one step writes, and so what rates and shares count."""
Message = dict[str, Any]
"""`{"role": ..., "content": ...}` and what else `collm.data.messages` reads, as in the OpenAI API."""


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One forward pass of a transformers model, as issued.

    `rows` texts took part, `width` tokens in the widest of them and `tokens` in all (none is padding). `length`:
    positions attended to by the longest row. `seconds`: wall time, predictions on the host included.
    """

    rows: int
    width: int
    tokens: int
    length: int
    seconds: float


class Step(NamedTuple):
    """One written token; where models have different tokenizers, one written chunk.

    `log_prob` is the natural log-probability of the token under the law of its author (for `compose`: under the
    mixture) before temperature and truncation. `gate` is the base's `P(Z = z | prefix)`, `[1+K]`; it is empty where
    no gate was computed. `base_token_id` is what the base would have written greedily; `abstained` marks a deferral
    to which the assistant gave no answer, so that the base wrote the token after all; `fault` says why if it failed.
    `signal` is what the policy compared with its threshold where that is not the gate: the base's entropy, say, or the
    logarithm of the expected gain. `top`: on request (`SamplingParams.top_log_probs`) the most probable tokens under
    the law of `log_prob`, with their log-probabilities, best first.

    A chunk (`collm.cuts`) has its bytes in `data` (empty for the end of a text) and the base's tokens for it in
    `token_ids`, of which `token_id` is the first (`token_lengths`: how many bytes each has). `log_prob` is that of the
    whole chunk, with its closing factors, and `gate`, `base_token_id` and `signal` are those at its beginning.

    How it came about, in speculative decoding: `draft` is `"accepted"` if the token had been drafted before its author
    was asked (or before the gate of its position was known) and stands, `"recovered"` if another one had been drafted;
    `discarded` tokens drafted after this one were thrown away with it.
    """

    token_id: int
    author: int
    log_prob: float
    gate: tuple[float, ...] = ()
    base_token_id: int | None = None
    abstained: bool = False
    fault: str | None = None
    draft: Drafted = ""
    discarded: int = 0
    signal: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    token_ids: tuple[int, ...] = ()
    data: bytes | None = None
    token_lengths: tuple[int, ...] = ()

    @property
    def token_pieces(self) -> tuple[str, ...]:
        """The texts of `token_ids` of a chunk; of one that holds a part of a character, with a sign for it."""
        data, ends = self.data or b"", accumulate(self.token_lengths)
        spans = zip(ends, self.token_lengths, strict=True)
        return tuple(data[end - length : end].decode(errors="replace") for end, length in spans)

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """The base's tokens that were written."""
        return self.token_ids or (self.token_id,)

    @property
    def deferred(self) -> bool:
        return self.author != BASE

    @property
    def changed(self) -> bool:
        """An assistant wrote this token and the base would have written another."""
        return self.deferred and self.base_token_id is not None and self.base_token_id != self.token_id


def unit_of(steps: Iterable[Step]) -> Unit:
    """Chunks if models with different tokenizers wrote them."""
    return "chunk" if any(step.data is not None for step in steps) else "token"


def told_length(tokens: int, steps: int, unit: Unit) -> str:
    """How long a text is, for people: `120 tokens`, or `120 tokens in 110 chunks`."""
    return f"{tokens} tokens" + (f" in {steps} chunks" if unit == "chunk" else "")


def told_rate(rate: float) -> str:
    """A rate that somebody asked for, for people, as it was asked for: `0.5%`, `20%`."""
    return f"{100 * rate:.6g}%"


@dataclass(frozen=True, slots=True)
class Usage:
    """What one text cost.

    `forward_passes`, `tokens_by_author`: one number for each model, base first. A forward pass counts for every text
    that took part in it. `cached_tokens`: those of each model's prompt that its caches had already; a server's are not
    known, and 0. `drafted` = `accepted` + `recovered` + tokens thrown away behind a recovered one. `seconds`
    are wall time from admission to the batch to the end, `first_token_seconds` to the first written token.
    """

    tokens_by_author: tuple[int, ...] = ()
    forward_passes: tuple[int, ...] = ()
    drafted: int = 0
    accepted: int = 0
    recovered: int = 0
    seconds: float = field(default=0.0, compare=False)
    first_token_seconds: float = field(default=0.0, compare=False)
    cached_tokens: tuple[int, ...] = field(default=(), compare=False)

    @property
    def completion_tokens(self) -> int:
        return sum(self.tokens_by_author)

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Generation:
    """A finished (or, while streaming, growing) text and who wrote which token.

    `text` has stop strings and special tokens removed; `pieces` are the texts of the single steps, special tokens
    shown, so that a viewer can colour them.
    """

    text: str
    steps: tuple[Step, ...]
    pieces: tuple[str, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    model_names: tuple[str, ...]
    usage: Usage = field(default=Usage())
    error: str | None = None
    """Why the text ended with `"error"`."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token_id for step in self.steps for token_id in step.all_token_ids)

    @property
    def forward_passes(self) -> tuple[int, ...]:
        return self.usage.forward_passes

    @property
    def length(self) -> str:
        """For people: tokens of the base, and chunks where steps are such."""
        return told_length(self.completion_tokens, len(self.steps), unit_of(self.steps))

    @property
    def completion_tokens(self) -> int:
        return sum(len(step.all_token_ids) for step in self.steps)

    @cached_property
    def deferral_rate(self) -> float:
        """Share of tokens (or chunks) written by an assistant (0 for an empty text)."""
        return sum(step.deferred for step in self.steps) / max(1, len(self.steps))

    @cached_property
    def changed_tokens(self) -> int:
        """Tokens (or chunks) of an assistant in whose place the base would have written others."""
        return sum(step.changed for step in self.steps)

    def _repr_html_(self) -> str:
        """What a notebook shows: the text, coloured by who wrote each token; hovering tells more."""
        from collm.colours import coloured_html

        notes = []
        for step in self.steps:
            note = f"{self.model_names[step.author]}, log-probability {step.log_prob:.3g}"
            if step.gate:
                gates = zip(self.model_names, step.gate, strict=False)
                note += "; gate: " + ", ".join(f"{name} {gate:.3f}" for name, gate in gates)
            if step.changed:
                note += "; the base would have written another token"
            notes.append(note)
        summary = (
            f"{self.length}, {self.deferral_rate:.1%} written by assistants; finished by "
            f"{self.finish_reason}{'' if self.error is None else f' ({self.error})'}"
        )
        authors = [step.author for step in self.steps]
        return coloured_html(self.pieces, authors, self.model_names, notes, summary)
