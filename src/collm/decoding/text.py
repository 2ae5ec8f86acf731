"""From written tokens to text: incremental detokenisation, stop strings, and the pieces a viewer colours."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from collm.decoding.collaborative import Flow, Request
from collm.types import BASE, FinishReason, Step
from collm.values import Replies

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes bytes to that are no UTF-8, or not yet."""
CONTEXT = 8
"""Prompt tokens that are decoded along, so that the completion's first token keeps its leading space."""
LONGEST = 4
"""Bytes, and so tokens at most, of one character."""


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = ..., *, clean_up_tokenization_spaces: bool = ...
    ) -> str | list[str]: ...


class Detokenizer:
    """Token ids in, text out, piece by piece; the pieces join to the text of the whole.

    A token's text depends on its neighbours (leading spaces, characters spread over tokens), so each piece is the
    difference of two decodings, with and without it, behind a context that begins and ends with whole characters. A
    character that is not complete yet is held back and comes with the token that completes it, or with `flush`. Bytes
    that cannot become a character are given up one by one: decoders with byte fallback would spoil all that follow.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context = self._whole(list(prompt[-CONTEXT - LONGEST :]))
        self._pending: list[int] = []
        self._seen = self._decode(self._context)

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        piece = self._shown(self._pending)
        if not piece:  # a special token that is not shown: what stands before it stays the context
            return ""
        if not piece.endswith(REPLACEMENT):
            self._settle(self._pending)
            return piece
        return self._give_up_bytes()

    def flush(self) -> str:
        """What is held back, as the tokenizer shows it."""
        piece = self._shown(self._pending)
        self._settle(self._pending)
        return piece

    def _give_up_bytes(self) -> str:
        """The first of the pending tokens, if what follows shows that they are no character."""
        pending = self._pending
        for n in range(1, len(pending)):
            rest = self._shown(pending[n:])
            if rest and not rest.endswith(REPLACEMENT):
                lost = self._shown(pending[:n])
                self._settle(pending[n:])
                return lost + rest
        if len(pending) < LONGEST:
            return ""
        whole = self._shown(pending)
        for n in range(1, len(pending)):
            lost = self._shown(pending[:n])
            if lost + self._shown(pending[n:]) == whole:
                break
        else:
            lost, n = self._shown(pending[:1]), 1
        del pending[:n]
        return lost

    def _settle(self, tokens: list[int]) -> None:
        self._context, self._pending = tokens, []
        self._seen = self._decode(self._context)

    def _shown(self, tokens: list[int]) -> str:
        return self._decode(self._context + tokens)[len(self._seen) :]

    def _whole(self, tokens: list[int]) -> list[int]:
        """The end of a prompt from where a character begins."""
        near = tokens[-CONTEXT:]
        for n in (*range(len(near), len(tokens) + 1), *range(len(near) - 1, 0, -1)):
            if REPLACEMENT not in self._decode(tokens[-n:] if n else []):
                return tokens[-n:] if n else []
        return near

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, self._skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class Pieces(Protocol):
    """What steps bring, as text."""

    def push(self, step: Step) -> str: ...

    def flush(self) -> str: ...


class TokenPieces:
    """Of steps that are tokens. `eos`: tokens of each model that are left out, base first; none: all are shown."""

    def __init__(
        self,
        tokenizer: Decoder,
        prompt: Sequence[int],
        eos: Sequence[frozenset[int]] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=bool(eos))
        self._eos = eos

    def push(self, step: Step) -> str:
        # An end-of-sequence token need not be a special token of the tokenizer; it is never part of the text.
        if self._eos and (step.token_id in self._eos[BASE] or step.token_id in self._eos[step.author]):
            return ""
        return self._detokenizer.push(step.token_id)

    def flush(self) -> str:
        return self._detokenizer.flush()


class BytePieces:
    """Of steps that are chunks. `end`: how the end of a text is shown."""

    def __init__(self, end: str = "") -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._end = end

    def push(self, step: Step) -> str:
        return self._decoder.decode(step.data) if step.data else self.flush() + self._end

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class TextStream:
    """The text of a growing completion, cut at stop strings; what may yet become one is held back.

    `push` and `finish` return text that will not change any more; joined it is `Generation.text`. `brought`: what the
    last of them added to the text, of which a part may be held back or cut off.
    """

    def __init__(self, pieces: Pieces, stop: tuple[str, ...]) -> None:
        self._pieces = pieces
        self._stop = stop
        self._held = ""
        self.brought = ""
        self.stopped = False

    def push(self, step: Step) -> str:
        self.brought = "" if self.stopped else self._pieces.push(step)
        return self._take(self.brought)

    def finish(self) -> str:
        self.brought = "" if self.stopped else self._pieces.flush()
        released = self._take(self.brought)
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


class Piece(NamedTuple):
    """What one written token brings: `text` that has become certain, and `piece`, its own text, special tokens shown.

    `text` lags behind where a character or a possible stop string is not complete, `piece` where a character is not.
    `brought`: what it adds to the text, as `TextStream` has it. Where a special token stands between parts of a
    character, that is another text than the piece's.
    """

    text: str
    piece: str
    brought: str


class Transcript:
    """The text of one completion as it grows, made once: by its flow where there are stop strings, or by its reader.

    Args:
        text: what belongs to the text.
        shown: what is shown of each step, special tokens too.
    """

    def __init__(self, text: Pieces, shown: Pieces, stop: tuple[str, ...]) -> None:
        self._text = TextStream(text, stop)
        self._tokens = shown
        self._pieces: list[Piece] = []

    @classmethod
    def of_tokens(
        cls, tokenizer: Decoder, prompt: Sequence[int], stop: tuple[str, ...], eos: Sequence[frozenset[int]]
    ) -> Transcript:
        return cls(TokenPieces(tokenizer, prompt, eos), TokenPieces(tokenizer, prompt), stop)

    @classmethod
    def of_chunks(cls, end: str, stop: tuple[str, ...]) -> Transcript:
        """`end`: what is shown for the end of a text."""
        return cls(BytePieces(), BytePieces(end), stop)

    @property
    def stopped(self) -> bool:
        return self._text.stopped

    def at(self, number: int, step: Step) -> Piece:
        """What the step of this number brings; they come in order."""
        if number == len(self._pieces):
            self._pieces.append(Piece(self._text.push(step), self._tokens.push(step), self._text.brought))
        return self._pieces[number]

    def finish(self) -> tuple[Piece, str, tuple[str, ...]]:
        """What was held back, the whole text, and the pieces of all tokens."""
        last = Piece(self._text.finish(), self._tokens.flush(), self._text.brought)
        pieces = [each.piece for each in self._pieces]
        if pieces:
            pieces[-1] += last.piece
        return last, "".join([each.text for each in self._pieces] + [last.text]), tuple(pieces)


def stopping(flow: Flow, transcript: Transcript) -> Flow:
    """`flow`, ended ("stop") at the token that completes a stop string."""
    reply: Replies | None = None
    number = 0
    while True:
        try:
            event: Request | Step = flow.send(reply)
        except StopIteration as stop:
            return _finish_reason(stop)
        if isinstance(event, Step):
            # Before anybody else hears of it: a reader in another thread finds its text made.
            transcript.at(number, event)
            number += 1
        reply = yield event
        if transcript.stopped:
            flow.close()
            return "stop"


def _finish_reason(stop: StopIteration) -> FinishReason:
    reason: FinishReason = stop.value
    return reason
