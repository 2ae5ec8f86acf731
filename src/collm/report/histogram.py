"""A histogram as an SVG element that stands in a page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from collm.report.axes import BOTTOM, INK, TOP, Frame
from collm.report.samples import text


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
    frame = Frame(range(bins + 1), [-0.3, *range(decades + 1)], width, height)
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
