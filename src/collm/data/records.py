"""Records of JSON lines, JSON, parquet or a folder of JSON files, whatever they hold, each with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.text import decoded

LISTS = (".json",)
"""Files that may be one list, of rows or records, over any number of lines."""
SHOWN = ("messages", "tools")
"""Columns of which models are shown all that they hold."""


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, record) of JSON lines, a JSON list or object, a parquet file, or a folder of one JSON file a record.

    An object is taken as its list `questions`, if it has one, else as records by id, or as the only record.

    Raises:
        CollmError: unreadable, or no JSON.
    """
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                name = file.relative_to(path).with_suffix("").as_posix()
                yield str(file), {"id": name, **parsed(file.read_bytes(), str(file))}
        elif path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix in LISTS and (whole := _whole(path)) is not None:
            entries = whole.get("questions") if isinstance(whole, dict) else whole
            if entries is None:
                by_id = all(isinstance(value, dict) for value in whole.values())
                entries = [{"id": key, **value} for key, value in whole.items()] if by_id else [whole]
            for number, record in enumerate(entries):
                yield f"{path}, entry {number}", record
        else:
            for where, record in json_lines(path):
                if isinstance(record, CollmError):
                    raise record
                yield where, record
    except (OSError, TypeError) as error:
        raise CollmError(f"{path} cannot be read: {error}") from None


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, row) of JSON lines, or of a `.json` file that is one list of rows or a single row, over several lines.

    A line that is no JSON yields the error to raise in its row's place, so that it can be skipped.

    Raises:
        CollmError: the file cannot be read.
    """
    try:
        whole = _whole(path) if path.suffix in LISTS else None
    except CollmError:
        whole = None  # told line by line
    except OSError as error:
        raise CollmError(f"{path}: cannot be read: {error.strerror}") from None
    if isinstance(whole, list):
        for number, row in enumerate(whole):
            yield f"{path}, entry {number}", row
    elif whole is not None:
        yield f"{path}, line 1", whole
    else:
        yield from json_lines(path)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) for each line that is not blank; of one that is no JSON, the error. Lines end at "\\n" alone: JSON
    leaves U+2028 and its like as they are.

    Raises:
        CollmError: the file cannot be read.
    """
    try:
        lines = path.open("rb")
    except OSError as error:
        raise CollmError(f"{path}: cannot be read: {error.strerror}") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, parsed(line, where)
            except CollmError as error:
                hint = "; one list of rows over several lines is read from a .json file" if line[:1] == b"[" else ""
                yield where, CollmError(f"{error}{hint}")


def parsed(data: bytes, where: str) -> Any:
    """A JSON value of UTF-8 bytes, with or without a byte order mark.

    Raises:
        CollmError: naming `where`: no UTF-8, no JSON, an object that has a key twice (one of the values would be
            lost), or JSON that Python does not read (numbers of thousands of digits, values nested thousands deep).
    """
    try:
        text = decoded(data, where)
    except CollmError as error:
        raise CollmError(f"{where}: not JSON, which is UTF-8 ({str(error).removeprefix(f'{where}: ')})") from None
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _Twice as error:
        raise CollmError(f"{where}: an object has the key {error.args[0]!r} twice: leave one of them") from None
    except RecursionError:
        raise CollmError(f"{where}: not readable: values are nested too deep") from None
    except ValueError as error:
        # Python's words for an integer of thousands of digits are advice to programmers.
        told = error if isinstance(error, json.JSONDecodeError) else "an integer of more than 4,300 digits"
        raise CollmError(f"{where}: not JSON ({told})") from None


class _Twice(Exception):
    """The key."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _Twice(next(key for key in keys if keys.count(key) > 1))
    return found


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches()
    except ArrowInvalid as error:
        raise CollmError(f"{path}: no parquet file ({error})") from None
    found = (unpadded(record, batch.schema) for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(found):
        yield f"{path}, row {number}", record


def unpadded(row: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """A row of a table of that Arrow schema, without the keys that Arrow put into its `messages` and `tools`: what one
    row has there stands in all of them, as null, so that a call of one function would have every other's arguments."""
    return {key: _unpadded(value, schema.field(key).type) if key in SHOWN else value for key, value in row.items()}


def _unpadded(value: Any, kind: Any) -> Any:
    from pyarrow import types

    if types.is_struct(kind) and isinstance(value, Mapping):
        return {key: _unpadded(inner, kind.field(key).type) for key, inner in value.items() if inner is not None}
    if (types.is_list(kind) or types.is_large_list(kind)) and isinstance(value, list):
        return [_unpadded(inner, kind.value_type) for inner in value]
    return value


def _whole(path: Path) -> Any:
    """The file as one JSON value; None if it holds several, one a line."""
    try:
        return parsed(path.read_bytes(), str(path))
    except CollmError as error:
        cause = error.__context__
        if isinstance(cause, json.JSONDecodeError) and cause.msg == "Extra data":
            return None
        raise
