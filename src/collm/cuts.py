"""Where models with different tokenizers may take turns: the law of cuts.

A *cut* is a place between two bytes that no ordinary token of any model of the system holds side by side, and never
within a character. So no token crosses a cut, however a text is tokenised, and whether a place is one is known from
the last byte written and the first byte of the next token. A *chunk* lies between two cuts: what one model writes
before another may go on. A text's chunks depend on its bytes alone, so its likelihood is a sum over who wrote each of
them, and the law of chunks sums to one (docs/method.md).

Only bytes are known here: no tokenizer, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from collm.errors import CollmError

START = 256
"""The "last byte" of a completion that is still empty: anything may open there."""
END = 256
"""The "first byte" of a token that ends the text: it may come anywhere."""
NEVER = -1
"""The "first byte" of a token that no text holds: special ones, and those that fill a vocabulary up."""
LONGEST_CHUNK = 256
"""Tokens that a chunk may have of any model. A line of Chinese has chunks of 80: it is read right, if slowly, so that a
limit of 64 would refuse too much. But a chunk is told when it is whole: until then nothing of it is streamed, stopped
or given to another model, so that there has to be an end to it."""
FOLLOWERS = b"aA1( \n"
"""Bytes that are tried as what follows a chunk."""
STARTS = [b for b in range(256) if not 0x80 <= b < 0xC0]
"""Bytes that begin a character."""
FEW_CUTS = 0.5
"""Share of a base's tokens that start at a cut, below which a pair is warned of."""


def require_short(tokens: int, name: str, *, advice: str = "take models of one tokenizer for it") -> None:
    """Raises:
    CollmError: a chunk of so many tokens of the model of this name is too long.
    """
    if tokens > LONGEST_CHUNK:
        raise CollmError(
            f"a chunk of {tokens} tokens of {name}, more than the {LONGEST_CHUNK} that are read at a time: the models' "
            f"tokenizers have too few cuts in such text; {advice}"
        )


class Codec(Protocol):
    """A model's tokenizer as the law of cuts needs it: tokens are byte strings."""

    @property
    def name(self) -> str:
        """Of the model."""
        ...

    @property
    def pieces(self) -> Sequence[bytes | None]:
        """The bytes of each token; None for one that no text holds."""
        ...

    @property
    def first_bytes(self) -> Sequence[int]:
        """Of each token: its first byte, `END` or `NEVER`."""
        ...

    def canonical(self, chunk: bytes) -> tuple[int, ...] | None:
        """The tokens of a chunk, as they stand in any text that holds it; None where the tokenizer would change it."""
        ...

    def chunk_ids(self, chunk: bytes) -> tuple[int, ...]:
        """The same, by single bytes where the tokenizer would change it.

        Raises:
            CollmError: this tokenizer has no tokens for it.
        """
        ...


@dataclass(frozen=True, eq=False)
class Cuts:
    """`allowed[a, b]`: bool `[257, 257]`, may a writer change between byte a and byte b? Row `START`, column `END`."""

    allowed: NDArray[np.bool_]

    @classmethod
    def of(cls, vocabularies: Iterable[Iterable[bytes | None]]) -> Cuts:
        """From the ordinary tokens of all models of a system."""
        crossed = np.zeros((257, 257), np.bool_)
        crossed[:START, 0x80:0xC0] = True  # UTF-8: these go on with a character
        for pieces in vocabularies:
            whole = [piece for piece in pieces if piece is not None and len(piece) > 1]
            data = np.frombuffer(b"".join(whole), np.uint8)
            inside = np.ones(len(data), np.bool_)
            inside[np.cumsum([len(piece) for piece in whole], dtype=np.int64) - 1] = False
            at = np.nonzero(inside)[0]
            crossed[data[at], data[at + 1]] = True
        return cls(~crossed)

    @cached_property
    def fingerprint(self) -> str:
        """Of the table: scores, gates and calibrations are of one."""
        return hashlib.sha256(np.packbits(self.allowed).tobytes()).hexdigest()[:16]

    @cached_property
    def free(self) -> tuple[bool, ...]:
        """Of each last byte: is a chunk closed behind it, whatever comes? Not behind a byte of a character of several:
        the character may go on."""
        return tuple(bool(last < 0x80 and self.allowed[last, STARTS].all()) for last in range(256)) + (True,)

    def opens(self, last: int, first: int) -> bool:
        """May a token with this first byte (or `END`) open a chunk behind this last byte (or `START`)?"""
        return first != NEVER and bool(self.allowed[last, first])

    def offsets(self, data: bytes) -> list[int]:
        """The cuts of a completion, its beginning and its end among them: one more than it has chunks."""
        if not data:
            return [0]
        of = np.frombuffer(data, np.uint8)
        inner = np.nonzero(self.allowed[of[:-1], of[1:]])[0] + 1
        return [0, *inner.tolist(), len(data)]

    def chunks(self, data: bytes) -> list[bytes]:
        return [data[a:b] for a, b in pairwise(self.offsets(data))]

    def follower(self, last: int) -> bytes:
        """A byte that may open a chunk behind this one: pretokenizers look ahead, GPT-2's makes one token of two line
        breaks at the end of a text and two before a letter. Empty where none may."""
        return next((bytes([b]) for b in FOLLOWERS if self.allowed[last, b]), b"")
