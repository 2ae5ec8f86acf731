"""Outputs: files that are there whole or not at all, written by one process at a time, and never over somebody else's.

A lock is a hidden file beside an output (`.NAME.lock`), or in its folder (`.lock`), that says who holds it. It is the
operating system's: it ends with the process, also by kill -9; the empty file stays.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import shlex
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from collm.errors import CollmError

logger = logging.getLogger(__name__)

TEMPORARY = ".tmp"
"""Within a folder that is being made."""
STALE = 24 * 3600.0
"""Seconds after which the half-written file of a killed process is swept away."""

FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a system says where there is no more room."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well; makes the folder if it is missing.

    Raises:
        CollmError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        remedy = "; make room and run the same again" if error.errno in FULL else ""
        raise CollmError(f"{path}: cannot be written ({error.strerror or error}){remedy}") from None


def _sweep(path: Path) -> None:
    """Remove what a process that was killed while it wrote `path` has left."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(FileNotFoundError):  # another process has just finished
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink()


def refuse_full(folder: Path) -> None:
    """A folder that shall be made must not be there yet, or be empty but for what a killed `whole_folder` left.

    Raises:
        CollmError: it holds something, or a file lies there.
    """
    if folder.exists() and (not folder.is_dir() or any(path.name != TEMPORARY for path in folder.iterdir())):
        raise CollmError(f"{folder} is not empty; choose another folder")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, which is not there or empty, when the block ends well: beside it, or
    within one that is there, which may be a mounted disk.

    Raises:
        CollmError: it cannot be written.
    """
    within = target.is_dir()
    temporary = target / TEMPORARY if within else target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if within:
            for path in temporary.iterdir():
                path.rename(target / path.name)
        else:
            temporary.rename(target)
    except OSError as error:
        raise CollmError(f"could not write {target}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_place(path: Path, *, folder: bool | None = None) -> None:
    """Can this be written, so far as the folders above it tell? Asked before hours of work.

    Args:
        folder: whether a folder is to lie there, or a file; None: either.

    Raises:
        CollmError: a file lies where a folder must, or the other way round, or the place is read-only.
    """
    if folder is not None and path.exists() and path.is_dir() != folder:
        is_there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise CollmError(f"{path} is a {is_there}, where a {wanted} is wanted")
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if there != path and not there.is_dir():
        raise CollmError(f"{path} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK):
        raise CollmError(f"{path} cannot be written: {there} is read-only")


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


def beside(path: str | Path, ending: str, *, instead_of: str | tuple[str, ...] = ".jsonl") -> Path:
    """The file that goes with `path`: its ending replaced where it is `instead_of`, else `ending` put behind its name.

    What else stands behind a dot is a part of the name: `model-0.1` goes with `model-0.1.json`.
    """
    path = Path(path)
    endings = (instead_of,) if isinstance(instead_of, str) else instead_of
    for old in endings:
        if path.name.endswith(old) and path.name != old:
            return path.with_name(path.name.removesuffix(old) + ending)
    return path.with_name(path.name + ending)


def require_apart(out: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that would replace what is read.

    Raises:
        CollmError: naming the file.
    """
    out = Path(out)
    for path in map(Path, inputs):
        if out.resolve() == path.resolve() or (out.exists() and path.exists() and out.samefile(path)):
            raise CollmError(f"{out} is read by this command and would be replaced by its output: give another file")


def require_own(path: Path, own: Callable[[Path], bool], what: str) -> None:
    """Refuse to replace a file that is not an earlier state of the output.

    Args:
        own: whether an existing file is one of ours.
        what: what writes such files, for the message.

    Raises:
        CollmError: naming the file.
    """
    if path.exists() and not own(path):
        raise CollmError(f"{path} exists and was not written by {what}: give another output, or move it away")


_held: dict[Path, int] = {}
"""Locks of this process, and the threads that hold them."""
_guard = threading.Lock()


@contextmanager
def claimed(path: str | Path, *, folder: bool = False, wait: bool = False) -> Iterator[None]:
    """For the length of the block, `path` is this thread's alone, among all processes; what it holds already is fine.

    Args:
        folder: the output is a folder, made if it is missing; the lock lies in it.
        wait: until the other process has finished, instead of refusing.

    Raises:
        CollmError: another process (or thread) writes it; the message names it.
    """
    path = Path(path)
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CollmError(f"could not write {path}: {error}") from None
    lock = home.resolve() / (".lock" if folder else f".{path.name}.lock")
    with _guard:
        mine = _held.get(lock) == threading.get_ident()
    if mine:
        yield
        return
    held = _acquired(path, lock, wait)
    try:
        with _guard:
            _held[lock] = threading.get_ident()
        with suppress(OSError):  # some systems do not let a locked file be written: then it bears no name
            lock.write_text(_signature(), encoding="utf-8")
        yield
    finally:
        with _guard:
            _held.pop(lock, None)
        with suppress(OSError):  # whoever is refused next must not be told an old name
            os.truncate(lock, 0)
        held.release()


def _acquired(path: Path, lock: Path, wait: bool) -> BaseFileLock:
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise CollmError(
                f"{path} is being written by {_owner(lock)}: wait until it has finished, stop it, or give another "
                "output"
            ) from None
        logger.info("waiting for %s to finish with %s", _owner(lock), path)
        held.acquire()
    except OSError as error:
        raise CollmError(f"could not write {path}: {error}") from None
    return held


def _signature() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M")
    return f"{command[:300]} (process {os.getpid()} on {socket.gethostname()}, since {since})"


def _owner(lock: Path) -> str:
    try:
        told = lock.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        told = ""
    return told or "another process"
