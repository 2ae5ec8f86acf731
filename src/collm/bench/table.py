"""The benchmark in the terminal: what was measured, cell by cell, and what was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from collm.bench.card import TOKENS
from collm.bench.cells import ASSISTANT_ALONE, BASE_ALONE, PLAIN, SPECULATIVE
from collm.bench.figures import (
    Figure,
    beyond_bare_passes,
    beyond_passes,
    ceilings,
    facts,
    figures,
    of_ceiling,
    speed_ratio,
)
from collm.bench.result import BenchResult, Cell, Run

STYLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE, "padding": (0, 1)}


def speed(runs: Sequence[Run] | None) -> str:
    """The median of tokens/s."""
    return "" if not runs else f"{statistics.median(run.tokens_per_second for run in runs):.1f}"


def pair_table(cells: Sequence[Cell]) -> Table:
    """A pair's cells, one row for each batch and rate; ceilings are the medians of the rounds' own."""
    cost = statistics.median(facts(cell).cost_ratio for cell in cells)
    new = statistics.mean(facts(cell).distinct for cell in cells)
    title = f"{cells[0].pair}: an assistant's pass costs {cost:.1f} of the base's; {new:.0%} of neighbours are new"
    table = Table(title=title, **STYLE)
    for heading in ("batch", "deferred", "agree", "base", "assistant", "plain", "of best", "spec.", "of best"):
        table.add_column(heading, justify="right")
    for heading in ("oracle", "gain", "passes", "outside", ": bare"):
        table.add_column(heading, justify="right")
    for cell in cells:
        known, best = facts(cell), ceilings(cell)
        plain, fast = cell.runs[PLAIN], cell.runs[SPECULATIVE]
        oracle = statistics.median(run.tokens / b.oracle for run, b in zip(fast, best, strict=True))
        tokens = sum(run.tokens for run in fast)
        passes = " + ".join(f"{sum(each) / tokens:.2f}" for each in zip(*(run.queries for run in fast), strict=True))
        outside = beyond_passes(fast)
        table.add_row(
            *(str(cell.batch), f"{known.rate:.0%}", f"{known.agreement:.0%}"),
            *(speed(cell.runs[BASE_ALONE]), speed(cell.runs.get(ASSISTANT_ALONE))),
            *(speed(plain), f"{of_ceiling(cell, PLAIN, lambda b: b.plain).median:.0%}"),
            *(speed(fast), f"{of_ceiling(cell, SPECULATIVE, lambda b: b.speculative).median:.0%}"),
            *(f"{oracle:.1f}", f"{speed_ratio(fast, plain).median:.2f}", passes),
            "" if outside is None else f"{1 - 1 / outside.median:.1%}",
            f"{beyond_bare_passes(cell, SPECULATIVE).median:.2f}",
        )
    return table


def other_table(cells: Sequence[Cell]) -> Table:
    """Every system of a pair's cells in which it is not compared with its ceilings."""
    table = Table(title=f"{cells[0].pair}: engines, batches, contexts", **STYLE)
    table.add_column("system")
    for heading in ("batch", "deferred", "context", "tokens/s", "ms/token"):
        table.add_column(heading, justify="right")
    for cell in cells:
        for system, runs in cell.runs.items():
            each = 1000 * statistics.median(run.seconds / run.tokens for run in runs)
            table.add_row(*(system, str(cell.batch), f"{cell.rate:.0%}", str(cell.context), speed(runs), f"{each:.2f}"))
    return table


def card_table(cell: Cell) -> Table:
    """What a card does, and how near to it the passes come."""
    title = f"{cell.pair}: a copy moves {cell.card['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    table = Table(title=title, caption=_launches(cell.card), **STYLE)
    for heading in ("pass over", "base, ms", "of bound", "assistant, ms", "of bound"):
        table.add_column(heading, justify="right")
    for tokens in TOKENS:
        row = [f"{tokens} tokens"]
        for name in ("base", "assistant"):
            seconds, ratio = (cell.card.get(f"{key}.{name}.T{tokens}") for key in ("pass_seconds", "pass"))
            row += ["", ""] if seconds is None or ratio is None else [f"{1000 * seconds:.3f}", f"{ratio:.2f}"]
        table.add_row(*row)
    return table


def _launches(found: Mapping[str, float]) -> str | None:
    if "launches_a_token.b16" not in found:
        return None  # a result of before it was counted
    pairs = [
        f"{found[f'launches_{of}']:.3g} and {found[f'waits_{of}']:.3g} {where}"
        for of, where in (("a_pass", "a pass"), ("a_token.b1", "a token, batch 1"), ("a_token.b16", "batch 16"))
    ]
    return f"launches and waits: {'; '.join(pairs)}"


def figure_table(found: Sequence[Figure]) -> Table:
    """One row for each demand: the cell where it is met worst, and in how many it holds."""
    table = Table(title="What is asked for: a figure fails only if its whole interval lies beyond the limit", **STYLE)
    for heading in ("figure", "limit", "worst case, 95 % interval", "where", "holds"):
        table.add_column(heading)
    for demand in dict.fromkeys(figure.demand for figure in found):
        own = [figure for figure in found if figure.demand == demand]
        worst = min(own, key=lambda figure: (figure.holds, figure.margin))
        held = sum(figure.holds for figure in own)
        verdict = Text(f"{held} of {len(own)}", "green" if held == len(own) else "red")
        limit = f"{'at most' if worst.at_most else 'at least'} {worst.limit:g}"
        table.add_row(demand, limit, str(worst.ratio), worst.where, verdict)
    return table


def tables(result: BenchResult) -> list[Table]:
    """For each pair its cells; then the verdicts."""
    found: list[Table] = []
    for pair in dict.fromkeys(cell.pair for cell in result.cells):
        own = [cell for cell in result.cells if cell.pair == pair]
        for make, cells in (
            (pair_table, [cell for cell in own if cell.kind == "pair"]),
            (other_table, [cell for cell in own if cell.kind != "pair" and cell.runs]),
        ):
            found += [make(cells)] if cells else []
        found += [card_table(cell) for cell in own if cell.kind == "card"]
    judged = figures(result)
    return [*found, figure_table(judged)] if judged else found
