"""Arithmetic that a text shows: how many of its equations are computed right."""

from __future__ import annotations

import re

from collm.evaluation.tasks.answers import NUMBER, canonical, first_number
from collm.models.arithmetic import continuation


def equations(text: str) -> tuple[int, int]:
    """How many equations `expression = number` the text shows correctly, and how many it shows at all.

    Exact arithmetic, the result rounded half-up to 4 decimals, or to as many as the text writes.
    """
    right = shown = 0
    for line in text.splitlines():
        for sign in re.finditer("=", line):
            expected = continuation(line[: sign.end()])
            written = re.match(rf"\s*{NUMBER.pattern}", line[sign.end() :])
            if expected is None or written is None:
                continue
            shown += 1
            places = len(written["digits"].partition(".")[2])
            rounded = {first_number(continuation(line[: sign.end()], n) or "") for n in {min(places, 4), 4}}
            right += canonical(written) in rounded
    return right, shown
