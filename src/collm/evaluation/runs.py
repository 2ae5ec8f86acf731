"""Files of runs that are stopped and go on: a header with the run's settings, then one trace a line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.report.trace import HEADER_KEY, Trace, append_json, drop_torn_line, read_rows, read_traces, stream_traces

HEADER_VERSION = 1


def traces_so_far(path: Path, settings: Mapping[str, Any]) -> dict[str, Trace]:
    """By id, the traces of an earlier start of this very run; begins the file where there is none, or nothing in it.

    Raises:
        CollmError: the file holds a run with other settings, or no run.
    """
    if path.suffix == ".json":
        raise CollmError(f"{path}: traces are written as .jsonl; the figures go to the .json beside it")
    header = {HEADER_KEY: HEADER_VERSION, "settings": dict(settings)}
    if path.exists():
        drop_torn_line(path)
    if path.exists() and path.stat().st_size:
        _, found = next(read_rows(path))
        if HEADER_KEY not in found:
            raise CollmError(f"{path} exists and was not written by an evaluation; give another output file")
        what = differences(found.get("settings", {}), settings)
        if not what and found[HEADER_KEY] == HEADER_VERSION:
            return {trace.id: trace for trace in read_traces(path)}
        if next(stream_traces(path), None) is not None:
            raise CollmError(
                f"{path} holds a run with other settings ({what or 'another format'}): "
                "give another output file, or delete it to start afresh"
            )
        path.unlink()  # it failed before its first answer, at a setting that has been put right since
    path.parent.mkdir(parents=True, exist_ok=True)
    append_json(path, [header])
    return {}


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words, where the settings of an earlier run differ from those of this one; empty if nowhere."""
    differing = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return "; ".join(f"{key}: {there.get(key)!r} there, {now.get(key)!r} now" for key in differing)
