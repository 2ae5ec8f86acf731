"""Records of JSON lines, JSON, parquet or a folder of JSON files, whatever they hold, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from collm.errors import CollmError


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON lines, a JSON list or object, a parquet file, or a folder of one JSON file a record.

    An object is taken as its list `questions`, if it has one, else as records by id.

    Raises:
        CollmError: unreadable, or no JSON.
    """
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                name = file.relative_to(path).with_suffix("").as_posix()
                yield str(file), {"id": name, **_json(file.read_text(encoding="utf-8"), str(file))}
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".json" and (whole := _whole(path)) is not None:
            entries = whole.get("questions") if isinstance(whole, dict) else whole
            if entries is None:
                entries = [{"id": key, **value} for key, value in whole.items()]
            for number, record in enumerate(entries):
                yield f"{path}, entry {number}", record
        else:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{path}, line {number}", _json(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise CollmError(f"{path} cannot be read: {error}") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CollmError(f"{where}: not JSON ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
    except ArrowInvalid as error:
        raise CollmError(f"{path}: no parquet file ({error})") from error
    rows = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(rows):
        yield f"{path}, row {number}", record


def _whole(path: Path) -> Any:
    """The file as one JSON value; None if it holds several, one a line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise CollmError(f"{path}: not JSON ({error})") from error
