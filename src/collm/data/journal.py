"""What a long run has finished so far, kept so that nothing is lost by kill -9, Ctrl-C or a full disk."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from collm.errors import CollmError
from collm.files import write_text


class Journal:
    """An append-only file of JSON lines, the first of which says what the run is.

    A record counts once its line is whole. A line that was being written when the process died is cut off on
    opening; so are records behind a damaged one. Hold the file with `files.claimed` while it is open.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool = True) -> None:
        """After opening, `found` is the header of the run that began the file, `records` what it had finished.

        Args:
            header: its first key tells journals of this kind from all other files.
            resume: keep what an earlier run left there; else begin anew.

        Raises:
            CollmError: the file cannot be written, or is something else, which is left as it is.
        """
        self.path = path
        self.found: dict[str, Any] = header
        self.records: list[dict[str, Any]] = []
        try:
            kept = self._read(next(iter(header))) if path.exists() else 0
            if not (kept and resume):
                self.found, self.records = header, []
                write_text(path, json.dumps(header) + "\n")  # whole, so that a killed run leaves no half of it
                kept = path.stat().st_size
            self._file = FileIO(path, "r+")
            self._file.truncate(kept)
            self._end = self._file.seek(kept)
        except OSError as error:
            raise CollmError(f"{path}: cannot be written: {error.strerror}") from None

    def _read(self, mark: str) -> int:
        """Fill `found` and `records`; the number of bytes of whole lines."""
        kept = 0
        lines: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    value = None
                if not lines and not (isinstance(value, dict) and mark in value):
                    begin = f'{{"{mark}": '.encode()
                    # Half a header, as older versions may have left it, is ours all the same.
                    if line.endswith(b"\n") or not begin.startswith(line[: len(begin)]):
                        raise CollmError(
                            f"{self.path} exists and was not written by an earlier run: give another output, or move "
                            "it away"
                        )
                    return 0
                if not isinstance(value, dict):
                    break
                lines.append(value)
                kept += len(line)
        if lines:
            self.found, *self.records = lines
        return kept

    def append(self, record: dict[str, Any]) -> None:
        """Add one record.

        Raises:
            CollmError: disk full or alike; the records before this one are safe.
        """
        data = memoryview((json.dumps(record) + "\n").encode())
        try:
            # Unbuffered: a full disk shows here, not when the file is closed, and may take a part of the line.
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.seek(self._end)
            self._file.truncate(self._end)
            raise CollmError(
                f"{self.path}: cannot be written ({error.strerror}); what was finished before is kept: "
                "make room and run the same again"
            ) from None
        self._end = self._file.tell()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def remove(self) -> None:
        self._file.close()
        os.unlink(self.path)
