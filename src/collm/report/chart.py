"""Charts as SVG elements that stand in a page: its colours in light and dark, no script, no library.

Colours come from the page's CSS variables (`--ink`, `--muted`, `--line`, `--accent`, `--surface`, `--a1` to `--a6`),
with values for a light page where they are not set. What a reader may want to know of a point is its `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from collm.report.samples import text

INK, MUTED, LINE = "var(--ink,#1d2129)", "var(--muted,#5d6573)", "var(--line,#dfe3ea)"
SURFACE = "var(--surface,#fff)"
COLOURS = (
    "var(--accent,#0072b2)",
    "var(--a1,#e69f00)",
    "var(--a3,#009e73)",
    "var(--a4,#cc79a7)",
    "var(--a5,#d55e00)",
    "var(--a2,#56b4e9)",
    "var(--a6,#a79a00)",
    MUTED,
)
SHAPES = ("circle", "square", "diamond", "triangle", "cross")
LEFT, RIGHT, TOP, BOTTOM = 62, 24, 22, 50


@dataclass(frozen=True)
class Point:
    """`y` with its interval at `x`; `told` is shown on hover, `note` beside the point, which is ringed then."""

    x: float
    y: float
    ci95: tuple[float, float] | None = None
    told: str = ""
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one system by `x`; more than one are joined by a line. `look`: the number of its colour and shape."""

    name: str
    points: tuple[Point, ...]
    look: int = 0


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that cover `[low, high]`."""
    span = max(high - low, 1e-6)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where values lie in a picture of `width` x `height`."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    width: int
    height: int

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(LEFT + (self.width - LEFT - RIGHT) * (value - low) / (high - low), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(self.height - BOTTOM - (self.height - TOP - BOTTOM) * (value - low) / (high - low), 1)

    def axes(self, title: str, x_names: Sequence[str], y_names: Sequence[str], x_label: str, y_label: str) -> list[str]:
        """The opening tag, the title, grid lines and labels."""
        end = self.width - RIGHT
        parts = [
            f'<svg class="curve" viewBox="0 0 {self.width} {self.height}" role="img" font-family="inherit" '
            f'font-size="12"><title>{text(title)}</title>'
        ]
        for tick, name in zip(self.y_ticks, y_names, strict=True):
            y = self.y(tick)
            parts.append(f'<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}" stroke="{LINE}"/>')
            parts.append(f'<text x="{LEFT - 9}" y="{y + 4}" text-anchor="end" fill="{MUTED}">{name}</text>')
        for tick, name in zip(self.x_ticks, x_names, strict=True):
            place = f'x="{self.x(tick)}" y="{self.height - BOTTOM + 19}"'
            parts.append(f'<text {place} text-anchor="middle" fill="{MUTED}">{name}</text>')
        middle = (TOP + self.height - BOTTOM) / 2
        told = f'text-anchor="middle" fill="{INK}"'
        parts.append(
            f'<text x="{(LEFT + end) / 2}" y="{self.height - 8}" {told}>{text(x_label)}</text>'
            f'<text x="14" y="{middle}" {told} transform="rotate(-90 14 {middle})">{text(y_label)}</text>'
        )
        return parts


def bounds(series: Sequence[Series], x_start: float | None = 0.0) -> tuple[list[float], list[float]]:
    """Ticks of both axes that cover all points and their intervals; the x axis begins at `x_start`, if given."""
    points = [point for one in series for point in one.points]
    values = [value for point in points for value in (point.y, *(point.ci95 or ()))]
    high, low = max(values), max(0.0, min(values))
    if high - low < 0.05:  # a flat curve still needs a scale
        low = max(0.0, high - 0.05)
        high = low + 0.05
    places = [point.x for point in points]
    start = min(places) if x_start is None else x_start
    return ticks(start, max([start + 0.01, *places])), ticks(low, high)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_percent: bool = True,
    width: int = 720,
    height: int = 340,
) -> str:
    """Values of a metric (a share) against `x` (a share, or a number from 0). One series gets a band for its intervals,
    several get bars, which may lie over one another."""
    x_ticks, y_ticks = bounds(series)
    frame = _Frame(x_ticks, y_ticks, width, height)
    x_names = [f"{100 * tick:.6g} %" if x_percent else f"{tick:.6g}" for tick in x_ticks]
    parts = frame.axes(title, x_names, [f"{100 * tick:.6g} %" for tick in y_ticks], x_label, y_label)
    drawn = [(look(one.look), one.points) for one in series]
    for (colour, _), points in drawn:
        parts += _band(frame, colour, points) if len(series) == 1 else _bars(frame, colour, points)
    for (colour, _), points in drawn:
        if len(points) > 1:
            path = " ".join(f"{frame.x(point.x)},{frame.y(point.y)}" for point in points)
            line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"'
            parts.append(f'<polyline points="{path}" {line}/>')
    for (colour, shape), points in drawn:
        for point in points:
            parts.append(_mark(frame.x(point.x), frame.y(point.y), colour, shape, point.told))
            if point.note:
                parts.append(_note(frame, colour, point))
    return "".join(parts) + "</svg>"


def look(number: int) -> tuple[str, str]:
    """Colour and shape: no two of the first forty look alike."""
    return COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]


def key_svg(number: int) -> str:
    """The mark of a series of this look, for a legend."""
    return f'<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">{_mark(7, 7, *look(number), "")}</svg>'


def _mark(x: float, y: float, colour: str, shape: str, told: str) -> str:
    title = f"<title>{text(told)}</title>" if told else ""
    paint = f'fill="{colour}" stroke="{SURFACE}" stroke-width="1.5"'
    if shape == "circle":
        return f'<circle cx="{x}" cy="{y}" r="4.5" {paint}>{title}</circle>'
    paths = {
        "square": "M-4.2-4.2H4.2V4.2H-4.2Z",
        "diamond": "M0-6L6 0L0 6L-6 0Z",
        "triangle": "M0-5.6L5.6 4.4H-5.6Z",
        "cross": "M-1.8-5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",
    }
    return f'<path d="{paths[shape]}" transform="translate({x} {y})" {paint}>{title}</path>'


def _note(frame: _Frame, colour: str, point: Point) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    ring = f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="{colour}" stroke-width="2"/>'
    anchor = "end" if x > frame.width - 130 else "start" if x < LEFT + 60 else "middle"
    # Above the point, unless the picture ends there.
    place = y - 15 if y > TOP + 20 else y + 25
    return ring + (
        f'<text x="{x}" y="{place}" text-anchor="{anchor}" fill="{INK}" font-weight="600">{text(point.note)}</text>'
    )


def _band(frame: _Frame, colour: str, points: Sequence[Point]) -> list[str]:
    known = [(point.x, *point.ci95) for point in points if point.ci95 is not None]
    if len(known) < 2:
        return _bars(frame, colour, points)
    upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in known]
    lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(known)]
    return [f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity=".15"/>']


def _bars(frame: _Frame, colour: str, points: Sequence[Point]) -> list[str]:
    return [
        f'<path d="M{frame.x(point.x)} {frame.y(point.ci95[0])}V{frame.y(point.ci95[1])}" stroke="{colour}" '
        'stroke-width="1.3" opacity=".6"/>'
        for point in points
        if point.ci95 is not None
    ]


def histogram(
    counts: Sequence[Sequence[int]],
    names: Sequence[str],
    colours: Sequence[str],
    *,
    bin_names: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    mark: float | None = None,
    width: int = 720,
    height: int = 280,
) -> str:
    """Counts per bin, `[series][bins]`, side by side on a logarithmic scale; a bin without any has no bar.

    Args:
        bin_names: of the edges between bins, one fewer than there are bins; an empty one is not written.
        mark: where a dashed line is drawn, in bins from the left end.
    """
    bins = len(counts[0])
    decades = max(1, math.ceil(math.log10(max(2, *(count for row in counts for count in row)))))
    frame = _Frame(range(bins + 1), [-0.3, *range(decades + 1)], width, height)
    edges = ["", *bin_names, ""]
    parts = frame.axes(title, edges, ["", *(f"{10**tick:,}" for tick in range(decades + 1))], x_label, y_label)
    step = (frame.x(1) - frame.x(0)) * 0.84 / len(counts)
    floor = height - BOTTOM
    for index, (row, name, colour) in enumerate(zip(counts, names, colours, strict=True)):
        for place, count in enumerate(row):
            if count:
                top = frame.y(math.log10(count))
                left = round(frame.x(place) + (frame.x(1) - frame.x(0)) * 0.08 + index * step, 1)
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{step:.1f}" height="{floor - top:.1f}" fill="{colour}">'
                    f"<title>{text(name)}: {count:,}</title></rect>"
                )
    if mark is not None:
        x = frame.x(mark)
        parts.append(
            f'<path d="M{x} {TOP}V{floor}" stroke="{INK}" stroke-dasharray="4 3"/>'
            f'<text x="{x + 5}" y="{TOP + 2}" fill="{INK}">threshold</text>'
        )
    return "".join(parts) + "</svg>"
