"""Several evaluations on one page: which system is better, at what cost, and what its assistants write."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from collm.errors import CollmError
from collm.evaluation.comparison import Comparison, compare_all, judged_alike
from collm.evaluation.curves import cost, series
from collm.evaluation.result import EvalResult
from collm.evaluation.written import Written
from collm.files import write_text
from collm.models.info import CalibrationTable
from collm.report.axes import MUTED
from collm.report.chart import Chart, Level, Series, chart_svg, for_page
from collm.report.histogram import histogram
from collm.report.pages import render
from collm.report.plots import curve_chart
from collm.report.samples import NUM_COLOURS
from collm.report.systems import SystemRow
from collm.report.tokens import EDGES
from collm.report.trace import is_graded

LEARNT = ("threshold", "sampled", "compose", "expected_gain")
"""Ways of decoding that go by what the base has learnt; all others are there for comparison."""
RATE, COST = "share written by an assistant", "forward passes per token"
"""What stands on the x axes."""
MOST_DEFERRED = 15
"""How many tokens the table of deferred ones shows."""


def system_row(result: EvalResult, note: str = "") -> SystemRow:
    """The result's line in the table of systems."""
    return SystemRow(
        name=result.name,
        value=result.value,
        ci95=result.ci95,
        kind=_kind(result),
        deferral_rate=result.rate,
        changed_share=result.changed_share if result.steps else None,
        note=note,
        further=result.metrics,
        passes_per_token=result.passes_per_token,
    )


def _kind(result: EvalResult) -> str:
    settings = result.settings
    deferral = settings.get("params.deferral")
    if settings.get("alone") is not None or len(settings.get("models", ())) == 1 or deferral == "never":
        return "single"
    return "joint" if deferral in LEARNT else "control"


def read_results(paths: Sequence[Path]) -> list[EvalResult]:
    """Results that may stand on one page: all of the same questions. Those of one name are told apart by their file.

    Raises:
        CollmError: a file that is no result, or results of different questions.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise CollmError("one of the results is given twice")
    results = [EvalResult.load(path) for path in paths]
    first = results[0]
    for path, result in zip(paths, results, strict=True):
        if sorted(result.ids) != sorted(first.ids) or result.settings.get("examples") != first.settings.get("examples"):
            raise CollmError(
                f"{path}: {result.name!r} answered other questions than {first.name!r}; make a page for each of them"
            )
    return told_apart(paths, results)


def told_apart(paths: Sequence[Path], results: Sequence[EvalResult]) -> list[EvalResult]:
    """Results with different names: those that share one have their file's behind it."""
    names = Counter(result.name for result in results)
    files = [path.stem for path in paths]
    if len(set(files)) < len(files):
        files = [f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(files)) < len(files):
        files = [str(path) for path in paths]
    return [
        replace(result, name=f"{result.name} ({file})") if names[result.name] > 1 else result
        for file, result in zip(files, results, strict=True)
    ]


@dataclass(frozen=True)
class Overview:
    """What stands on the page.

    `written`: the systems, in the order of the table. `rival`: the result that the others are tested against.
    `calibrations`: tables whose curves are drawn; `calibrated`: the name of the checkpoint of each, where there are
    several. `weights`: what a forward pass of a model costs (see `cost`).
    `num_samples`, `seed`: how the texts that are shown were drawn.
    """

    title: str
    written: tuple[Written, ...]
    rival: EvalResult
    calibrations: tuple[CalibrationTable, ...] = ()
    calibrated: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    num_samples: int = 6
    seed: int = 0

    @property
    def results(self) -> list[EvalResult]:
        return [written.result for written in self.written]

    def named_calibrations(self) -> list[tuple[str, CalibrationTable]]:
        """Each with its checkpoint, where that is told."""
        return list(zip(self.calibrated or ("",) * len(self.calibrations), self.calibrations, strict=True))

    def comparisons(self) -> tuple[list[Comparison], list[EvalResult]]:
        """The paired tests, and the results that another rule has scored, so that they are not tested."""
        tested, untested = judged_alike(self.rival, self.results)
        return compare_all(self.rival, tested, seed=self.seed), untested


def overview_html(overview: Overview) -> str:
    """The page: one file that loads nothing, and reads without any script."""
    results, rival = overview.results, overview.rival
    by_rate = series(results, {i: rate for i, r in enumerate(results) if (rate := r.rate) is not None})
    costs = {i: value for i, r in enumerate(results) if (value := cost(r, overview.weights)) is not None}
    by_cost = series(results, costs)
    shared, own = common_settings(results)
    comparisons, untested = overview.comparisons()
    rows = [system_row(r, f"task {r.task} v{r.task_version}" if r in untested else "") for r in results]
    metric = rival.metric.replace("_", " ")
    levels = _alone(rows, [result not in untested for result in results])
    return render(
        "overview.html",
        title=overview.title,
        lead="",
        footer=f"Made by collm report from {len(results)} results.",
        rival=rival,
        rows=rows,
        comparisons=comparisons,
        untested=[result.name for result in untested],
        by_rate=by_rate,
        rate_chart=_chart(by_rate, levels, f"{metric} against deferral rate", RATE, metric),
        by_cost=by_cost,
        cost_chart=_chart(by_cost, levels, f"{metric} against cost", COST, metric),
        weights=overview.weights,
        calibrations=[
            (table, checkpoint, for_page(partial(chart_svg, curve_chart(table))))
            for checkpoint, table in overview.named_calibrations()
        ],
        written=overview.written,
        chunked=[result.name for result in results if result.unit == "chunk"],
        deferring=[w for w in overview.written if w.figures is not None and w.result.deferral_rate > 0],
        gate_histograms={w.result.name: _gates(w) for w in overview.written if w.gated},
        graded=any(is_graded(score) for result in results for score in result.scores),
        most_deferred=MOST_DEFERRED,
        seed=overview.seed,
        shared=shared,
        own=[(result.name, settings) for result, settings in zip(results, own, strict=True)],
    )


def write_overview(overview: Overview, path: str | Path) -> None:
    """Write `overview_html` to a file, whole or not at all."""
    write_text(Path(path), overview_html(overview))


def _alone(rows: Sequence[SystemRow], tested: Sequence[bool]) -> tuple[Level, ...]:
    """Systems that are one model alone: lines in every curve, so that a pair is seen beside its parts."""
    return tuple(
        Level(row.name, row.value) for row, fit in zip(rows, tested, strict=True) if fit and row.kind == "single"
    )


def _chart(lines: Sequence[Series], levels: tuple[Level, ...], title: str, x_label: str, metric: str) -> Markup | None:
    if not lines:
        return None
    chart = Chart(tuple(lines), title, x_label, metric, x_percent=x_label == RATE, levels=levels)
    return for_page(partial(chart_svg, chart))


def _gates(written: Written) -> Markup:
    figures, threshold = written.figures, written.threshold
    assert figures is not None
    inside = threshold is not None and EDGES[0] <= threshold <= EDGES[-1]
    draw = partial(
        histogram,
        figures.gates,
        figures.models,
        [MUTED, *(f"var(--a{(author - 1) % NUM_COLOURS + 1},#e69f00)" for author in range(1, len(figures.models)))],
        bin_names=[_probability(edge) if edge % 2 == 0 else "" for edge in EDGES],
        title=f"{written.result.name}: {figures.unit}s by the gate's chance of deferring",
        x_label="the gate's chance of deferring (log-odds scale)",
        y_label=f"{figures.unit}s",
        mark=1 + threshold - EDGES[0] if inside and threshold is not None else None,
    )
    return for_page(lambda width, height: draw(width=width, height=height), 280)


def _probability(log_odds: float) -> str:
    """Log-odds as a percentage, with as many digits as tell it from 0 and 100."""
    share = 1 / (1 + math.exp(-log_odds))
    digits = 1 - math.floor(math.log10(100 * min(share, 1 - share)))
    return f"{100 * share:.{min(2, max(0, digits))}f} %"


def common_settings(results: Sequence[EvalResult]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """What all runs were made with, and what each was made with besides, as text."""
    rows = [_settings(result) for result in results]
    shared = {key: value for key, value in rows[0].items() if all(row.get(key) == value for row in rows)}
    return shared, [{key: value for key, value in row.items() if key not in shared} for row in rows]


def _settings(result: EvalResult) -> dict[str, str]:
    told: dict[str, Any] = {"seed": result.seed, "commit": result.commit, **result.settings}
    told |= {f"version of {name}": version for name, version in result.versions.items()}
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in told.items()
    }
