"""One file of examples as three: to train on, to choose a rate on, and to judge by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.data.examples import JSON_SUFFIXES, Example, load_examples, parse_example
from collm.data.prepare import part_of
from collm.data.records import json_lines
from collm.errors import CollmError
from collm.evaluation.task import Task
from collm.files import require_apart, write_text

PARTS = {"train": 0.8, "calibration": 0.1, "test": 0.1}
QUESTION_AND_ANSWER = (
    *(("question", "answer"), ("instruction", "output"), ("question", "response"), ("instruction", "response")),
    *(("problem", "solution"), ("query", "response"), ("input", "output")),
)
FEW = 100
"""Of fewer questions a share has an interval of 10 points to either side, or more."""


def split(source: Path, folder: Path) -> dict[str, Path]:
    """Write `folder/PART.jsonl` for each of `PARTS`, by a hash of each row's question, or of its field `group`: so that
    equal questions, and near-duplicates that are told, stay together. Rows of a question and an answer become messages.

    Raises:
        CollmError: a row that cannot be read, or too few of them; nothing is written.
    """
    if source.suffix not in JSON_SUFFIXES:
        raise CollmError(
            f"{source}: a file to be split is JSONL; give three data sets instead (--train, --calibration, --test)"
        )
    rows: dict[str, list[str]] = {name: [] for name in PARTS}
    for where, row in json_lines(source):
        if isinstance(row, CollmError):
            raise row
        row = as_conversation(row, where)
        example = parse_example(row, where, where)
        group = example.fields.get("group")
        part = part_of(str(example.question) if group is None else f"group {group}", PARTS)
        rows[part].append(json.dumps(row, ensure_ascii=False) + "\n")
    empty = [name for name, lines in rows.items() if not lines]
    if empty:
        count = sum(map(len, rows.values()))
        raise CollmError(
            f"{source}: its {count} rows are too few to be split into {', '.join(PARTS)} ({empty[0]} got none)"
        )
    paths = {name: folder / f"{name}.jsonl" for name in PARTS}
    for name, path in paths.items():
        require_apart(path, [source])
        write_text(path, "".join(rows[name]))
    return paths


def as_conversation(row: Any, where: str) -> Any:
    """A row of a question and an answer, under the names that data sets mostly have, as messages; others as is.

    Raises:
        CollmError: there is a question, and no answer.
    """
    if not isinstance(row, dict) or {"messages", "prompt"} & row.keys():
        return row
    for asked, answered in QUESTION_AND_ANSWER:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            given = row.get("input")  # Alpaca's, which may be empty
            question = f"{row[asked]}\n\n{given}" if asked == "instruction" and given else row[asked]
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": row[answered]}]
            return {**row, "messages": turns}
    answers = {asked: [a for q, a in QUESTION_AND_ANSWER if q == asked] for asked, _ in QUESTION_AND_ANSWER}
    for asked, names in answers.items():
        if isinstance(row.get(asked), str):
            raise CollmError(f"{where}: {asked!r} without an answer, a text as {' or '.join(map(repr, names))}")
    return row


def look(task: Task, train: str, calibration: str, test: str) -> list[str]:
    """What a newcomer should know about the data before hours of work, a line each; empty where all is well.

    Raises:
        CollmError: unreadable data, or questions without a gold answer.
    """
    told = []
    for name, source in (("calibration", calibration), ("test", test)):
        examples = load_examples(source)
        for example in examples:
            task.gold(example)
        if len(examples) < FEW:
            told.append(
                f"{source}: {len(examples)} questions for {name}. Of so few, a share right of 50 % may as well be "
                f"{50 - _half_width(len(examples)):.0f} or {50 + _half_width(len(examples)):.0f} %; more are better"
            )
    right = _right(task, load_examples(train))
    if right is not None and right < 0.5:
        told.append(
            f"{train}: of its own texts only {right:.0%} count as right by the task {task.name}. A pair that learns to "
            "write such texts cannot do better: take another --task (docs/tasks.md), or end the texts as it wants them"
        )
    return told


def _half_width(count: int) -> float:
    """Points to either side of 50 % in which the truth lies, 95 times of 100."""
    return float(min(50.0, 98 / max(1, count) ** 0.5))


def _right(task: Task, examples: Sequence[Example], most: int = 200) -> float | None:
    """The share of training texts that the task's own rule counts as right; None where that cannot be asked."""
    if task.shots or task.needs is not None or task.package is not None:
        return None
    scores = []
    for example in examples[:most]:
        try:
            gold = task.gold(example)
        except CollmError:
            scores.append(0.0)
            continue
        scores.append(task.score(example.reference or "", gold))
    return sum(scores) / len(scores) if scores else None
