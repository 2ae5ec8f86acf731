"""What was made of a GGUF file, kept by the hash of the file: made by one process, read by all.

`$COLLM_CACHE/gguf/HASH/PART/`, and `kept.json` in each part. A part appears whole (it is renamed) and is made anew
where its files have other sizes or another version of transformers made them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from collm.errors import CollmError
from collm.files import cache_folder, write_text
from collm.models.gguf.header import Header
from collm.signs import sign

logger = logging.getLogger(__name__)

FORMAT = 2
"""Rises where the same file is converted to something else. 2: with all that it says of its angles and biases."""
NOTE = "kept.json"
SPARE = 256 * 2**20
"""Bytes of the disk that stay free."""

Write = Callable[[Path], None]


def kept(header: Header, part: str, write: Write | None = None, size: int = 0) -> Path | None:
    """The folder of a part. One that is not there is made by `write`; None without it, or where it cannot be kept.

    Args:
        header: of the file.
        part: its name, such as `float32`.
        write: fills a folder, which is empty.
        size: bytes that it will take, for the disk's sake.
    """
    try:
        place = cache_folder() / "gguf" / _hash(header.path)
        if _whole(place / part):
            return place / part
        if write is None:
            return None
        place.mkdir(parents=True, exist_ok=True)
        with _locked(place / f".{part}.lock", header):
            if not _whole(place / part):
                free = shutil.disk_usage(place).free
                if free < size + SPARE:
                    raise OSError(f"it takes {size / 2**30:.1f} GiB, and {place} has {free / 2**30:.1f} GiB left")
                _make(place, part, write, header)
    except OSError as error:
        logger.warning(
            "%s: cannot be kept for later starts (%s); COLLM_CACHE names another folder", header.path.name, error
        )
        return None
    return place / part


def _make(place: Path, part: str, write: Write, header: Header) -> None:
    with tempfile.TemporaryDirectory(dir=place, prefix=".making-") as temporary:
        fresh, old = Path(temporary) / "fresh", Path(temporary) / "old"
        fresh.mkdir()
        write(fresh)
        sizes = {file.relative_to(fresh).as_posix(): file.stat().st_size for file in _files(fresh)}
        note = {"format": FORMAT, "source": header.path.name, "made_by": _makers(), "files": sizes}
        (fresh / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
        if (place / part).exists():
            (place / part).rename(old)
        fresh.rename(place / part)


def _whole(folder: Path) -> bool:
    """Is the part there, with all its files, as this version makes them?"""
    try:
        note: dict[str, Any] = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return (
            note["format"] == FORMAT
            and note["made_by"] == _makers()
            and all((folder / name).stat().st_size == size for name, size in note["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _makers() -> dict[str, str]:
    """Whose versions settle what comes out of a file."""
    found = {}
    for package in ("transformers", "tokenizers", "gguf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


class _locked:
    """One process at a time; who waits is told."""

    def __init__(self, path: Path, header: Header) -> None:
        self.lock, self.header = FileLock(path), header

    def __enter__(self) -> None:
        try:
            self.lock.acquire(timeout=1)
        except Timeout:
            sign(f"{self.header.path.name}: another process is converting it; waiting")
            self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def _hash(path: Path) -> str:
    """SHA-256 of a file. It is noted for the file's name, size and time: a large file takes a minute to read."""
    path = path.resolve()
    stat = path.stat()
    # Size and time are not enough: `cp -p` keeps both, and makes another file, changed now.
    now = [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    note = cache_folder() / "gguf" / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        *noted, digest = json.loads(note.read_text(encoding="utf-8"))
        if noted == now and isinstance(digest, str):
            return digest
    except (OSError, ValueError):
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    with suppress(CollmError):  # Only saves time.
        write_text(note, json.dumps([*now, digest]))
    return digest
