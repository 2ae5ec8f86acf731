"""One row per system: the table that compares them, in a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from collm.report.terminal import printable


@dataclass(frozen=True)
class SystemRow:
    """`value` and `ci95` are of the metric, `deferral_rate` and `changed_share` of written tokens; None = not told.

    `kind` groups systems: "single" (one model alone), "joint" (several write together), "control" (a joint system
    whose deferrals are not learnt).
    """

    name: str
    value: float
    ci95: tuple[float, float] | None = None
    kind: str = ""
    deferral_rate: float | None = None
    changed_share: float | None = None
    note: str = ""


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def systems_table(rows: Sequence[SystemRow], metric: str = "exact match", title: str | None = None) -> Table:
    """The systems as a rich table; the best value is bold."""
    table = Table(title=title, title_justify="left")
    table.add_column("system")
    for heading in (metric.replace("_", " "), "95 % interval", "deferred", "changed"):
        table.add_column(heading, justify="right")
    notes = any(row.note for row in rows)
    if notes:
        table.add_column("note")
    best = max((row.value for row in rows), default=0.0)
    for row in rows:
        interval = "" if row.ci95 is None else f"{row.ci95[0]:.1%} to {row.ci95[1]:.1%}"
        cells = [row.name, percent(row.value), interval, percent(row.deferral_rate), percent(row.changed_share)]
        cells += [row.note] if notes else []
        table.add_row(*(Text(printable(cell)) for cell in cells), style="bold" if row.value == best else "")
    return table
