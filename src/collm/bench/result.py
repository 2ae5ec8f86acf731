"""What a benchmark writes down: raw figures of every run. What follows from them is computed when it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from collm.bench.ceilings import PassCosts
from collm.errors import CollmError
from collm.files import write_text

FORMATS = (".png", ".svg", ".pdf")
"""Of pictures."""

Kind = Literal["pair", "engine", "batch", "growth", "card"]
Issued = tuple[int, int, int, float]
"""Rows, tokens of all rows, number of such passes, their seconds in all."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Run(_Strict):
    """One system, one batch of texts, once.

    `seconds`: wall time from the prompts to the last token (of `growth` cells: from the first token to the last).
    `deferred`: tokens an assistant wrote, `again` of them right behind one that it wrote as well, `changed` where the
    base would have written another; `abstained`: deferrals without its answer. `queries`: forward passes of each model
    as single texts count them; `issued`: those that the models really made. `distinct`: share of pairs of neighbouring
    tokens that are new in their text.
    """

    seconds: float
    tokens: int
    deferred: int = 0
    again: int = 0
    changed: int = 0
    abstained: int = 0
    queries: tuple[int, ...] = ()
    issued: tuple[list[Issued], ...] = ()
    drafted: int = 0
    accepted: int = 0
    recovered: int = 0
    distinct: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def pass_seconds(self) -> float:
        """Time of all forward passes issued."""
        return sum(seconds for own in self.issued for *_, seconds in own)


class Cell(_Strict):
    """Some systems, interleaved on the same prompts.

    `runs`: of each system, one a round. `passes`: bare forward passes measured in each round, `[round][model]`, as
    (rows, width, seconds). `same_texts` of `texts` were written alike by plain and by speculative decoding.
    `card`: of a GPU (`collm.bench.card`), seconds of passes, ratios, and the bytes a second of a copy.
    """

    kind: Kind
    pair: str
    batch: int = 1
    rate: float = 0.0
    context: int = 0
    tokens: int = 0
    runs: dict[str, list[Run]]
    passes: list[tuple[list[tuple[int, int, float]], ...]] = []
    texts: int = 0
    same_texts: int = 0
    card: dict[str, float] = {}
    load: float = 0.0
    commit: str | None = None

    @property
    def key(self) -> str:
        return cell_key(self.kind, self.pair, self.batch, self.rate, self.context)

    def costs(self, round: int) -> tuple[PassCosts, PassCosts]:
        """Of base and assistant. A tool's passes cost nothing."""
        measured = [PassCosts({(r, w): s for r, w, s in points} or {(1, 1): 0.0}) for points in self.passes[round]]
        return measured[0], measured[1]


def cell_key(kind: Kind, pair: str, batch: int, rate: float, context: int) -> str:
    return f"{pair} | {kind}, batch {batch}, rate {rate:g}, context {context}"


class BenchResult(_Strict):
    """`settings` tell one benchmark from another; `pairs` are their sizes and dials."""

    format: int = 1
    settings: dict[str, Any]
    machine: dict[str, Any]
    pairs: dict[str, dict[str, Any]] = {}
    cells: list[Cell] = []

    def save(self, path: Path, **more: Any) -> None:
        """As JSON, whole or not at all; `more` is written along for readers, and not read again."""
        row = {**self.model_dump(mode="json"), **more}
        write_text(path, json.dumps(row, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path, *ignored: str) -> BenchResult:
        """Raises CollmError for a file that is not a benchmark's."""
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate({key: value for key, value in row.items() if key not in ignored})
        except (OSError, ValueError, AttributeError, ValidationError) as error:
            raise CollmError(f"{path} is not the result of a benchmark ({error}); give another folder") from error


def check_plot(path: Path) -> None:
    """Whether `save_plot` could draw to this path: asked before hours of measuring.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
        CollmError: another kind of file.
    """
    import matplotlib  # noqa: F401

    if path.suffix not in FORMATS:
        raise CollmError(f"{path}: a picture ends in {', '.join(FORMATS)}")
