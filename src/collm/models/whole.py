"""Files that are whole: those of a model, an adapter or a gate, looked at before anything is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.text import read_text

POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS put in the place of a large one."""
SHOWN = 3
"""Names in a message."""
TOKENIZERS = ("tokenizer*", "*.model", "*.tiktoken", "tekken.json", "vocab.*", "merges.txt")
"""Files that a tokenizer is read from."""
LONGEST_HEADER = 100_000_000
"""Bytes, as in the safetensors library."""
LONGEST = 240
"""Characters of a library's own words in a message."""


def one_line(error: BaseException) -> str:
    """A library's message on one line, cut where it grows into a manual; its type where there is no message."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError) or not text:
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " ..."


def some(names: Iterable[str], shown: int = SHOWN) -> str:
    """The first few of some names, and how many there are where not all are told."""
    found = sorted(names)
    return ", ".join(found[:shown]) + (f", ... ({len(found)} in all)" if len(found) > shown else "")


def refuse_pickle(name: str) -> None:
    """A folder whose only weights are pickled is refused with its own message: unpickling can run any code."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CollmError(
            f"{name} holds pickled weights ({', '.join(pickled[:3])}), which can run code when loaded and are refused; "
            "convert them to safetensors (load them where you trust them and call save_pretrained)"
        )


def require_content(path: Path) -> None:
    """Refuse what is no file that can be read, an empty one, and a pointer of Git LFS.

    Raises:
        CollmError: naming the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as error:
        raise CollmError(f"{path} cannot be read ({error.strerror or error}); fetch it again") from None
    if not start:
        raise CollmError(f"{path} is empty; fetch it again")
    if start == POINTER:
        raise CollmError(
            f"{path} is a pointer of Git LFS, not the file itself; run git lfs pull in its folder, or fetch it again"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CollmError: the file is damaged.
    """
    require_content(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CollmError(f"{path} is damaged ({one_line(error)}); fetch it again") from None
    if not isinstance(found, dict):
        raise CollmError(f"{path} is damaged (it is no JSON object); fetch it again")
    return found


def require_whole(path: Path) -> set[str]:
    """The names of the tensors in a safetensors file; reads its header alone.

    Raises:
        CollmError: it is no such file, or is cut off.
    """
    require_content(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        # Of a foreign file these bytes make some huge number.
        raw = file.read(length) if length <= min(size - 8, LONGEST_HEADER) else b""
    try:
        header = {name: entry["data_offsets"][1] for name, entry in json.loads(raw).items() if name != "__metadata__"}
        whole = 8 + length + max(header.values(), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise CollmError(f"{path} is no safetensors file, or its beginning is damaged; fetch it again") from None
    if whole != size:
        raise CollmError(f"{path} has {size:,} bytes of {whole:,}: it was cut off or damaged; fetch it again")
    return set(header)


def weight_files(folder: Path) -> list[Path]:
    """The files that a model's weights in a folder consist of, as transformers chooses them; may be empty.

    Raises:
        CollmError: the list of the files is damaged.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single] if single.is_file() else []
    told = read_object(index)
    try:
        names = sorted(set(told["weight_map"].values()))
        told["metadata"].keys()  # transformers wants them
    except (KeyError, TypeError, AttributeError) as error:
        raise CollmError(f"{index} is damaged ({one_line(error)}); fetch it again") from None
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise CollmError(
            f"{index} names {some(map(str, strange))}, which lies outside of its folder; put the files there"
        )
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise CollmError(f"{folder} lacks {some(lacking)}, which {index.name} names; fetch them")
    return [folder / name for name in names]


def require_whole_folder(folder: Path) -> set[str]:
    """The names of the tensors in a model's folder.

    Raises:
        CollmError: its weights are pickled, cut off or pointers of Git LFS, or the file that says what ends a text is
            damaged; naming the file.
    """
    refuse_pickle(str(folder))
    told_ends(folder)
    return {name for path in weight_files(folder) for name in require_whole(path)}


def told_ends(folder: Path) -> frozenset[int]:
    """The ids that end a text by a folder's generation config; transformers passes over one that it cannot read.

    Raises:
        CollmError: the file is damaged.
    """
    path = folder / "generation_config.json"
    return end_ids(read_object(path).get("eos_token_id"), str(path)) if path.is_file() else frozenset()


def end_ids(value: Any, where: str) -> frozenset[int]:
    """What a configuration says under `eos_token_id`: nothing, an id, or several.

    Raises:
        CollmError: it is anything else.
    """
    ids = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise CollmError(f"{where}: eos_token_id is {value!r}; it is a token id or a list of them: put it right there")
    return frozenset(ids)


def has_tokenizer_files(folder: Path) -> bool:
    """Is there anything that a tokenizer could be read from?"""
    return any(path.is_file() for pattern in TOKENIZERS for path in folder.glob(pattern))


def require_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are empty or pointers of Git LFS, and chat templates that are no text."""
    for pattern in ("*token*", "*.model", "vocab.*", "merges.txt", "*.jinja"):
        for path in folder.glob(pattern):
            if path.is_file():
                require_content(path)
                if pattern == "*.jinja":
                    read_text(path)
