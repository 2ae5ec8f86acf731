"""The rate/quality curve of a calibration: CSV, SVG (drawn here, no library), PNG (matplotlib)."""

from __future__ import annotations

import csv
import io
import math
from html import escape
from pathlib import Path

from collm.files import replacing, write_text
from collm.models.checkpoint import CalibrationRow, CalibrationTable

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


def _axis(low: float, high: float) -> list[float]:
    """Four to seven round tick values that cover `[low, high]`."""
    span = max(high - low, 1e-6)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _label(value: float) -> str:
    return f"{100 * value:.6g}"


def _bounds(table: CalibrationTable) -> tuple[list[float], list[float]]:
    rows = table.rows
    values = [value for row in rows for value in (row.metric_value, *(row.ci95 or ()))]
    high = max(values)
    low = max(0.0, min(values))
    if high - low < 0.05:  # a flat curve still needs a scale
        low = max(0.0, high - 0.05)
        high = low + 0.05
    return _axis(0, max([0.01, *(row.achieved_rate for row in rows)])), _axis(low, high)


def curve_svg(table: CalibrationTable, width: int = 720, height: int = 340) -> str:
    """The curve as an SVG element to stand in a page: achieved deferral rate against the metric, with its intervals.

    Colours come from the page's CSS variables (`--ink`, `--muted`, `--line`, `--accent`, `--surface`), with values
    for a light page where they are not set.
    """
    left, right, top, bottom = 62, 24, 22, 50
    x_ticks, y_ticks = _bounds(table)
    x_end, y_low, y_high = x_ticks[-1], y_ticks[0], y_ticks[-1]

    def x(value: float) -> float:
        return round(left + (width - left - right) * value / x_end, 1)

    def y(value: float) -> float:
        return round(height - bottom - (height - top - bottom) * (value - y_low) / (y_high - y_low), 1)

    ink, muted, line = "var(--ink,#1d2129)", "var(--muted,#5d6573)", "var(--line,#dfe3ea)"
    accent, surface = "var(--accent,#0072b2)", "var(--surface,#fff)"
    metric = escape(table.metric.replace("_", " "))
    parts = [
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" font-family="inherit" font-size="12">',
        f"<title>{metric} against the share of tokens written by assistants, task {escape(table.task)}</title>",
    ]
    for tick in y_ticks:
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick)}" y2="{y(tick)}" stroke="{line}"/>')
        parts.append(f'<text x="{left - 9}" y="{y(tick) + 4}" text-anchor="end" fill="{muted}">{_label(tick)} %</text>')
    for tick in x_ticks:
        place = f'x="{x(tick)}" y="{height - bottom + 19}"'
        parts.append(f'<text {place} text-anchor="middle" fill="{muted}">{_label(tick)} %</text>')
    middle = (left + width - right) / 2
    parts.append(
        f'<text x="{middle}" y="{height - 8}" text-anchor="middle" fill="{ink}">tokens written by an assistant</text>'
        f'<text x="14" y="{(top + height - bottom) / 2}" text-anchor="middle" fill="{ink}" '
        f'transform="rotate(-90 14 {(top + height - bottom) / 2})">{metric}</text>'
    )
    points = _points(table)
    band = [(row.achieved_rate, *row.ci95) for row, _ in points if row.ci95 is not None]
    if len(band) > 1:
        upper = [f"{x(rate)},{y(high)}" for rate, _, high in band]
        lower = [f"{x(rate)},{y(low)}" for rate, low, _ in reversed(band)]
        parts.append(f'<polygon points="{" ".join(upper + lower)}" fill="{accent}" opacity=".15"/>')
    path = " ".join(f"{x(row.achieved_rate)},{y(row.metric_value)}" for row, _ in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{accent}" stroke-width="2" stroke-linejoin="round"/>')
    for row, best in points:
        interval = "" if row.ci95 is None else f" ({row.ci95[0]:.1%} to {row.ci95[1]:.1%})"
        told = (
            f"{row.metric_value:.1%}{interval} at {row.achieved_rate:.1%} deferred; "
            f"asked for {row.target_rate:.0%}, threshold {row.threshold:.4g}"
        )
        place = f'cx="{x(row.achieved_rate)}" cy="{y(row.metric_value)}"'
        if best:
            parts.append(f'<circle {place} r="9" fill="none" stroke="{accent}" stroke-width="2"/>')
        dot = f'<circle {place} r="4.5" fill="{accent}" stroke="{surface}" stroke-width="1.5">'
        parts.append(f"{dot}<title>{told}</title></circle>")
        if best:
            # Near the right edge the label stands on the other side of its point.
            side, anchor = (-14, "end") if row.achieved_rate > 0.8 * x_end else (14, "start")
            at = f'x="{x(row.achieved_rate) + side}" y="{max(top, y(row.metric_value) - 8)}" text-anchor="{anchor}"'
            parts.append(f'<text {at} fill="{ink}" font-weight="600">best: {row.metric_value:.1%}</text>')
    return "".join(parts) + "</svg>"


def save_curve(table: CalibrationTable, folder: str | Path) -> list[Path]:
    """Write `curve.csv`, `curve.svg` and, where matplotlib is installed, `curve.png`; returns what was written."""
    folder = Path(folder)
    written = [folder / "curve.csv", folder / "curve.svg"]
    write_text(written[0], curve_csv(table))
    alone = '<svg xmlns="http://www.w3.org/2000/svg" style="font-family:sans-serif;background:#fff" '
    write_text(written[1], curve_svg(table).replace("<svg ", alone, 1) + "\n")
    try:
        save_curve_png(table, folder / "curve.png")
    except ModuleNotFoundError:
        return written
    return [*written, folder / "curve.png"]


def save_curve_png(table: CalibrationTable, path: str | Path) -> None:
    """Draw the curve with matplotlib (extra `plot`).

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        CollmError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = _points(table)
    x = [100 * row.achieved_rate for row, _ in points]
    figure = Figure(figsize=(7.2, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    with_interval = [row for row, _ in points if row.ci95 is not None]
    axes.fill_between(
        [100 * row.achieved_rate for row in with_interval],
        [100 * row.ci95[0] for row in with_interval if row.ci95],
        [100 * row.ci95[1] for row in with_interval if row.ci95],
        alpha=0.15,
        color="#0072b2",
        linewidth=0,
        label="95 % interval",
    )
    axes.plot(x, [100 * row.metric_value for row, _ in points], "o-", color="#0072b2", markersize=5)
    for row, best in points:
        if best:
            at = (100 * row.achieved_rate, 100 * row.metric_value)
            axes.plot(*at, "o", markersize=13, fillstyle="none", color="#d55e00", label=f"best: {at[1]:.1f} %")
    x_ticks, y_ticks = _bounds(table)
    axes.set_xlim(-0.01 * 100 * x_ticks[-1], 100 * x_ticks[-1])
    axes.set_ylim(100 * y_ticks[0], 100 * y_ticks[-1])
    axes.set_xlabel("tokens written by an assistant (%)")
    axes.set_ylabel(f"{table.metric.replace('_', ' ')} (%)")
    axes.set_title(f"{table.task}: {table.num_prompts} prompts", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png")
