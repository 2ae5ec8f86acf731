"""One row per system: the table that compares them, in a terminal or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from collm.colours import printable


@dataclass(frozen=True)
class SystemRow:
    """`value` and `ci95` are of the metric, `deferral_rate` and `changed_share` of written tokens; None = not told.

    `kind` groups systems: "single" (one model alone), "joint" (several write together), "control" (a joint system
    whose deferrals are not learnt). `further`: other metrics of the task, by name. `passes_per_token`: forward passes
    per written token, by model.
    """

    name: str
    value: float
    ci95: tuple[float, float] | None = None
    kind: str = ""
    deferral_rate: float | None = None
    changed_share: float | None = None
    note: str = ""
    further: Mapping[str, float] = field(default_factory=dict)
    passes_per_token: Mapping[str, float] = field(default_factory=dict)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def further_metrics(rows: Sequence[SystemRow]) -> list[str]:
    """Names of all further metrics, in the order in which they appear."""
    return list(dict.fromkeys(name for row in rows for name in row.further))


def told_passes(passes_per_token: Mapping[str, float]) -> str:
    """`base 1.00, calculator 0.14`."""
    return ", ".join(f"{name} {count:.2f}" for name, count in passes_per_token.items())


def systems_table(rows: Sequence[SystemRow], metric: str = "exact match", title: str | None = None) -> Table:
    """The systems as a rich table; the best value is bold. Columns that no row tells anything of are left out."""
    others = further_metrics(rows)
    columns = [("95 % interval", "right"), *((name, "right") for name in others)]
    columns += [("deferred", "right"), ("changed", "right")]
    costs, notes = any(row.passes_per_token for row in rows), any(row.note for row in rows)
    columns += [("passes per token", "left")] * costs + [("note", "left")] * notes
    table = Table(title=title, title_justify="left")
    table.add_column("system", overflow="fold")  # whole, in as many lines as it takes: a row is looked up by it
    table.add_column(metric.replace("_", " "), justify="right")
    for heading, justify in columns:
        table.add_column(heading.replace("_", " "), justify="right" if justify == "right" else "left")
    best = max((row.value for row in rows), default=0.0)
    for row in rows:
        interval = "" if row.ci95 is None else f"{row.ci95[0]:.1%} to {row.ci95[1]:.1%}"
        cells = [row.name, percent(row.value), interval, *(percent(row.further.get(name)) for name in others)]
        cells += [percent(row.deferral_rate), percent(row.changed_share)]
        cells += [told_passes(row.passes_per_token)] * costs + [row.note] * notes
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if row.value == best else "")
    return table
