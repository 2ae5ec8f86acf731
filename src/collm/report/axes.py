"""The frame of a chart, an SVG element that stands in a page: it has the page's colours in light and dark.

Colours come from the page's CSS variables (`--ink`, `--muted`, `--line`, `--surface`; for series `--accent` and the
authors' `--a1` to `--a6`), with values for a light page where they are not set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from collm.report.samples import text

INK, MUTED, LINE = "var(--ink,#1d2129)", "var(--muted,#5d6573)", "var(--line,#dfe3ea)"
SURFACE = "var(--surface,#fff)"
LEFT, RIGHT, TOP, BOTTOM = 68, 24, 22, 50


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that cover `[low, high]`."""
    span = max(high - low, 1e-6)
    power = 10 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
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
        # On a phone, names would run into one another.
        every = -(-sum(map(bool, x_names)) // 6) if self.width < 500 else 1
        shown = [number for number, name in enumerate(x_names) if name][::every]
        x_names = [name if number in shown else "" for number, name in enumerate(x_names)]
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
            f'<text x="12" y="{middle}" {told} transform="rotate(-90 12 {middle})">{text(y_label)}</text>'
        )
        return parts
