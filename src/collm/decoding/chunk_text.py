"""A text of models that have different tokenizers: bytes for all, token ids for each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from collm.cuts import START, Codec, Cuts
from collm.views import Text, View


class Mark(NamedTuple):
    """A place in a `ChunkText`: of each view its length and shift, and how many chunks it holds."""

    chunks: int
    length: int
    views: tuple[tuple[int, int], ...]
    read: tuple[int, ...]


class ChunkText(Text):
    """A `Text` that is written chunk by chunk (`collm.cuts`), of which every model's view holds its own tokens.

    A view is brought up to date when its model is asked (`read`). Encoding is local to a chunk, so a view only grows;
    it is rewound where a model has written a chunk in other tokens than it would read it in. `length` counts the base's
    tokens.

    Args:
        limits: tokens that each model can read, prompt included; None: no bound.
    """

    __slots__ = ("_read", "_start", "chunks", "codecs", "cuts", "limits")

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        codecs: Sequence[Codec],
        cuts: Cuts,
        limits: Sequence[int | None] | None = None,
    ) -> None:
        super().__init__(prompts)
        assert len(codecs) == len(self.views)
        self.codecs, self.cuts = tuple(codecs), cuts
        self.limits = (None,) * len(codecs) if limits is None else tuple(limits)
        self.chunks: list[bytes] = []
        self._read = [0] * len(codecs)
        """Chunks that each view holds."""
        self._start = 0
        """Where the chunk in the making begins in its author's view."""

    def longest(self, max_tokens: int) -> tuple[int, ...]:
        """An assistant may need more tokens than the base for the same text: twice as many are reckoned with."""
        return tuple(
            min(len(view) + (2 if model else 1) * max_tokens - 1, limit or sys.maxsize)
            for model, (view, limit) in enumerate(zip(self.views, self.limits, strict=True))
        )

    def append(self, token_id: int) -> None:
        raise AssertionError("a text of chunks is written by one of its models")

    def rewind(self, length: int) -> None:
        raise AssertionError("chunks are not taken back")

    @property
    def last_byte(self) -> int:
        """The last one of the completion, `START` if there is none."""
        return self.chunks[-1][-1] if self.chunks else START

    def read(self, model: int) -> View:
        """The view of a model, up to date.

        Raises:
            CollmError: its tokenizer has no tokens for what was written.
        """
        view, codec = self.views[model], self.codecs[model]
        for chunk in self.chunks[self._read[model] :]:
            view.token_ids += codec.chunk_ids(chunk)
            self._read[model] += 1
        return view

    def unread(self, model: int, chunks: int, length: int) -> None:
        """Take back what a view has read behind its first `chunks`, so many tokens."""
        self.views[model].rewind(length)
        self._read[model] = chunks

    def begin(self, model: int) -> None:
        """A model begins a chunk."""
        self._start = len(self.read(model))

    def write(self, model: int, token_id: int) -> None:
        self.views[model].token_ids.append(token_id)

    def written(self, model: int) -> tuple[int, ...]:
        """What it has written of its chunk."""
        return tuple(self.views[model].token_ids[self._start :])

    def undo(self, model: int) -> None:
        """Take that back."""
        self._replace(self.views[model], self._start, ())

    def mark(self) -> Mark:
        """Where it stands, to come `back` to."""
        views = tuple((len(view), view.shift) for view in self.views)
        return Mark(len(self.chunks), self.length, views, tuple(self._read))

    def back(self, mark: Mark) -> None:
        """Take back all that was written and read since, as if it had never been: the same random numbers are drawn."""
        del self.chunks[mark.chunks :]
        self.length, self._read = mark.length, list(mark.read)
        for view, (length, shift) in zip(self.views, mark.views, strict=True):
            view.rewind(length)
            view.shift = shift

    def close(self, model: int, chunk: bytes) -> bool:
        """The chunk is written. Whether it stands in the model's view as it was written, so that what was asked behind
        it still holds."""
        own, canonical = self.written(model), self.codecs[model].canonical(chunk)
        self.chunks.append(chunk)
        self._read[model] = len(self.chunks)
        if canonical is None or canonical == own:
            return True
        same = len(os.path.commonprefix([own, canonical]))
        self._replace(self.views[model], self._start + same, canonical[same:])
        return False

    @staticmethod
    def _replace(view: View, start: int, token_ids: Sequence[int]) -> None:
        view.shift += len(view) - start
        view.rewind(start)
        view.token_ids += token_ids
