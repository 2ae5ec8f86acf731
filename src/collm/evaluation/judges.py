"""Judges that read answers from a file of their own form: AlpacaEval and MT-bench.

- AlpacaEval (Li et al. 2023): `[{"dataset", "instruction", "output", "generator", "datasplit"}]`.
- MT-bench (Zheng et al. 2023), as FastChat's `llm_judge` has it: JSON lines `{"question_id", "answer_id", "model_id",
  "choices": [{"index", "turns"}], "tstamp"}`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from collm.data.sources import Row
from collm.errors import CollmError

TEMPERATURES: Mapping[str, float] = MappingProxyType(
    {
        "writing": 0.7,
        "roleplay": 0.7,
        "extraction": 0.0,
        "math": 0.0,
        "coding": 0.0,
        "reasoning": 0.0,
        "stem": 0.1,
        "humanities": 0.1,
    }
)
"""MT-bench's, by category, as in FastChat's `llm_judge/common.py`."""
ELSE_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Dialogue:
    """A user's turns, each of which sees the answers to those before; `row` is where they come from.

    `temperature`: as the judge wants it; None where it does not say.
    """

    id: str
    turns: tuple[str, ...]
    temperature: float | None
    row: Row = field(compare=False)

    @property
    def traces(self) -> list[str]:
        """The ids of its answers' traces, by turn."""
        return [f"{self.id}/{number}" for number in range(1, len(self.turns) + 1)]


def _alpaca_eval(rows: Sequence[Row]) -> list[Dialogue]:
    return _told_apart([Dialogue(row["id"], (row["messages"][0]["content"],), None, row) for row in rows])


def _mt_bench(rows: Sequence[Row]) -> list[Dialogue]:
    def temperature(row: Row) -> float:
        own = row.get("required_temperature")
        return TEMPERATURES.get(row["category"], ELSE_TEMPERATURE) if own is None else float(own)

    return _told_apart([Dialogue(row["id"], tuple(row["turns"]), temperature(row), row) for row in rows])


def _told_apart(dialogues: list[Dialogue]) -> list[Dialogue]:
    """Answers are kept by the ids of their questions: of two with one id, the judge would read one answer to both.

    Raises:
        CollmError: two questions have the same id.
    """
    for id, count in Counter(dialogue.id for dialogue in dialogues).items():
        if count > 1:
            raise CollmError(f"{count} questions have the id {id}; ids tell apart the answers: make them unique")
    return dialogues


def _alpaca_eval_file(answers: Mapping[Dialogue, Sequence[str]], generator: str) -> str:
    rows = [
        {
            "dataset": dialogue.row["dataset"],
            "instruction": dialogue.turns[0],
            "output": output,
            "generator": generator,
            "datasplit": "eval",
        }
        for dialogue, [output] in answers.items()
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _mt_bench_file(answers: Mapping[Dialogue, Sequence[str]], generator: str) -> str:
    def line(dialogue: Dialogue, turns: Sequence[str]) -> str:
        # As long as FastChat's random ones, but the same for the same answer.
        key = json.dumps([generator, dialogue.id, *turns]).encode()
        row = {
            "question_id": dialogue.row["question_id"],
            "answer_id": hashlib.sha256(key).hexdigest()[:22],
            "model_id": generator,
            "choices": [{"index": 0, "turns": list(turns)}],
            "tstamp": time.time(),
        }
        return json.dumps(row, ensure_ascii=False) + "\n"

    return "".join(line(dialogue, turns) for dialogue, turns in answers.items())


@dataclass(frozen=True)
class Judge:
    """What a judge gives to answer, what it reads, and how long answers may get where nobody says otherwise."""

    dialogues: Callable[[Sequence[Row]], list[Dialogue]]
    file: Callable[[Mapping[Dialogue, Sequence[str]], str], str]
    max_tokens: int


JUDGES: Mapping[str, Judge] = MappingProxyType(
    {
        "alpaca_eval": Judge(_alpaca_eval, _alpaca_eval_file, 512),  # as in Shen et al. 2024
        "mt_bench": Judge(_mt_bench, _mt_bench_file, 1024),  # as in FastChat
    }
)
