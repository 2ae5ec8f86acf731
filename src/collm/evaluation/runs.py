"""Files of runs that are stopped and go on: a header with the run's settings, then one trace a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.evaluation.result import is_result, result_path
from collm.files import claimed, require_apart, require_own, write_text
from collm.identity.comparing import differences
from collm.report.trace import (
    HEADER_KEY,
    Trace,
    append_json,
    drop_torn_line,
    read_rows,
    read_traces,
    stream_traces,
    trace_to_dict,
)

HEADER_VERSION = 2
"""2: the settings tell all that decides an answer."""
Keep = Callable[[Trace], None]


def require_free(out: Path, data: Iterable[str | Path] = ()) -> None:
    """Refuse a trace file (and the result beside it) that would replace something else.

    Args:
        data: what the run reads.

    Raises:
        CollmError: naming the file that is in the way.
    """
    if out.suffix == ".json":
        raise CollmError(f"{out}: traces are written as .jsonl; the figures go to the .json beside it")
    for path in (out, result_path(out)):
        require_apart(path, data)
    require_own(out, lambda path: _is_run(path) or _is_begun(path), "an evaluation")
    require_own(result_path(out), is_result, "an evaluation")


@contextmanager
def kept(path: Path | None, settings: Mapping[str, Any]) -> Iterator[tuple[dict[str, Trace], Keep]]:
    """By id, the traces of an earlier start of this very run, and what keeps another one: safe when it returns.

    Begins the file where there is none, or nothing in it. It is this process's for the length of the block.

    Args:
        path: None keeps them in memory alone.

    Raises:
        CollmError: the file holds a run with other settings, or no run, or another process writes it.
    """
    if path is None:
        done: dict[str, Trace] = {}
        yield done, lambda trace: done.update({trace.id: trace})
        return
    with claimed(path):
        done = _begin(path, settings)

        def keep(trace: Trace) -> None:
            append_json(path, [trace_to_dict(trace)])
            done[trace.id] = trace

        yield done, keep


def _begin(path: Path, settings: Mapping[str, Any]) -> dict[str, Trace]:
    header = {HEADER_KEY: HEADER_VERSION, "settings": dict(settings)}
    if path.exists() and not _is_begun(path):
        if not _is_run(path):
            raise CollmError(f"{path} exists and was not written by an evaluation; give another output file")
        drop_torn_line(path)
        _, found = next(read_rows(path))
        what = differences(found.get("settings", {}), settings)
        if not what and found[HEADER_KEY] == HEADER_VERSION:
            return {trace.id: trace for trace in read_traces(path)}
        if next(stream_traces(path), None) is not None:
            if found[HEADER_KEY] != HEADER_VERSION:
                raise CollmError(
                    f"{path} was begun by {'an older' if found[HEADER_KEY] == 1 else 'a newer'} collm, which noted "
                    "otherwise what decides an answer, so that nobody can say whether this is the same system: run the "
                    "same command with another output file, or delete this one to answer anew"
                )
            raise CollmError(
                f"{path} holds a run with other settings ({what}): "
                "give another output file, or delete it to start afresh"
            )
        # Else it failed before its first answer, at a setting that has been put right since.
    write_text(path, json.dumps(header, ensure_ascii=False, allow_nan=False) + "\n")
    return {}


def _is_run(path: Path) -> bool:
    """Does a file begin with the header of a run?"""
    try:
        with path.open("rb") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(first, dict) and HEADER_KEY in first


def _is_begun(path: Path) -> bool:
    """Is there nothing, or no more than the beginning of a header, of a run that was killed at its first line?"""
    begin = f'{{"{HEADER_KEY}": '.encode()
    try:
        with path.open("rb") as file:
            line = file.readline()
    except OSError:
        return False
    return not line.endswith(b"\n") and begin.startswith(line[: len(begin)])
