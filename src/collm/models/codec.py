"""A Hugging Face tokenizer whose tokens are byte strings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.cuts import END, NEVER, Cuts
from collm.errors import CollmError
from collm.models.tokenizers import PADDING

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""SentencePiece's tokens of single bytes."""
SPACE = "▁"
PROBE = "a b\nThe total is 12.\n"
"""What a tokenizer of this kind gives back as it was; one with a dummy space in front of every text does not."""

_shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = {chr(b): b for b in _shown} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _shown)}
"""GPT-2's printable stand-ins for the 256 bytes."""


class NotItsText(CollmError):
    """A tokenizer that does not give a text back byte for byte, so that nobody could say where its tokens lie."""


class ByteCodec:
    """See `collm.cuts.Codec`.

    Args:
        cuts: of the system; None while they are being made.
        ends: tokens that end a text of this model.

    Raises:
        CollmError: the tokenizer does not keep texts as they are, or has no bytes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cuts: Cuts | None = None,
        ends: frozenset[int] = frozenset(),
        *,
        name: str = "the model",
    ) -> None:
        self.tokenizer, self.cuts, self.name = tokenizer, cuts, name
        self.ends = ends or frozenset({int(tokenizer.eos_token_id)})
        self.pieces: Sequence[bytes | None] = vocabulary(tokenizer)
        self._of_bytes = {piece[0]: v for v, piece in enumerate(self.pieces) if piece is not None and len(piece) == 1}
        self.canonical = lru_cache(maxsize=1 << 16)(self._canonical)
        self.encode(PROBE)

    @cached_property
    def first_bytes(self) -> list[int]:
        first = [NEVER if piece is None else piece[0] for piece in self.pieces]
        first += [NEVER] * (1 + max(self.ends) - len(first))
        for token_id in self.ends:
            first[token_id] = END
        return first

    def encode(self, text: str) -> list[int]:
        """The tokens of a whole text.

        Raises:
            NotItsText: the tokenizer changes it (normalisation, a dummy space, unknown characters), or reads a special
                token in it.
        """
        ids: list[int] = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if self.data(ids) != text.encode():
            special = next((v for v in ids if not self.is_text(v)), None)
            raise NotItsText(
                f"the tokenizer of {self.name} does not give {_short(text)} back byte for byte"
                + (
                    " (it normalises texts, or puts a space in front)"
                    if special is None
                    else f" (it reads {self.tokenizer.convert_ids_to_tokens(special)!r} in it)"
                )
                + "; models with different tokenizers need one that does: leave the text out, or take another model"
            )
        return ids

    def is_text(self, token_id: int) -> bool:
        return token_id < len(self.pieces) and self.pieces[token_id] is not None

    def data(self, token_ids: Sequence[int]) -> bytes:
        """What they stand for; tokens that are no text are left out."""
        return b"".join(self.pieces[v] or b"" for v in token_ids if v < len(self.pieces))

    def lengths(self, token_ids: Sequence[int]) -> list[int]:
        """Bytes up to the end of each."""
        return list(accumulate(len(self.pieces[v] or b"") for v in token_ids))

    def chunk_ids(self, chunk: bytes) -> tuple[int, ...]:
        """See `Codec`. What the tokenizer would change, or what is no text, is made of single bytes."""
        return self.canonical(chunk) or self._bytewise(chunk)

    def _canonical(self, chunk: bytes) -> tuple[int, ...] | None:
        """With one byte that may follow, for pretokenizers look ahead."""
        assert chunk and self.cuts is not None
        hint = self.cuts.follower(chunk[-1])
        try:
            ids = self.encode((chunk + hint).decode())
        except (NotItsText, UnicodeDecodeError):
            return None
        ends = self.lengths(ids)
        if len(chunk) not in ends:
            return None
        return tuple(ids[: ends.index(len(chunk)) + 1])

    def _bytewise(self, chunk: bytes) -> tuple[int, ...]:
        lacking = next((b for b in chunk if b not in self._of_bytes), None)
        if lacking is not None:
            raise CollmError(
                f"{self.name} has no tokens for {chunk.decode(errors='replace')!r} (none for byte 0x{lacking:02x})"
            )
        return tuple(self._of_bytes[b] for b in chunk)


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[bytes | None, ...]:
    """The bytes of each token of a byte-level or SentencePiece-like tokenizer; None for those that no text holds:
    special ones, placeholders that fill a vocabulary up. (Added tokens that are not special are text.)

    Placeholders have to go: one `[PAD151668]` would forbid all cuts between digits.
    """
    tokens: dict[str, int] = tokenizer.get_vocab()
    added: dict[int, Any] = tokenizer.added_tokens_decoder
    special = {token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens)
    literal = {token.content for token in added.values()}
    byte_level = _is_byte_level(tokenizer, tokens)
    pieces: list[bytes | None] = [None] * (1 + max(tokens.values(), default=0))
    for token, number in tokens.items():
        if not token or token in special or PADDING.fullmatch(token):
            continue
        if token in literal:
            pieces[number] = token.encode()
        elif byte_level:
            pieces[number] = bytes(BYTES[c] for c in token) if all(c in BYTES for c in token) else None
        elif (byte := BYTE.fullmatch(token)) is not None:
            pieces[number] = bytes([int(byte[1], 16)])
        else:
            pieces[number] = token.replace(SPACE, " ").encode()
    return tuple(pieces)


def _is_byte_level(tokenizer: PreTrainedTokenizerBase, tokens: dict[str, int]) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is not None:
        state = json.loads(decoder.__getstate__())
        return "ByteLevel" in {state.get("type"), *(part.get("type") for part in state.get("decoders", ()))}
    return "Ġ" in tokens and SPACE not in tokens


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
