"""Do models share a tokenizer, and if not, how fine are the chunks in which they can take turns?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from collm.cuts import FEW_CUTS, LONGEST_CHUNK, Cuts
from collm.errors import CollmError
from collm.models.codec import ByteCodec, NotItsText
from collm.models.tokenizers import difference

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
    refused: int
    """Texts that one of the tokenizers does not give back byte for byte."""

    def __str__(self) -> str:
        told = (
            f"{self.at_cut:.1%} of the base's tokens start at a cut; a chunk has {self.mean:.2f} tokens "
            f"(99 of 100 have at most {self.p99}, the longest {self.longest})"
        )
        return told + (f"; {self.refused} texts cannot be used" if self.refused else "")

    @property
    def doubt(self) -> str | None:
        """What is to be expected of so few cuts; None where there are enough."""
        if self.longest > LONGEST_CHUNK:
            return (
                f"a chunk of {self.longest} tokens is beyond the {LONGEST_CHUNK} that are read at a time: texts that "
                "hold such a one are refused; take models of one tokenizer for them"
            )
        if self.chunks and self.at_cut < FEW_CUTS:
            return (
                f"only {self.at_cut:.0%} of the base's tokens start at a cut: the models can take turns only between "
                f"chunks of {self.mean:.1f} tokens, and much of what one could give the other is out of reach; a model "
                "whose tokenizer is nearer to the base's would do more"
            )
        return None


def chunking(codecs: Sequence[ByteCodec], cuts: Cuts, texts: Iterable[str]) -> Chunking:
    """How texts fall into chunks, `codecs` being those of all models, base first."""
    lengths: list[int] = []
    starting = tokens = refused = 0
    for text in texts:
        try:
            for codec in codecs[1:]:
                codec.encode(text)
            ids = codecs[0].encode(text)
        except NotItsText:
            refused += 1
            continue
        place = {end: n for n, end in enumerate([0, *codecs[0].lengths(ids)])}
        at = [place[offset] for offset in cuts.offsets(text.encode())]
        lengths += [b - a for a, b in zip(at[:-1], at[1:], strict=True)]
        starting += len(at) - 1
        tokens += len(ids)
    lengths.sort()
    return Chunking(
        tokens=tokens,
        chunks=len(lengths),
        at_cut=starting / max(1, tokens),
        mean=tokens / max(1, len(lengths)),
        p99=lengths[math.ceil(0.99 * len(lengths)) - 1] if lengths else 0,
        longest=lengths[-1] if lengths else 0,
        refused=refused,
    )


def tell_chunking(codecs: Sequence[ByteCodec], cuts: Cuts) -> Chunking:
    """Of the shipped samples, as a pair is loaded.

    Warns:
        UserWarning: there are few cuts.
    """
    found = chunking(codecs, cuts, SAMPLES.values())
    if found.doubt is not None:
        warnings.warn(f"{', '.join(codec.name for codec in codecs)}: {found.doubt}", stacklevel=2)
    return found


def require_free_tools(cuts: Cuts, names: Sequence[str]) -> None:
    """Tools write token by token, a digit at a time: where digits are no chunks of their own, they cannot.

    Raises:
        CollmError: naming the first tool.
    """
    digits = b"0123456789"
    if names and not all(cuts.free[digit] and cuts.allowed[:, digit].all() for digit in digits):
        raise CollmError(
            f"{names[0]} writes token by token, and these models' tokens hold several digits at once: between models "
            "with different tokenizers a tool needs digits that stand alone; leave the tool out, or take models that "
            "split digits"
        )
