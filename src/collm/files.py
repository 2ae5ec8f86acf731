"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from collm.errors import CollmError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well; makes the folder if it is missing.

    Raises:
        CollmError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CollmError(f"could not write {path}: {error}") from error


def refuse_full(folder: Path) -> None:
    """A folder that shall be made must not be there yet, or be empty.

    Raises:
        CollmError: it holds something, or a file lies there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CollmError(f"{folder} is not empty; choose another folder")


def cache_folder() -> Path:
    """What can be made again lies here: `$COLLM_CACHE`, else `collm` in the user's folder for caches."""
    given = os.environ.get("COLLM_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "collm"


def write_text(path: Path, text: str) -> None:
    """Write so that a reader never sees half a file."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
