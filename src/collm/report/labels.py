"""Where words stand in a chart: clear of lines, marks and one another, as far as there is room."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

LINE_HEIGHT = 13
GAP = 5
"""Between a line and the words above it."""
ON_WORDS = 1000.0
"""What lying on other words, or outside of the frame, counts beside lying on a point of a line."""
ASIDE = 20
"""Pixels between two places that are tried."""
FAR = 8.0
"""As many pixels apart are as bad as lying on one point of a line."""
STEP = 4.0
"""Between the points that stand for a line."""

Place = tuple[float, float]


def width_of(words: str, size: float = 11) -> float:
    """About how wide they are, whatever the page's font is."""
    return 0.56 * size * cell_len(words)


def shortened(words: str, after: str, room: float, size: float = 11) -> str:
    """`words` and what must stand after them, in so many pixels: an ellipsis where some of the words are left out."""
    if width_of(words + after, size) <= room:
        return words + after
    return set_cell_size(words, max(1, int((room - width_of(after, size)) / (0.56 * size)) - 1)).rstrip() + "…" + after


@dataclass(frozen=True)
class Box:
    """A rectangle of the picture; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def holds(self, place: Place, margin: float = 0.0) -> bool:
        x, y = place
        return self.left - margin < x < self.right + margin and self.top - margin < y < self.bottom + margin

    def outside(self, frame: Box) -> bool:
        """Whether a part of it is."""
        return self.left < frame.left or self.right > frame.right or self.top < frame.top or self.bottom > frame.bottom


@dataclass(frozen=True)
class Words:
    """Lines of text under one another: `y` is the baseline of the first, `anchor` as SVG has it."""

    lines: tuple[str, ...]
    x: float
    y: float
    anchor: str
    size: float = 11
    apart: float = 0.0
    """How far they are from where they would stand best, in pixels."""

    @property
    def baselines(self) -> list[float]:
        return [round(self.y + LINE_HEIGHT * number, 1) for number in range(len(self.lines))]

    @property
    def box(self) -> Box:
        width = max(width_of(line, self.size) for line in self.lines)
        left = {"start": self.x, "middle": self.x - width / 2, "end": self.x - width}[self.anchor]
        return Box(left, self.y - 0.8 * self.size, left + width, self.baselines[-1] + 0.25 * self.size)


class Room:
    """The inside of a frame, and what lies there already."""

    def __init__(self, frame: Box) -> None:
        self.frame = frame
        self._points: list[Place] = []
        self._words: list[Box] = []

    def line(self, places: Sequence[Place]) -> None:
        """A line through these places; a single one is a mark."""
        for (x, y), (x_end, y_end) in zip(places, places[1:], strict=False):
            steps = max(1, math.ceil(math.dist((x, y), (x_end, y_end)) / STEP))
            self._points += [(x + (x_end - x) * i / steps, y + (y_end - y) * i / steps) for i in range(steps + 1)]
        if len(places) == 1:
            [(x, y)] = places
            self._points += 2 * [(x + right, y + down) for right in (-5, 0, 5) for down in (-5, 0, 5)]

    def put(self, candidates: Iterable[Words]) -> Words:
        """The candidate that lies on least and is least apart; from now on others keep clear of it."""
        best = min(candidates, key=lambda words: self._covered(words.box) + words.apart / FAR)
        self._words.append(best.box)
        return best

    def _covered(self, box: Box) -> float:
        on_words = sum(box.meets(other) for other in self._words) + box.outside(self.frame)
        return ON_WORDS * on_words + sum(box.holds(point, margin=1.5) for point in self._points)


def close_together(heights: Sequence[float]) -> list[list[int]]:
    """Horizontal lines, by their numbers, in groups from the top one down: the names of a group, stacked above its
    topmost line, reach no line above it."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    groups: list[list[int]] = []
    for number in order:
        groups.append([number])
        while len(groups) > 1 and heights[groups[-1][0]] - _stacked(len(groups[-1])) < heights[groups[-2][-1]]:
            last = groups.pop()
            groups[-1] += last
    return groups


def _stacked(count: int) -> float:
    return GAP + LINE_HEIGHT * count


def names_of_lines(lines: Sequence[str], top: float, bottom: float, frame: Box) -> Iterator[Words]:
    """Where the names of a group of lines may stand: anywhere above the topmost, or just below the lowest; the nearer
    and the further right the better."""
    width = min(frame.right - frame.left - GAP, max(map(width_of, lines)))
    above, most = top - GAP - LINE_HEIGHT * (len(lines) - 1), int(top - frame.top - _stacked(len(lines)))
    heights = [*range(0, max(1, most), ASIDE // 2), top - bottom - _stacked(len(lines))]
    for end in range(int(frame.right), int(frame.left + width), -ASIDE):
        for up in heights:
            apart = up if up >= 0 else LINE_HEIGHT
            yield Words(tuple(lines), end, round(above - up, 1), "end", apart=apart + 0.1 * (frame.right - end))


def beside_point(note: str, x: float, y: float, frame: Box, size: float = 12) -> list[Words]:
    """Where the note of a ringed point may stand: above it first, inside the frame."""
    half = width_of(note, size) / 2
    middle = round(min(max(x, frame.left + half), frame.right - half), 1)
    return [
        Words((note,), middle, y - 15, "middle", size),
        Words((note,), middle, y + 25, "middle", size),
        Words((note,), x + 14, y + 4, "start", size),
        Words((note,), x - 14, y + 4, "end", size),
    ]
