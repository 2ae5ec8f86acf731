"""Lines and points as an SVG element that stands in a page: no script, no library.

What a reader may want to know of a point is its `<title>`, which browsers show on hover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from collm.report.axes import BOTTOM, INK, LEFT, MUTED, RIGHT, SURFACE, Frame, ticks
from collm.report.labels import Box, Room, beside_point, close_together, names_of_lines, shortened
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


@dataclass(frozen=True)
class Level:
    """What a system reaches that has no rate of its own, one model alone for instance: a dashed line."""

    name: str
    y: float
    look: int = len(COLOURS) - 1


@dataclass(frozen=True)
class Chart:
    """A curve, whatever draws it: values of a metric (a share) against `x` (a share, or a number from 0)."""

    series: tuple[Series, ...]
    title: str
    x_label: str
    y_label: str
    x_percent: bool = True
    levels: tuple[Level, ...] = ()


def bounds(
    series: Sequence[Series], x_start: float | None = 0.0, levels: Sequence[Level] = ()
) -> tuple[list[float], list[float]]:
    """Ticks of both axes that cover all points, intervals and levels; the x axis begins at `x_start`, if given."""
    points = [point for one in series for point in one.points]
    values = [value for point in points for value in (point.y, *(point.ci95 or ()))] + [level.y for level in levels]
    high, low = max(values), max(0.0, min(values))
    if high - low < 0.05:  # a flat curve still needs a scale
        low = max(0.0, high - 0.05)
        high = low + 0.05
    places = [point.x for point in points]
    start = min(places) if x_start is None else x_start
    return ticks(start, max([start + 0.01, *places])), ticks(low, high)


def chart_svg(chart: Chart, width: int = 720, height: int = 340) -> str:
    """The curve as an SVG element. One series gets a band for its intervals, several get bars, which may lie over one
    another."""
    x_ticks, y_ticks = bounds(chart.series, levels=chart.levels)
    frame = Frame(x_ticks, y_ticks, width, height)
    x_names = [f"{100 * tick:.6g} %" if chart.x_percent else f"{tick:.6g}" for tick in x_ticks]
    y_names = [f"{100 * tick:.6g} %" for tick in y_ticks]
    parts = frame.axes(chart.title, x_names, y_names, chart.x_label, chart.y_label)
    parts += [_level(frame, level) for level in chart.levels]
    room = _room(frame, chart)
    drawn = [(look(one.look), one.points) for one in chart.series]
    for (colour, _), points in drawn:
        parts += _band(frame, colour, points) if len(drawn) == 1 else _bars(frame, colour, points)
    for (colour, _), points in drawn:
        if len(points) > 1:
            path = " ".join(f"{frame.x(point.x)},{frame.y(point.y)}" for point in points)
            line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"'
            parts.append(f'<polyline points="{path}" {line}/>')
    for (colour, shape), points in drawn:
        for point in points:
            parts.append(_mark(frame.x(point.x), frame.y(point.y), colour, shape, point.told))
    for (colour, _), points in drawn:
        parts += [_note(frame, colour, point, room) for point in points if point.note]
    return "".join([*parts, *_names(frame, chart.levels, room)]) + "</svg>"


def for_page(draw: Callable[[int, int], str], height: int = 340) -> Markup:
    """A picture for wide screens and one for phones, whose letters would be too small in the other; CSS shows one.

    Args:
        draw: makes an SVG element of a width and a height.
    """
    wide, narrow = draw(720, height), draw(360, min(height, 300))
    return Markup(f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>')


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


def _room(frame: Frame, chart: Chart) -> Room:
    """The inside of the frame, with what is drawn there."""
    room = Room(_inside(frame))
    for level in chart.levels:
        room.line([(LEFT, frame.y(level.y)), (frame.width - RIGHT, frame.y(level.y))])
    for one in chart.series:
        room.line([(frame.x(point.x), frame.y(point.y)) for point in one.points])
        for point in one.points:
            room.line([(frame.x(point.x), frame.y(point.y))])
            if point.ci95 is not None and len(chart.series) > 1:
                room.line([(frame.x(point.x), frame.y(end)) for end in point.ci95])
    return room


def _inside(frame: Frame) -> Box:
    return Box(LEFT, 4, frame.width - RIGHT, frame.height - BOTTOM)


def _level(frame: Frame, level: Level) -> str:
    """A dashed line from end to end."""
    return (
        f'<path class="level" d="M{LEFT} {frame.y(level.y)}H{frame.width - RIGHT}" stroke="{look(level.look)[0]}" '
        f'stroke-width="1.5" stroke-dasharray="6 4"><title>{text(level.name)}: {level.y:.1%}</title></path>'
    )


def _names(frame: Frame, levels: Sequence[Level], room: Room) -> list[str]:
    """Of the dashed lines; where lines lie close, their names are stacked, in the order of the lines."""
    parts: list[str] = []
    heights = [frame.y(level.y) for level in levels]
    for group in close_together(heights):
        lines = [shortened(levels[i].name, f": {levels[i].y:.1%}", room.frame.right - room.frame.left) for i in group]
        top, bottom = heights[group[0]], heights[group[-1]]
        words = room.put(names_of_lines(lines, top, bottom, room.frame))
        parts += [
            f'<text class="name" x="{words.x}" y="{y}" text-anchor="{words.anchor}" font-size="{words.size}" '
            f'fill="{MUTED}" stroke="{SURFACE}" stroke-width="3" paint-order="stroke">{text(line)}</text>'
            for line, y in zip(words.lines, words.baselines, strict=True)
        ]
    return parts


def _note(frame: Frame, colour: str, point: Point, room: Room) -> str:
    x, y = frame.x(point.x), frame.y(point.y)
    ring = f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="{colour}" stroke-width="2"/>'
    words = room.put(beside_point(point.note, x, y, room.frame))
    return ring + (
        f'<text x="{words.x}" y="{words.y}" text-anchor="{words.anchor}" fill="{INK}" font-weight="600" '
        f'stroke="{SURFACE}" stroke-width="3" paint-order="stroke">{text(point.note)}</text>'
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
