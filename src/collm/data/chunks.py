"""Examples as models with different tokenizers see them: the same completion, each in its own tokens, cut into chunks
that all share (`collm.cuts`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from collm.cuts import START, Cuts, require_short
from collm.data.encoding import EncodedSet, checked, encode_examples, left_out
from collm.data.examples import Example
from collm.data.formatting import Encoded, Formatter
from collm.data.tokens import TokenIds
from collm.errors import CollmError
from collm.models.codec import ByteCodec, NotItsText
from collm.models.pairing import Chunking


@dataclass(frozen=True)
class Chunked(Encoded):
    """`labelled` are the tokens of whole chunks: of those whose closing factor can be told, for the sequence reaches to
    where the next one opens.

    `opens[t]`: the byte before token t where a chunk (or the end) opens at it, `START` at the beginning of a turn; else
    -1. Behind the last whole chunk of a sequence that was cut off, one more place opens without being labelled.
    `base_starts`: of each whole chunk, its first token's number among the *base's* labelled tokens, in order.
    """

    opens: tuple[int, ...] = ()
    base_starts: tuple[int, ...] = ()

    @cached_property
    def starts(self) -> tuple[bool, ...]:
        return tuple(is_gold and last >= 0 for is_gold, last in zip(self.labelled, self.opens, strict=True))

    @property
    def scored(self) -> tuple[bool, ...]:
        """Tokens behind whose prefix a law is wanted."""
        return tuple(is_gold or last >= 0 for is_gold, last in zip(self.labelled, self.opens, strict=True))

    @property
    def spans(self) -> list[tuple[int, int | None]]:
        """Of each whole chunk: its first token, and where the next one opens; None for the end of a text."""
        places = [t for t, last in enumerate(self.opens) if last >= 0]
        nexts = [None if t is None or self.opens[t] == START else t for t in (*places[1:], None)]
        return [(t, stop) for t, stop in zip(places, nexts, strict=True) if self.labelled[t]]

    def first(self, count: int) -> Chunked:
        """The same with no more than `count` chunks labelled."""
        if count >= self.num_starts:
            return self
        where = [t for t, start in enumerate(self.starts) if start]
        end = where[count]
        labelled = (*self.labelled[:end], *[False] * (len(self) - end))
        opens = (*self.opens[: end + 1], *[-1] * (len(self) - end - 1))
        return Chunked(self.token_ids, labelled, self.truncated_tokens, self.rewritten, opens, self.base_starts[:count])


@dataclass(frozen=True)
class Reader:
    """One model of a system that shares chunks. `base`: None for the base itself; its template settles what is said."""

    formatter: Formatter
    codec: ByteCodec
    base: Reader | None = None

    @property
    def cuts(self) -> Cuts:
        assert self.codec.cuts is not None
        return self.codec.cuts

    def read(self, example: Example, max_length: int | None = None) -> Chunked:
        """The example in this model's tokens, cut from the right to `max_length` of them.

        Raises:
            CollmError: there is nothing to learn from, a tokenizer does not keep the text, or a chunk is too long.
        """
        spoken = (self.base or self).formatter.completions(example)
        said = [(self.base or self)._said(turn, example) for turn in spoken]
        own: list[TokenIds] = list(spoken)
        if self.base is not None:
            last = [turn[-1] for turn in self.formatter.completions(example)][-len(said) :]
            if len(last) < len(said):
                raise CollmError(
                    f"{example.label}: the chat template of {self.codec.name} rewrites earlier turns, that of the base "
                    "does not: only last turns can be learnt together: set last_turn: true in the recipe's data "
                    "(--last-turn)"
                )
            own = [(*self._encoded(data, example), end) for data, end in zip(said, last, strict=True)]
        whole = self.formatter.encode(example, None, own)
        opens = [-1] * len(whole)
        starts: list[int] = []
        base_starts: list[int] = []
        labelled_before = 0
        at = iter(_turns(whole.labelled))
        for data, turn, theirs in zip(said, own, spoken, strict=True):
            begin = next(at)
            offsets = self.cuts.offsets(data)
            mine, bases = self._places(turn, offsets), (self.base or self)._places(theirs, offsets)
            for offset, place, base_place in zip(offsets, mine, bases, strict=True):
                opens[begin + place] = data[offset - 1] if offset else START
                starts.append(begin + place)
                base_starts.append(labelled_before + base_place)
            longest = max((b - a for a, b in pairwise(mine)), default=0)
            try:
                require_short(longest, self.codec.name, advice="leave the row out (--skip-bad)")
            except CollmError as error:
                raise CollmError(f"{example.label}: {error}") from None
            labelled_before += len(theirs)
        end = len(whole) if max_length is None else min(max_length, len(whole))
        return _cut(whole, opens, starts, base_starts, end)

    def _said(self, turn: TokenIds, example: Example) -> bytes:
        """The bytes of a turn of the base, which ends with its end token."""
        if (special := next((v for v in turn[:-1] if not self.codec.is_text(v)), None)) is not None:
            raise NotItsText(
                f"{example.label}: {self.formatter.tokenizer.convert_ids_to_tokens(special)!r} stands within what is "
                "to be learnt, and is no text to the other models: leave the row out"
            )
        return self.codec.data(turn[:-1])

    def _encoded(self, data: bytes, example: Example) -> list[int]:
        try:
            return self.codec.encode(data.decode())
        except UnicodeDecodeError as error:
            raise NotItsText(f"{example.label}: what is to be learnt is no UTF-8 text ({error.reason})") from error
        except NotItsText as error:
            raise NotItsText(f"{example.label}: {error}") from error

    def _places(self, turn: TokenIds, offsets: Sequence[int]) -> list[int]:
        """The token of a turn that begins at each offset; at the last one, its end."""
        place = {end: n for n, end in enumerate([0, *self.codec.lengths(turn[:-1])])}
        return [place[offset] for offset in offsets]


def _turns(labelled: Sequence[bool]) -> list[int]:
    """Where each labelled turn begins."""
    return [t for t, is_gold in enumerate(labelled) if is_gold and not labelled[t - 1]]


def _cut(whole: Encoded, opens: list[int], starts: list[int], base_starts: list[int], end: int) -> Chunked:
    """What is left of the first `end` tokens. A turn's last start is its end token, a chunk of its own."""
    labelled = list(whole.labelled)
    count = 0
    for start, following in zip(starts, (*starts[1:], None), strict=True):
        # What ends a turn needs no more than itself.
        reach = start if following is None or opens[following] == START else following
        if reach >= end:
            break
        count += 1
    if count < len(starts):
        stop = starts[count]
        labelled[stop:] = [False] * (len(labelled) - stop)
        opens = [*opens[: stop + 1], *[-1] * (len(opens) - stop - 1)]
    return Chunked(
        whole.token_ids[:end],
        tuple(labelled[:end]),
        len(whole) - end,
        whole.rewritten,
        tuple(opens[:end]),
        tuple(base_starts[:count]),
    )


def chunking_of(items: Iterable[Encoded], refused: Sequence[str] = ()) -> Chunking:
    """How texts fall into chunks, in the base's tokens, whoever has read them. Ends, which are chunks of a token, and a
    last chunk of which the end was cut off do not count.

    Args:
        refused: what was said of examples that could not be read.
    """
    lengths: list[int] = []
    for item in items:
        assert isinstance(item, Chunked)
        known = zip(item.spans, pairwise(item.base_starts), strict=False)
        lengths += [following - start for (_, stop), (start, following) in known if stop is not None]
    return Chunking.of(lengths, refused)


def chunking_for(examples: Iterable[Example], readers: Sequence[Reader]) -> Chunking:
    """How examples fall into chunks that all these models (base first) can learn. Those that one of them cannot read,
    which training with these formats would refuse, are counted."""
    read: list[Chunked] = []
    refused: list[str] = []
    for example in examples:
        try:
            read.append([reader.read(example) for reader in readers][0])
        except CollmError as error:
            refused.append(str(error))
    return chunking_of(read, refused)


def read_examples(examples: Sequence[Example], reader: Reader, *, max_length: int | None = None) -> EncodedSet:
    """`encode_examples` in chunks: the items are `Chunked`."""
    return checked(EncodedSet(tuple(reader.read(example, max_length) for example in examples)), max_length)


def encode(
    examples: Sequence[Example],
    formatter: Formatter,
    reader: Reader | None,
    *,
    max_length: int | None = None,
    completions_from: Formatter | None = None,
) -> EncodedSet:
    """`encode_examples`, or in chunks by a reader where models share them."""
    if reader is not None:
        return read_examples(examples, reader, max_length=max_length)
    return encode_examples(examples, formatter, max_length=max_length, completions_from=completions_from)


def usable_in_chunks(examples: Sequence[Example], readers: Sequence[Reader], *, skip_bad: bool) -> list[Example]:
    """`usable`, for models that share chunks."""
    return left_out(examples, [reader.read for reader in readers], skip_bad=skip_bad)
