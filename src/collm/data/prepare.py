"""Published data, split into files that training, calibration and evaluation take."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from collm.data.examples import Example, parse_example
from collm.data.records import json_lines
from collm.data.sources import FORMATS, read_source
from collm.errors import CollmError
from collm.files import replacing, require_apart

TEST = "test"
"""The part that `test_ids` go to."""


def part_of(text: str, parts: Mapping[str, float], turn: float = 0.0) -> str:
    """The part of a question, from a hash of its text: stable, and independent of the other questions.

    Equal questions stay together; near-duplicates do not: where a set has them, they must be grouped first, and
    `text` is the name of a group. The hashes lie on a circle that the parts divide; `turn`, a share of it, turns it.
    """
    point = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 + turn) % 1
    for name, share in parts.items():
        point -= share
        if point < 0:
            return name
    return name


def require_parts(parts: Mapping[str, float]) -> None:
    """Raises CollmError for parts that are no names of files, or whose shares do not add up to 1."""
    if any(not re.fullmatch(r"\w[\w-]*", name) or share <= 0 for name, share in parts.items()):
        raise CollmError(f"parts are names with shares above 0, as in train=0.9,validation=0.1, not {dict(parts)}")
    if abs(sum(parts.values()) - 1) > 1e-6:
        raise CollmError(f"the shares of the parts add up to {sum(parts.values()):g}, not to 1")


def prepare(
    name: str,
    source: Path,
    out: Path,
    parts: Mapping[str, float] | None = None,
    *,
    test_ids: Collection[str] | None = None,
    **options: Any,
) -> dict[Path, int]:
    """Write `out/PART.jsonl` for each part, and, where rows have a type, `out/TYPE/PART.jsonl` as well.

    Args:
        name: a format of `collm.data.sources`.
        parts: shares, by a hash of the question. None: the authors' own parts if the format has some, else one, "all".
        test_ids: ids that make up the part "test", by the official split; `parts` share out the others.

    Returns:
        How many rows each file has.

    Raises:
        CollmError: unreadable data; a question that stands in another part already there; ids that are not in the data.
    """
    own = FORMATS[name].parts
    if own and (parts is not None or test_ids is not None):
        raise CollmError(f"{name} has parts of its authors' own ({', '.join(own)}): leave out parts and test ids")
    shares = {"all": 1.0} if parts is None else parts
    require_parts(shares)
    if test_ids is not None and TEST in shares:
        raise CollmError(f'the part "{TEST}" is made of the given ids; call the other parts otherwise')
    names = list(own) or [*shares, *([TEST] if test_ids is not None else [])]
    there = _questions_there(out, names)
    counts: Counter[Path] = Counter()
    missing = set(test_ids or ())
    ids: set[str] = set()
    with ExitStack() as stack:
        files: dict[Path, TextIO] = {}
        for row in read_source(name, source, **options):
            question = _question(parse_example(row, str(source), row["id"]))
            id = row["id"].removeprefix(f"{name}-")
            if row["id"] in ids:
                raise CollmError(f"{source}: two records have the id {id!r}; ids must be unique")
            ids.add(row["id"])
            told = row.pop("part") if own else TEST if id in (test_ids or ()) else None
            part = told or part_of(question, shares)
            missing.discard(id)
            home = there.setdefault(question, out / f"{part}.jsonl")
            if home != out / f"{part}.jsonl":
                raise CollmError(
                    f"{source}: the question of {id!r} stands in {home} as well: parts in one folder must not share "
                    "questions; give another --out, or delete what is there"
                )
            for path in [out / f"{part}.jsonl", *([out / row["type"] / f"{part}.jsonl"] if "type" in row else [])]:
                if path not in files:
                    require_apart(path, [source])
                    files[path] = stack.enter_context(_writing(path, stack))
                files[path].write(json.dumps(row, ensure_ascii=False) + "\n")
                counts[path] += 1
        if missing:
            raise CollmError(f"{source} has no record with the ids {', '.join(sorted(missing)[:5])}")
    return dict(counts)


def _writing(path: Path, stack: ExitStack) -> TextIO:
    """A file that appears under its name when the stack ends well."""
    return stack.enter_context(replacing(path)).open("w", encoding="utf-8")


def _question(example: Example) -> str:
    if example.messages is None:
        return example.prompt or ""
    return next((str(message["content"]) for message in example.messages if message["role"] == "user"), "")


def _questions_there(out: Path, names: list[str]) -> dict[str, Path]:
    """Questions of the parts in `out` that are not about to be written anew, and where each stands.

    Raises:
        CollmError: a file there cannot be read, so that it cannot be told whether it shares questions.
    """
    there: dict[str, Path] = {}
    for path in sorted(out.glob("*.jsonl")):
        if path.stem in names:
            continue
        for where, row in json_lines(path):
            try:
                if isinstance(row, CollmError):
                    raise row
                if isinstance(row, dict) and row.get("messages") is not None:
                    there[_question(parse_example(row, where, where))] = path
            except CollmError as error:
                raise CollmError(
                    f"{error} (looked into because parts in one folder must not share questions): give another --out, "
                    "or move the file away"
                ) from None
    return there
