"""Written tokens as clients are told them: released with the text that they make, never ahead of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from collm.decoding.text import REPLACEMENT, Detokenizer
from collm.evaluation.others import Place, Would
from collm.llm import Chunk, CollaborativeLM
from collm.types import Step


@dataclass(frozen=True, slots=True)
class Token:
    """`text`: what it brings to the text (empty while its character is not complete, and for what is not shown).

    `offset`: where that begins, in characters. `shown`: it stands within the text; the token that ended it does not.
    """

    step: Step
    text: str
    offset: int
    shown: bool = True

    @property
    def parts(self) -> list[Part]:
        """The base's tokens that a chunk is made of, as far as it is shown; a token is its own only part. The first has
        the log-probability of the whole, the others have none."""
        data, whole, ends = self.text.encode(), self.step.data or b"", list(accumulate(self.step.token_lengths))
        # A chunk that is cut off has lost tokens; one with bytes that are no text has them, whatever is shown.
        is_cut = 0 < len(data) < len(whole) and whole.startswith(data)
        starts = [0, *(end for end in ends[:-1] if end < len(data) or not is_cut)]
        return [
            Part(data[start:end], self.offset + len(data[:start].decode(errors="ignore")), not start)
            for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]


class Part(NamedTuple):
    """`offset`: in characters, where it begins."""

    data: bytes
    offset: int
    first: bool

    @property
    def text(self) -> str:
        """With a sign for a character of which it holds a part."""
        return self.data.decode(errors="replace")


class Telling:
    """The tokens of one text, released once the text that they make is certain; joined they are the text.

    So nothing of a stop string is told by way of its tokens.

    Args:
        hidden: tokens that are no part of a text.
    """

    def __init__(self, hidden: frozenset[int]) -> None:
        self._hidden = hidden
        self._held: list[Token] = []
        self._made = self._released = 0

    def take(self, chunk: Chunk) -> list[Token]:
        """The tokens that one chunk releases."""
        self._released += len(chunk.text)
        if chunk.step is not None:
            self._held.append(Token(chunk.step, "", self._made))
        self._add(chunk.brought)
        if chunk.step is None:
            return self._finish()
        whole = [n for n, each in enumerate(self._held) if each.text and each.offset + len(each.text) <= self._released]
        count = whole[-1] + 1 if whole else 0
        if count == len(self._held) and chunk.brought.endswith(REPLACEMENT):
            count -= 1  # of bytes that are no text it may have more to show
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _add(self, text: str) -> None:
        """To the token that has come last, but for one that has no part in the text."""
        held = self._held
        if not held or not text:
            return
        at = next((n for n in reversed(range(len(held))) if held[n].step.token_id not in self._hidden), len(held) - 1)
        held[at] = replace(held[at], text=held[at].text + text)
        held[at + 1 :] = [replace(each, offset=each.offset + len(text)) for each in held[at + 1 :]]
        self._made += len(text)

    def _finish(self) -> list[Token]:
        """All the others. What stands behind a stop string is cut off."""
        end, held = self._released, self._held
        return [replace(each, text=each.text[: max(0, end - each.offset)], shown=each.offset < end) for each in held]


class TokenTexts:
    """The text of single tokens, as they stand in the middle of a text."""

    def __init__(self, llm: CollaborativeLM) -> None:
        self._tokenizer: PreTrainedTokenizerBase = llm.tokenizer
        # Behind an anchor, for SentencePiece tokenizers drop the leading space of a text.
        [*_, self._anchor] = self._tokenizer.encode("=", add_special_tokens=False)
        self._before = len(self._decode([self._anchor]))
        self._texts: dict[int, str] = {}
        self.hidden = frozenset(self._tokenizer.all_special_ids) | frozenset().union(
            *(model.eos_token_ids | own.end_ids for model, own in zip(llm.models, llm.formatters, strict=True))
        )
        """Tokens that are no part of a text."""
        self.size = len(self._tokenizer)

    def __call__(self, token_id: int) -> str:
        if token_id not in self._texts:
            # What lies behind the vocabulary is padding, which models may find probable all the same.
            known = token_id < self.size
            self._texts[token_id] = self._decode([self._anchor, token_id])[self._before :] if known else ""
        return self._texts[token_id]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The texts of the tokens of a prompt, which join to it; special tokens are shown."""
        detokenizer = Detokenizer(self._tokenizer, skip_special_tokens=False)
        found = [detokenizer.push(token_id) for token_id in token_ids]
        found[-1] += detokenizer.flush()
        return found

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


Top = Iterable[tuple[int, float]]
LEAST = -9999.0
"""Stands for the logarithm of 0, which JSON does not have; as OpenAI's and vLLM's servers do."""


def number(log_prob: float) -> float:
    return log_prob if log_prob > LEAST else LEAST  # NaN, which a server may leave, is not told either


def chat_log_probs(tokens: Sequence[Token], texts: TokenTexts, num_top: int) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def entry(text: str, data: bytes, log_prob: float | None) -> dict[str, Any]:
        return {"token": text, "logprob": None if log_prob is None else number(log_prob), "bytes": list(data)}

    def top(found: Top) -> list[dict[str, Any]]:
        told = [(texts(token_id), value) for token_id, value in found]
        return [entry(text, text.encode(), value) for text, value in told]

    content = [
        {
            **entry(part.text, part.data, each.step.log_prob if part.first else None),
            "top_logprobs": top(each.step.top[:num_top]) if part.first else [],
        }
        for each in tokens
        if each.shown
        for part in each.parts
    ]
    return {"content": content, "refusal": None}


@dataclass(slots=True)
class LogProbs:
    """The `logprobs` of a completion: four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    @classmethod
    def empty(cls) -> LogProbs:
        return cls([], [], [], [])

    def add(self, text: str, offset: int, log_prob: float | None, top: dict[str, float] | None) -> None:
        self.tokens.append(text)
        self.token_logprobs.append(None if log_prob is None else number(log_prob))
        self.top_logprobs.append(top)
        self.text_offset.append(offset)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def top_dict(token_id: int, log_prob: float, top: Top, texts: TokenTexts) -> dict[str, float]:
    """The most probable tokens and the one that stands there, by their texts; by their ids where two have one text."""
    found: dict[str, float] = {}
    named: set[int] = set()
    for each, value in [*top, (token_id, log_prob)]:
        if each not in named:
            text = texts(each)
            found[f"token_id:{each}" if text in found else text] = number(value)
            named.add(each)
    return found


def completion_log_probs(tokens: Sequence[Token], texts: TokenTexts, num_top: int, offset: int = 0) -> dict[str, Any]:
    """The `logprobs` of a completion, or of a piece of one; `offset`: characters before the completion."""
    found = LogProbs.empty()
    for each in tokens:
        if each.shown:
            step = each.step
            top = top_dict(step.token_id, step.log_prob, step.top[:num_top], texts)
            for part in each.parts:
                told = (step.log_prob, top) if part.first else (None, None)
                found.add(part.text, offset + part.offset, *told)
    return found.to_json()


def told_tokens(tokens: Sequence[Token], names: Sequence[str], texts: TokenTexts) -> list[dict[str, Any]]:
    """The tokens as the field `collm` tells them: who wrote each of them, and how it came about."""
    found = []
    for each in tokens:
        step = each.step
        one: dict[str, Any] = {
            "text": each.text,
            "token_id": step.token_id,
            "author": names[step.author],
            "log_prob": number(step.log_prob),
            "gate": dict(zip(names, step.gate, strict=True)) if step.gate else None,
            "draft": step.draft or None,
        }
        if step.data is not None:
            one["token_ids"], one["token_texts"] = list(step.token_ids), list(step.token_pieces)
        if step.changed and step.base_token_id is not None:
            one["base_text"] = texts(step.base_token_id)
        if step.abstained:
            one["abstained"] = True
        if step.fault is not None:
            one["fault"] = step.fault
        found.append(one)
    return found


def read_tokens(
    places: Sequence[Place], token_ids: Sequence[int], names: Sequence[str], texts: TokenTexts
) -> list[dict[str, Any]]:
    """What each model would have written at every place of a text."""

    def told(would: Would | str | None) -> dict[str, Any] | None:
        if would is None or isinstance(would, str):
            return None if would is None else {"fault": would}
        return {
            "text": texts(would.token_id),
            "token_id": would.token_id,
            "log_prob": number(would.log_prob),
            "given_log_prob": number(would.given_log_prob),
        }

    return [
        {
            "text": piece,
            "token_id": token_id,
            "gate": dict(zip(names, place.gate, strict=True)) if place.gate else None,
            "by_model": dict(zip(names, map(told, place.by_model), strict=True)),
        }
        for place, token_id, piece in zip(places, token_ids, texts.pieces(token_ids), strict=True)
    ]


def author_counts(steps: Iterable[Step], names: Sequence[str]) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    for step in steps:
        counts[names[step.author]] += 1
    return counts
