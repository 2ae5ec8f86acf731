"""The rate/quality curve of a calibration: CSV, SVG, PNG (with matplotlib)."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path

from collm.decoding.policies import to_probability
from collm.files import replacing, write_text
from collm.models.info import CalibrationRow, CalibrationTable
from collm.report.chart import Chart, Level, Point, Series, bounds, chart_svg, look
from collm.sampling_params import Signal
from collm.types import told_rate

HEX = re.compile(r"(?:var\(.*,)?(#\w+)\)?")
"""A colour of the page, with the value that it has elsewhere."""
COLUMNS = (
    "target_rate",
    "achieved_rate",
    "threshold",
    "log_odds",
    "metric",
    "metric_value",
    "ci95_low",
    "ci95_high",
    "best",
)


def curve_csv(table: CalibrationTable) -> str:
    """One line per target rate; `inf` and `-inf` stand for never and always deferring."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, row in enumerate(table.rows):
        low, high = row.ci95 or ("", "")
        threshold = (row.target_rate, row.achieved_rate, row.threshold, row.log_odds)
        writer.writerow((*threshold, table.metric, row.metric_value, low, high, int(index == table.best)))
    return lines.getvalue()


def _points(table: CalibrationTable) -> list[tuple[CalibrationRow, bool]]:
    """Rows by achieved rate, each distinct threshold once (targets out of reach share one), and which is the best."""
    best = None if table.best is None else table.rows[table.best].log_odds
    distinct = {row.log_odds: row for row in table.rows}
    rows = sorted(distinct.values(), key=lambda row: (row.achieved_rate, -row.log_odds))
    return [(row, row.log_odds == best) for row in rows]


def told_threshold(row: CalibrationRow, signal: Signal) -> str:
    """A threshold that may lie close to 0, or, of a gate, so close to 1 that a probability is rounded to it."""
    below_one = to_probability(-row.log_odds) if signal == "gate" else 1.0
    if 0 < below_one < 0.001:
        return f"1 - {below_one:.1e}"
    return f"{row.threshold:.1e}" if 0 < row.threshold < 0.001 else f"{row.threshold:.4f}"


def curve_series(table: CalibrationTable, name: str = "") -> Series:
    """Achieved deferral rate against the metric; the best threshold has a note."""
    points = []
    for row, best in _points(table):
        interval = "" if row.ci95 is None else f" ({row.ci95[0]:.1%} to {row.ci95[1]:.1%})"
        told = (
            f"{row.metric_value:.1%}{interval} at {row.achieved_rate:.1%} deferred; "
            f"asked for {told_rate(row.target_rate)}, threshold {told_threshold(row, table.signal)}"
        )
        note = f"best: {row.metric_value:.1%}" if best else ""
        points.append(Point(row.achieved_rate, row.metric_value, row.ci95, told, note))
    return Series(name or table.task, tuple(points))


def curve_chart(table: CalibrationTable) -> Chart:
    """The curve, with the base alone and the assistants wherever they have something to say as lines."""
    metric = table.metric.replace("_", " ")
    ends = {-math.inf: "always asking", math.inf: "base alone"}
    levels = {ends[row.log_odds]: row.metric_value for row in table.rows if row.log_odds in ends}
    return Chart(
        (curve_series(table),),
        title=f"{metric} against the share written by assistants, task {table.task}",
        x_label="share written by an assistant",
        y_label=metric,
        levels=tuple(Level(name, value) for name, value in levels.items()),
    )


def save_curve(table: CalibrationTable, folder: str | Path) -> list[Path]:
    """Write `curve.csv`, `curve.svg` and, where matplotlib is installed, `curve.png`; returns what was written."""
    folder = Path(folder)
    written = [folder / "curve.csv", folder / "curve.svg"]
    write_text(written[0], curve_csv(table))
    save_svg(curve_chart(table), written[1])
    try:
        save_curve_png(table, folder / "curve.png")
    except ModuleNotFoundError:
        return written
    return [*written, folder / "curve.png"]


def save_svg(chart: Chart, path: Path) -> None:
    """A chart as a file that stands alone."""
    alone = '<svg xmlns="http://www.w3.org/2000/svg" style="font-family:sans-serif;background:#fff" '
    write_text(path, chart_svg(chart).replace("<svg ", alone, 1) + "\n")


def save_curve_png(table: CalibrationTable, path: str | Path) -> None:
    """Draw the curve with matplotlib (extra `plot`).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CollmError: the file cannot be written.
    """
    save_png(curve_chart(table), path, title=f"{table.task}: {table.num_prompts} prompts")


def save_png(chart: Chart, path: str | Path, title: str = "") -> None:
    """A chart as `chart_svg` has it, drawn with matplotlib.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plot`).
        CollmError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scale = 100 if chart.x_percent else 1
    figure = Figure(figsize=(7.2, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in chart.series:
        colour = HEX.fullmatch(look(one.look)[0])
        assert colour is not None
        known = [(point.x, *point.ci95) for point in one.points if point.ci95 is not None]
        label = "95 % interval" if len(chart.series) == 1 and known else ""
        places = [scale * x for x, _, _ in known]
        low, high = [100 * low for _, low, _ in known], [100 * high for _, _, high in known]
        if len(known) > 1:
            axes.fill_between(places, low, high, alpha=0.15, color=colour[1], linewidth=0, label=label)
        else:  # a band of one point has no width
            axes.vlines(places, low, high, alpha=0.6, color=colour[1], linewidth=1.3, label=label)
        x, y = [scale * point.x for point in one.points], [100 * point.y for point in one.points]
        axes.plot(x, y, "o-", color=colour[1], markersize=5, label=one.name if len(chart.series) > 1 else None)
        for point in one.points:
            if point.note:
                at = (scale * point.x, 100 * point.y)
                axes.plot(*at, "o", markersize=13, fillstyle="none", color="#d55e00", label=point.note)
    for level, style in zip(chart.levels, ("--", ":", "-.") * len(chart.levels), strict=False):
        axes.axhline(100 * level.y, color="#5d6573", linewidth=1, linestyle=style, label=f"{level.name}: {level.y:.1%}")
    x_ticks, y_ticks = bounds(chart.series, levels=chart.levels)
    axes.set_xlim(-0.01 * scale * x_ticks[-1], scale * x_ticks[-1])
    axes.set_ylim(100 * y_ticks[0], 100 * y_ticks[-1])
    axes.set_xlabel(f"{chart.x_label} (%)" if chart.x_percent else chart.x_label)
    axes.set_ylabel(f"{chart.y_label} (%)")
    axes.set_title(title or chart.title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
