"""The metadata of a GGUF file in the form in which transformers reads them, vocabularies at one blow.

transformers takes them from gguf's `GGUFReader`, which makes a view of the file for each entry of each array, by some
thirty calls, and does so three times on the way to a tokenizer: minutes for a vocabulary of 262,144 (Gemma).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from collm.models.gguf.header import ARRAY, NUMBERS, STRING, Cut, Reader, read_header


class Field(NamedTuple):
    """As `gguf.ReaderField`: the values are `parts[i]` for i in `data`, a number in a tuple, a string as bytes."""

    parts: Sequence[tuple[Any, ...] | bytes]
    data: Sequence[int]
    types: Sequence[int]
    """The value's, and behind `ARRAY` its entries'."""


class _Fields(Reader):
    def value(self, kind: int) -> Field:
        if kind != ARRAY:
            return Field([self._bytes()] if kind == STRING else [(super().value(kind),)], [0], [kind])
        inner, count = self.number("I"), self.number("Q")
        parts: list[tuple[Any, ...] | bytes]
        if inner in NUMBERS:
            form = struct.Struct("<" + NUMBERS[inner])
            start = self.take(count * form.size)
            parts = list(form.iter_unpack(self.data[start : self.at]))
        elif inner == STRING:
            parts = self._strings(count)
        else:
            raise ValueError(f"an array of the unknown type {inner}")
        return Field(parts, range(len(parts)), [ARRAY, inner])

    def _bytes(self) -> bytes:
        size = self.number("Q")
        start = self.take(size)
        return self.data[start : self.at]

    def _strings(self, count: int) -> list[tuple[Any, ...] | bytes]:
        unpack, data, end, at = struct.Struct("<Q").unpack_from, self.data, len(self.data), self.at
        parts: list[tuple[Any, ...] | bytes] = []
        for _ in range(count):
            if at + 8 > end:
                raise Cut
            start = at + 8
            at = start + unpack(data, at)[0]
            parts.append(data[start:at])
        self.at = at
        self.take(0)
        return parts


class Fields:
    """What transformers needs of a `gguf.GGUFReader` if it reads no weights: `fields` by key, `tensors` with names.

    Raises:
        CollmError: see `read_header`.
    """

    def __init__(self, path: str | Path) -> None:
        self.tensors = read_header(Path(path)).tensors
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Fields(data)
            reader.take(16)  # what it is, its version, how many tensors
            self.fields: dict[str, Field] = dict(reader.entries(reader.number("Q")))
