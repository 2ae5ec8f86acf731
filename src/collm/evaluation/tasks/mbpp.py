"""Programs as answers: MBPP, Mostly Basic Python Problems (Austin et al. 2021), where the tests judge.

An answer is the program itself, a gold one the JSON list of sources that are run after it: the problem's own
preparation, where there is some, and its tests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from collm.evaluation.tasks.sandbox import passes

PASS = "pass@1"

_FENCED = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+.-]*)[^\n]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)
_LANGUAGES = ("", "python", "python3", "py")
_DEFINES = re.compile(r"^(?:def|class|async def)\b|^\w+\s*=\s*lambda\b", re.MULTILINE)
_BEGINS = re.compile(
    r"^(?:(?:async )?def \w+ ?\(|class \w+ ?[:(]|@\w|import [\w.]+(?:,| as |\s*$)|from [\w.]+ import )", re.MULTILINE
)
_DONE = "[DONE]"
"""Where the problems' authors let an answer end."""


def program(text: str) -> str | None:
    """The program in a text: the first fenced block that defines something, else the first fenced block; without one,
    what begins with an import or a definition, up to `[DONE]` or the end. None where there is neither."""
    blocks = [match["code"] for match in _FENCED.finditer(text) if match["language"].lower() in _LANGUAGES]
    if blocks:
        found = next((code for code in blocks if _DEFINES.search(code)), blocks[0])
    else:
        start = _BEGINS.search(text)
        found = text[start.start() :].partition(_DONE)[0] if start else ""
    found = found.strip("\n")
    return found if found.strip() else None


def tests_field(field: Any) -> str | None:
    """The gold answer of the field `answer`: a list of sources, at least one."""
    if not isinstance(field, list) or not field or not all(isinstance(test, str) and test.strip() for test in field):
        return None
    return json.dumps(field, ensure_ascii=False)


def judge_program(answer: str | None, gold: str, *, sandboxed: bool = True) -> Mapping[str, float]:
    """Whether the program stands its tests."""
    return {PASS: float(answer is not None and passes([answer, *json.loads(gold)], sandboxed=sandboxed))}
