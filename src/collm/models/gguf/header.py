"""The head of a GGUF file: what its metadata say and where its tensors lie, without torch and in a tenth of a second.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from collm.errors import CollmError

VERSIONS = (2, 3)
ALIGNMENT = 32
"""Where `general.alignment` is not given."""
LFS = b"version https://git-lfs"

STRING, ARRAY = 8, 9
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""How struct writes each type of value that has a fixed size."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    """The first moves fastest, as GGUF counts; torch counts the other way round."""
    type: int
    offset: int
    """In bytes, from where the tensors begin."""


@dataclass(frozen=True, slots=True)
class Header:
    path: Path
    metadata: dict[str, Any]
    """By key. Of arrays only the length, as an int: vocabularies are read where they are needed."""
    tensors: tuple[Tensor, ...]
    begin: int
    """Where the tensors begin, in bytes."""

    @property
    def pre_tokenizer(self) -> str | None:
        """What splits text before BPE (`tokenizer.ggml.pre`); None for other kinds of tokenizers.

        A BPE tokenizer without that entry has "", which nothing is known about.
        """
        if self.metadata.get("tokenizer.ggml.model") != "gpt2":
            return None
        return str(self.metadata.get("tokenizer.ggml.pre", ""))

    @property
    def num_values(self) -> int:
        """Weights in the file."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


class Cut(Exception):
    """The file ends before what it announces."""


class Reader:
    """Walks through a file; nothing that a damaged file announces is believed before it is there."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> int:
        """Step over so many bytes; where they begin."""
        start = self.at
        if size < 0 or start + size > len(self.data):
            raise Cut
        self.at = start + size
        return start

    def number(self, form: str) -> Any:
        start = self.take(struct.calcsize("<" + form))
        return struct.unpack_from("<" + form, self.data, start)[0]

    def string(self) -> str:
        size = self.number("Q")
        start = self.take(size)
        return self.data[start : start + size].decode("utf-8")

    def entries(self, count: int) -> Iterator[tuple[str, Any]]:
        """Metadata, by key."""
        for _ in range(count):
            key = self.string()
            yield key, self.value(self.number("I"))

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in NUMBERS:
            self.take(count * struct.calcsize("<" + NUMBERS[inner]))
        elif inner == STRING:
            unpack, data, size, at = struct.Struct("<Q").unpack_from, self.data, len(self.data), self.at
            for _ in range(count):
                if at + 8 > size:
                    raise Cut
                at += 8 + unpack(data, at)[0]
            self.at = at
            self.take(0)
        else:
            raise ValueError(f"an array of the unknown type {inner}")
        return count


def read_header(path: Path) -> Header:
    """The head of a GGUF file that is there whole.

    Raises:
        CollmError: no GGUF file, a damaged one, one that ends too early, or one part of several.
    """
    try:
        stat = path.stat()
    except OSError:
        raise CollmError(f"{path}: there is no such GGUF file") from None
    return _read_header(path, stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=8)
def _read_header(path: Path, size: int, _looks: tuple[int, ...]) -> Header:
    with path.open("rb") as file:
        start = file.read(len(LFS))
        if start == LFS:
            raise CollmError(f"{path} is a Git LFS pointer, not the file itself; fetch it with git lfs pull")
        if start[:4] != b"GGUF":
            raise CollmError(f"{path} is no GGUF file: it does not begin with GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header, end = _parse(path, Reader(data))
                missing = end - size
            except Cut:
                missing = 1
            except (ValueError, struct.error) as error:
                raise CollmError(f"{path} is damaged: its head holds {error}; fetch it again") from None
    if missing > 0:
        raise CollmError(f"{path} is cut off: it has {size:,} bytes and announces more; fetch it again")
    parts = header.metadata.get("split.count", 1)
    if parts > 1:
        raise CollmError(
            f"{path} is one part of {parts}; join them into one file first (llama-gguf-split --merge FIRST OUT)"
        )
    if "general.architecture" not in header.metadata:
        raise CollmError(f"{path} does not say what model it holds (general.architecture)")
    return header


def _parse(path: Path, reader: Reader) -> tuple[Header, int]:
    """The header, and how long the file must be."""
    reader.take(4)
    version = reader.number("I")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version}, of which {' and '.join(map(str, VERSIONS))} can be read")
    num_tensors, num_entries = reader.number("Q"), reader.number("Q")
    metadata = dict(reader.entries(num_entries))
    tensors = []
    for _ in range(num_tensors):
        name = reader.string()
        shape = tuple(reader.number("Q") for _ in range(reader.number("I")))
        tensors.append(Tensor(name, shape, reader.number("I"), reader.number("Q")))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    begin = -(-reader.at // alignment) * alignment
    size_of = _sizes()
    end = max((begin + tensor.offset + size_of(tensor) for tensor in tensors), default=begin)
    return Header(path, metadata, tuple(tensors), begin), end


def _sizes() -> Callable[[Tensor], int]:
    """How many bytes a tensor takes; 0 for types that the package gguf does not know."""
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}

    def size_of(tensor: Tensor) -> int:
        values, size = sizes.get(tensor.type, (1, 0))
        return prod(tensor.shape) // values * size

    return size_of
