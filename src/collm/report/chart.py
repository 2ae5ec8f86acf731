"""Lines and points as an SVG element that stands in a page: no script, no library.

What a reader may want to know of a point is its `<title>`, which browsers show on hover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collm.report.axes import INK, LEFT, MUTED, SURFACE, TOP, Frame, ticks
from collm.report.samples import text

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
    frame = Frame(x_ticks, y_ticks, width, height)
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


def _note(frame: Frame, colour: str, point: Point) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    ring = f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="{colour}" stroke-width="2"/>'
    anchor = "end" if x > frame.width - 130 else "start" if x < LEFT + 60 else "middle"
    # Above the point, unless the picture ends there.
    place = y - 15 if y > TOP + 20 else y + 25
    return ring + (
        f'<text x="{x}" y="{place}" text-anchor="{anchor}" fill="{INK}" font-weight="600">{text(point.note)}</text>'
    )


def _band(frame: Frame, colour: str, points: Sequence[Point]) -> list[str]:
    known = [(point.x, *point.ci95) for point in points if point.ci95 is not None]
    if len(known) < 2:
        return _bars(frame, colour, points)
    upper = [f"{frame.x(x)},{frame.y(high)}" for x, _, high in known]
    lower = [f"{frame.x(x)},{frame.y(low)}" for x, low, _ in reversed(known)]
    return [f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity=".15"/>']


def _bars(frame: Frame, colour: str, points: Sequence[Point]) -> list[str]:
    return [
        f'<path d="M{frame.x(point.x)} {frame.y(point.ci95[0])}V{frame.y(point.ci95[1])}" stroke="{colour}" '
        'stroke-width="1.3" opacity=".6"/>'
        for point in points
        if point.ci95 is not None
    ]
