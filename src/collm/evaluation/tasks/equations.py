"""Arithmetic that a text shows: how many of its equations are computed right."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

from collm.evaluation.tasks.answers import NUMBER, canonical, first_number
from collm.models.arithmetic import continuation

DECIMALS = 4
"""To which a result is rounded (half-up), as the calculator writes it; or to as many as the text writes."""
_WRITTEN = re.compile(rf"\s*{NUMBER.pattern}(?P<percent>\s?%)?")
_EXPRESSION = re.compile(r"[\s\d.,$%()+*/×÷xX^−–-]+")
_TWO_THINGS = re.compile(r",\s|[\d)]\s+[\d(]")


def equations(text: str) -> tuple[int, int]:
    """How many equations `expression = result` the text shows correctly, and how many it shows at all.

    Exact arithmetic. A result is a number, or in a chain the next expression: `2 * 3 + 1 = 6 + 1 = 7` are two. `2 / 3 =
    0.67` is right, for a result may be rounded to the decimals it is written with, but not to a whole number.
    """
    right = shown = 0
    for line in text.splitlines():
        ends = [sign.end() for sign in re.finditer("=", line)]
        for end, next_end in itertools.pairwise([*ends, len(line) + 1]):
            expected = _value(line[:end])
            if expected is None:
                continue
            result = line[end : next_end - 1]
            if next_end <= len(line) and (further := _chained(result)) is not None:
                shown += 1
                right += further == expected
            elif written := _WRITTEN.match(result):
                shown += 1
                right += _agrees(line[:end], written)
    return right, shown


def _value(line: str, decimals: int = DECIMALS) -> str | None:
    """Of the expression before the "=" that ends `line`, in one spelling."""
    found = continuation(line, decimals)
    return None if found is None else first_number(found)


def _chained(result: str) -> str | None:
    """The value of what stands between two "=" if that is an expression itself, and nothing else."""
    if not _EXPRESSION.fullmatch(result) or _TWO_THINGS.search(result.strip()):
        return None
    return _value(f"{result}=")


def _agrees(line: str, written: re.Match[str]) -> bool:
    value = Fraction(canonical(written))
    places = len(written["digits"].partition(".")[2])
    if written["percent"] and not (continuation(line) or "").endswith("%"):  # 60% * 50% is 0.3, which is 30%
        value, places = value / 100, places + 2
    if written["over"]:
        return abs(value - Fraction(_value(line, 12) or 0)) < Fraction(1, 10**11)
    return value in {Fraction(_value(line, n) or 0) for n in {DECIMALS, places or DECIMALS}}
