"""The page of samples: one HTML file without any outside resource, tokens coloured by who wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from collm.files import write_text
from collm.models.info import CalibrationTable
from collm.report.chart import chart_svg, for_page
from collm.report.pages import render
from collm.report.plots import curve_chart
from collm.report.systems import SystemRow
from collm.report.trace import Trace, is_graded, systems_of
from collm.types import unit_of


@dataclass(frozen=True)
class Page:
    """What stands on a page besides the samples.

    `lead`: a sentence or two under the title. `systems`: rows of the comparison table. `curve`: a calibration whose
    rate/quality curve is drawn. `footer`: how the figures were made (command, commit, seed).
    """

    title: str = "Who wrote which token"
    lead: str = ""
    systems: tuple[SystemRow, ...] = ()
    metric: str = "exact match"
    curve: CalibrationTable | None = None
    max_samples: int = 200
    footer: str = ""


def html_report(traces: Sequence[Trace], page: Page | None = None) -> str:
    """A whole page; the figures at its top count all traces, the first `max_samples` are shown."""
    page = page or Page()
    steps = [step for trace in traces for step in trace.generation.steps]
    return render(
        "writers.html",
        title=page.title,
        lead=page.lead,
        footer=page.footer,
        tiles=_tiles(traces) if traces else [],
        systems=page.systems,
        metric=page.metric,
        curve=None if page.curve is None else for_page(partial(chart_svg, curve_chart(page.curve))),
        table=page.curve,
        traces=traces,
        max_samples=page.max_samples,
        writers=systems_of(traces),
        changed=any(step.changed for step in steps),
        back=any(step.abstained for step in steps),
        gated=any(step.gate for step in steps),
        scored=any(trace.score is not None for trace in traces),
        graded=any(is_graded(trace.score) for trace in traces),
    )


def write_html(traces: Sequence[Trace], path: str | Path, page: Page | None = None) -> None:
    """Write `html_report` to a file, whole or not at all."""
    write_text(Path(path), html_report(traces, page))


def _tiles(traces: Sequence[Trace]) -> list[tuple[str, str]]:
    """The figures at the top: value and what it is."""
    steps = [step for trace in traces for step in trace.generation.steps]
    total, unit = max(1, len(steps)), unit_of(steps)
    scores = [trace.score for trace in traces if trace.score is not None]
    tiles = [(str(len(traces)), "texts"), (f"{sum(len(step.all_token_ids) for step in steps):,}", "tokens")]
    if scores:
        what = "mean score" if any(map(is_graded, scores)) else "answered right"
        tiles.insert(0, (f"{sum(scores) / len(scores):.1%}", what))
    tiles.append((f"{sum(step.deferred for step in steps) / total:.1%}", f"{unit}s written by assistants"))
    tiles.append((f"{sum(step.changed for step in steps) / total:.1%}", f"{unit}s they changed"))
    return tiles
