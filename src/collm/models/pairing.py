"""Do models share a tokenizer, and if not, how fine are the chunks in which they can take turns?"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from collm.cuts import FEW_CUTS, STARTS, Cuts, require_short
from collm.errors import CollmError
from collm.models.codec import ByteCodec
from collm.models.tokenizers import difference

if TYPE_CHECKING:
    from collm.models.tools import Tool

logger = logging.getLogger(__name__)

SAMPLES = {
    "prose": (
        "The harbour lay quiet in the morning fog. Two fishermen mended their nets, and neither of them spoke, for "
        "everything that could be said about the weather had been said the day before.\n\n"
        "\"You're late,\" said the older one at last. \"The tide won't wait for us, and it doesn't care whose fault "
        'it was."\n'
    ),
    "sums": (
        "Each box holds 24 bottles, and the shop sold 17 boxes, so it sold 24 * 17 = 408 bottles.\n"
        "At $1.25 each that makes 408 * 1.25 = 510 dollars, of which 15% is tax: 510 * 0.15 = 76.5.\n#### 433.5\n"
    ),
    "code": (
        "def mean(values: list[float]) -> float:\n"
        '    """The average; 0.0 for an empty list."""\n'
        "    if not values:\n        return 0.0\n"
        "    total = 0.0\n    for i, value in enumerate(values):\n        total += value  # in order\n"
        "    return total / len(values)\n"
    ),
}
"""Text of common kinds, for want of the user's own."""
DIGITS = b"0123456789"


def cuts_between(tokenizers: Sequence[PreTrainedTokenizerBase], names: Sequence[str]) -> Cuts | None:
    """The table of cuts of a system, base first; None where all share one tokenizer, so that every token is a chunk.

    Raises:
        CollmError: a tokenizer does not keep texts as they are.
    """
    others = [
        (tokenizer, name)
        for tokenizer, name in zip(tokenizers[1:], names[1:], strict=True)
        if tokenizer is not tokenizers[0] and difference(tokenizers[0], tokenizer) is not None
    ]
    if not others:
        return None
    # All: one that shares the base's may have a few marks of its own.
    return Cuts.of(ByteCodec(tokenizer, name=name).pieces for tokenizer, name in zip(tokenizers, names, strict=True))


@dataclass(frozen=True)
class Chunking:
    """How texts fall into chunks. Lengths are in the base's tokens."""

    tokens: int
    chunks: int
    at_cut: float
    """Share of the base's tokens that start at a cut."""
    mean: float
    p99: int
    longest: int
    refused: int = 0
    """Texts that one of the models cannot read: its tokenizer does not give them back byte for byte, reads a special
    token in them, or makes too long a chunk of them; of examples, those too that its chat template cannot show."""
    why: str | None = None
    """What was said of the first of these."""

    @classmethod
    def of(cls, lengths: Iterable[int], refused: Sequence[str] = ()) -> Chunking:
        """From the chunks' lengths, and what was said of the texts that have none."""
        found = sorted(lengths)
        tokens = sum(found)
        return cls(
            tokens=tokens,
            chunks=len(found),
            at_cut=len(found) / max(1, tokens),
            mean=tokens / max(1, len(found)),
            p99=found[math.ceil(0.99 * len(found)) - 1] if found else 0,
            longest=found[-1] if found else 0,
            refused=len(refused),
            why=refused[0] if refused else None,
        )

    def __str__(self) -> str:
        told = self._unusable
        if self.chunks or not told:
            told = [
                f"{self.at_cut:.1%} of the base's tokens start at a cut; a chunk has {self.mean:.2f} tokens "
                f"(99 of 100 have at most {self.p99}, the longest {self.longest})",
                *told,
            ]
        return "; ".join(told)

    @property
    def _unusable(self) -> list[str]:
        if not self.refused:
            return []
        return [f"{self.refused} text{'s' * (self.refused > 1)} cannot be used (the first: {self.why})"]

    @property
    def doubt(self) -> str | None:
        """What is to be expected of so few cuts, and of texts that cannot be used; None where all is well."""
        found = self._unusable
        if self.chunks and self.at_cut < FEW_CUTS:
            found.append(
                f"only {self.at_cut:.0%} of the base's tokens start at a cut: the models can take turns only between "
                f"chunks of {self.mean:.1f} tokens, and much of what one could give the other is out of reach; a model "
                "whose tokenizer is nearer to the base's would do more"
            )
        return "; ".join(found) or None


def chunk_lengths(codecs: Sequence[ByteCodec], cuts: Cuts, text: str) -> list[int]:
    """The base's tokens in each chunk of a text, `codecs` being those of all models, base first.

    Raises:
        CollmError: one of the tokenizers does not give the text back byte for byte, or makes too long a chunk of it.
    """
    offsets = cuts.offsets(text.encode())
    own: list[list[int]] = []
    for codec in codecs:
        ids = codec.encode(text)
        place = {end: n for n, end in enumerate([0, *codec.lengths(ids)])}
        own.append([b - a for a, b in pairwise([place[offset] for offset in offsets])])
        require_short(max(own[-1], default=0), codec.name)
    return own[0]


def chunking(codecs: Sequence[ByteCodec], cuts: Cuts, texts: Iterable[str]) -> Chunking:
    """How texts fall into chunks; those that one of the models cannot read are counted."""
    lengths: list[int] = []
    refused: list[str] = []
    for text in texts:
        try:
            lengths += chunk_lengths(codecs, cuts, text)
        except CollmError as error:
            refused.append(str(error))
    return Chunking.of(lengths, refused)


def tell_chunking(found: Chunking, names: Sequence[str], what: str = "common text") -> None:
    """Log how fine the chunks are of `what`: the shipped samples as a pair is loaded, or the user's own text.

    Warns:
        UserWarning: there are few cuts, or texts that cannot be used.
    """
    logger.info("the models have different tokenizers and write in chunks: of %s %s", what, found)
    if found.doubt is not None:
        warnings.warn(f"{', '.join(names)}: {found.doubt}", stacklevel=2)


def require_free_tools(cuts: Cuts, tools: Iterable[Tool]) -> None:
    """Tools write token by token in the base's tokens, and stop where they have no more to say. That is a chunk's end
    for certain only behind what stands alone, as digits do where no token holds two.

    Raises:
        CollmError: naming the first tool that may end with something else (`Tool.ends_in`).
    """
    for tool in tools:
        # Digits first: they are what most tools write.
        for byte in sorted(tool.ends_in, key=lambda byte: (byte not in DIGITS, not bytes([byte]).isalpha())):
            if cuts.free[byte] and cuts.allowed[:, byte].all():
                continue
            behind = next((b for b in STARTS if not cuts.allowed[byte, b]), None)
            before = next((a for a in range(256) if not cuts.allowed[a, byte]), byte)
            held = bytes([before, byte] if behind is None else [byte, behind]).decode("latin-1")
            goes_on = f"tokens of these models hold {held!r}" if byte < 0x80 else "a character may go on behind it"
            raise CollmError(
                f"{tool.name} writes token by token, and may end with {chr(byte)!r}, and {goes_on}: between "
                "models with different tokenizers a tool has to end with what stands alone; leave the tool out, take "
                "models that split digits, or let its `ends_in` say that it ends with digits alone"
            )
