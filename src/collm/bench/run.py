"""The whole benchmark: which cells, in which order, kept as they come."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from collm.bench.cells import batch_cell, card_cell, engine_cell, growth_cell, pair_cell
from collm.bench.figures import figures
from collm.bench.pairs import Pair
from collm.bench.result import BenchResult, Cell, Kind, cell_key
from collm.bench.systems import Effort
from collm.errors import CollmError
from collm.evaluation.result import commit, versions
from collm.files import claimed
from collm.identity.comparing import differences

FILE = "bench.json"
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "card")
"""What any machine can measure; `card` asks for a GPU."""
GROWTH_TOKENS = 32
SPEED = ("cpu", "cores", "threads", "gpu")
"""Of a machine: cells that differ in it are not of one benchmark."""


@dataclass(frozen=True)
class Plan:
    """What is measured. `pairs`: how each is built, by name; they are built when their turn comes, one at a time.

    Rate and batch of `batch` and `growth` cells are the ones nearest to 0.25 and the largest. `settings`: what else
    tells this benchmark from another.
    """

    pairs: Mapping[str, Callable[[], Pair]]
    kinds: Sequence[Kind] = KINDS
    batches: Sequence[int] = (1, 4, 16)
    rates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.5)
    contexts: Sequence[int] = (128, 512, 1024, 2048, 4096)
    effort: Effort = Effort()
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine_batches: Sequence[int] | None = None
    """Of `engine` cells; None: all."""
    compiled: bool = True
    """`card` cells measure compiled modules, too: torch compiles for half a minute."""

    def cells(self, name: str) -> Iterator[tuple[str, Callable[[Pair], Cell]]]:
        """Key and way to measure each cell of a pair."""
        effort, middle, largest = self.effort, min(self.rates, key=lambda rate: abs(rate - 0.25)), max(self.batches)
        shown = effort.prompt_tokens
        if "card" in self.kinds:
            yield cell_key("card", name, 16, 0, shown), partial(card_cell, effort=effort, compiled=self.compiled)
        if "pair" in self.kinds:
            for batch in self.batches:
                for rate in self.rates:
                    key = cell_key("pair", name, batch, rate, shown)
                    yield key, partial(pair_cell, effort=effort, batch=batch, rate=rate)
        if "engine" in self.kinds:
            for batch in self.engine_batches or self.batches:
                yield cell_key("engine", name, batch, 0, shown), partial(engine_cell, effort=effort, batch=batch)
        if "batch" in self.kinds and largest > 1:
            key = cell_key("batch", name, largest, middle, shown)
            yield key, partial(batch_cell, effort=effort, batch=largest, rate=middle)
        if "growth" in self.kinds:
            rate = middle or 0.25
            for context in self.contexts:
                key = cell_key("growth", name, 1, rate, context)
                yield key, partial(growth_cell, effort=effort, context=context, rate=rate)

    def to_dict(self) -> dict[str, Any]:
        """For comparison with a file, hence as JSON gives it back."""
        return {
            "pairs": list(self.pairs),
            "kinds": list(self.kinds),
            "batches": list(self.batches),
            "rates": list(self.rates),
            "contexts": list(self.contexts),
            **asdict(self.effort),
            **self.settings,
        }


def machine() -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "commit": commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def bench(plan: Plan, out: Path | None = None, *, progress: bool = True) -> BenchResult:
    """Measure all cells of a plan.

    Args:
        out: a folder; its `bench.json` is written anew after every cell, and a benchmark with the same plan goes on
            after the cells that it finds there.

    Raises:
        CollmError: the folder holds another benchmark.
    """
    if out is None:
        return _bench(plan, None, progress)
    with claimed(out, folder=True):
        return _bench(plan, out / FILE, progress)


def _bench(plan: Plan, path: Path | None, progress: bool) -> BenchResult:
    result = _begun(path, plan)
    done = {cell.key for cell in result.cells}
    planned = {name: list(plan.cells(name)) for name in plan.pairs}
    if done and not done.issuperset(key for cells in planned.values() for key, _ in cells):
        _require_same_machine(result, path)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        row = bar.add_task("bench", total=sum(map(len, planned.values())), completed=len(done))
        for name, cells in planned.items():
            wanted = [(key, measure) for key, measure in cells if key not in done]
            if not wanted:
                continue
            bar.update(row, description=f"building {name}")
            pair = plan.pairs[name]()
            assert pair.name == name, (pair.name, name)
            result.pairs[name] = pair.details
            for key, measure in wanted:
                bar.update(row, description=key.removeprefix(f"{name} | "))
                cell = measure(pair)
                assert cell.key == key, (cell.key, key)
                result.cells.append(cell.model_copy(update={"load": os.getloadavg()[0], "commit": commit()}))
                if path is not None:
                    result.save(path)
                bar.update(row, advance=1)
    if path is not None:
        save(result, path)
    return result


def save(result: BenchResult, path: Path) -> None:
    """The raw figures, and for readers those with limits."""
    judged = [{**asdict(figure), "holds": figure.holds} for figure in figures(result)]
    result.save(path, figures=judged)


def _begun(path: Path | None, plan: Plan) -> BenchResult:
    """An earlier start of this very benchmark, or a new one."""
    if path is None or not path.exists():
        return BenchResult(settings=plan.to_dict(), machine=machine())
    found = BenchResult.load(path, "figures")
    what = differences(found.settings, plan.to_dict())
    if what:
        raise CollmError(f"{path} holds another benchmark ({what}): give another folder, or delete it to start afresh")
    return found


def _require_same_machine(found: BenchResult, path: Path | None) -> None:
    """Cells are compared with one another: by twice the threads, a longer context would seem to cost nothing.

    Raises:
        CollmError: those that are there were measured by another machine, or by more or fewer threads.
    """
    there = {key: found.machine[key] for key in SPEED if key in found.machine}
    here = machine()
    what = differences(there, {key: here[key] for key in there})
    if what:
        raise CollmError(
            f"{path} was begun on another machine ({what}): go on there, give another folder, or delete it to start "
            "afresh"
        )
