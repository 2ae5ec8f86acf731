"""From written tokens to text: incremental detokenisation, stop strings, and the pieces a viewer colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from collm.decoding.collaborative import Flow, Queries, Replies
from collm.types import BASE, FinishReason, Step

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes an incomplete UTF-8 sequence to."""
MAX_CONTEXT = 8
"""Prompt tokens that are decoded along, so that the completion's first token keeps its leading space."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = ..., *, clean_up_tokenization_spaces: bool = ...
    ) -> str | list[str]: ...


class Detokenizer:
    """Token ids in, text out, piece by piece; the pieces join to the text of the whole.

    A token's text depends on its neighbours (leading spaces, characters spread over tokens), so each piece is the
    difference of two decodings, of a window that starts where the last complete character ended. A character that
    is not complete yet is held back and comes with the token that completes it, or with `flush`.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = list(prompt)[-MAX_CONTEXT:]
        self._read = len(self._window)
        self._seen = self._decode(self._window)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self._seen) :]
        if not piece:  # a special token that is not shown: keep what stands before it as context
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._seen = self._decode(self._window)
        return piece

    def flush(self) -> str:
        """What is held back, as the tokenizer shows it."""
        piece = self._decode(self._window)[len(self._seen) :]
        self._read = len(self._window)
        self._seen += piece
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, self._skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class TextStream:
    """The text of a growing completion, cut at stop strings; what may yet become one is held back.

    `push` and `finish` return text that will not change any more; joined it is `Generation.text`.
    """

    def __init__(
        self, tokenizer: Decoder, prompt: Sequence[int], stop: tuple[str, ...], eos: Sequence[frozenset[int]]
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = stop
        self._eos = eos
        self._held = ""
        self.stopped = False

    def push(self, step: Step) -> str:
        # An end-of-sequence token need not be a special token of the tokenizer; it is never part of the text.
        if self.stopped or step.token_id in self._eos[BASE] or step.token_id in self._eos[step.author]:
            return ""
        return self._take(self._detokenizer.push(step.token_id))

    def finish(self) -> str:
        if self.stopped:
            return ""
        released = self._take(self._detokenizer.flush())
        rest, self._held = self._held, ""
        return released + rest

    def _take(self, piece: str) -> str:
        self._held += piece
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._held = self._held[: min(found)], ""
            return released
        # The longest end of the text that begins a stop string.
        keep = max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        released, self._held = self._held[:cut], self._held[cut:]
        return released


def stopping(flow: Flow, stream: TextStream) -> Flow:
    """`flow`, ended ("stop") at the token that completes a stop string."""
    reply: Replies | None = None
    while True:
        try:
            event: Queries | Step = flow.send(reply)
        except StopIteration as stop:
            return _finish_reason(stop)
        reply = yield event
        if isinstance(event, Step):
            stream.push(event)
            if stream.stopped:
                flow.close()
                return "stop"


def _finish_reason(stop: StopIteration) -> FinishReason:
    reason: FinishReason = stop.value
    return reason
