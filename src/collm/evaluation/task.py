"""Tasks: how an answer is found in a text and compared with the gold answer.

A task is versioned: whoever changes what it counts as right raises its `version`, so that figures of different rules
are never compared unawares. A text in which no answer is found is wrong; no text makes a task raise.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING

from collm.errors import CollmError
from collm.models.arithmetic import continuation

if TYPE_CHECKING:
    from collm.data.examples import Example

MARK = "####"

# A number with its sign, currency and percent sign. A "-" after a digit, letter or ")" is an operator, not a sign.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).%])[-−])?[$£€¥]?\s?(?P<inner>(?<![\d.])-)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAID = re.compile(r"\b(?:final\s+)?answer\s*(?:is|:|=)\s*(?P<rest>[^\n]*)", re.IGNORECASE)


def _canonical(match: re.Match[str]) -> str:
    value = Decimal(match["digits"].replace(",", ""))
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return f"-{text}" if (match["sign"] or match["inner"]) and value != 0 else text


def _ascii_digits(text: str) -> str:
    return unicodedata.normalize("NFKC", text) if not text.isascii() else text


def first_number(text: str) -> str | None:
    """The first number in `text` in one spelling: `$1,000.50` is `1000.5`, `5.0` is `5`, `−3` is `-3`; None if none.

    Of an equation, the number after its last "=" is meant: `3 * 4 = 12` is `12`.
    """
    text = _ascii_digits(text)
    result = text.rpartition("=")[2]
    match = _NUMBER.search(result) or _NUMBER.search(text)
    return _canonical(match) if match else None


def last_number(text: str) -> str | None:
    """The last number in `text`, spelled as in `first_number`."""
    matches = list(_NUMBER.finditer(_ascii_digits(text)))
    return _canonical(matches[-1]) if matches else None


def marked(text: str) -> str | None:
    """What stands after the first `####` up to the end of its line: what follows is run-on text, not a second try."""
    _, mark, rest = text.partition(MARK)
    rest = rest.lstrip("#").strip(" \t").partition("\n")[0].strip()
    return rest or None if mark else None


def marked_number(text: str) -> str | None:
    """The number that the text marks with `####`."""
    answer = marked(text)
    return first_number(answer) if answer is not None else None


def any_number(text: str) -> str | None:
    """The number a text means, marked or not, for models that were not taught the mark.

    The first of: `#### 12`; the last non-empty `\\boxed{12}`; the last "the answer is 12"; the last number.
    """
    if MARK in text:
        return marked_number(text)
    boxed = [number for content in _BOXED.findall(text) if (number := first_number(content)) is not None]
    if boxed:
        return boxed[-1]
    said = [number for match in _SAID.finditer(text) if (number := first_number(match["rest"])) is not None]
    return said[-1] if said else last_number(text)


def normalised(text: str) -> str | None:
    """A short answer in one spelling: a lone number as in `first_number`, else lower case without outer punctuation."""
    text = _ascii_digits(text).strip()
    number = re.fullmatch(rf"{_NUMBER.pattern}\s*%?\.?", text)
    if number:
        return _canonical(number)
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*") or None


def marked_text(text: str) -> str | None:
    """What the text marks with `####`, normalised."""
    answer = marked(text)
    return normalised(answer) if answer is not None else None


@dataclass(frozen=True)
class Task:
    """`extract` finds the answer in a text a model wrote, `read_gold` in the `answer` field of an example.

    `marked`: only an answer after `####` counts. `arithmetic`: the texts show equations whose correctness is counted.
    """

    name: str
    version: int
    extract: Callable[[str], str | None]
    read_gold: Callable[[str], str | None]
    marked: bool
    metric: str = "exact_match"
    arithmetic: bool = False

    def gold(self, example: Example) -> str:
        """The gold answer: the field `answer`, else what `extract` finds in the last assistant turn.

        Raises:
            CollmError: the example has no answer in either place.
        """
        field = example.fields.get("answer")
        if field is not None and not isinstance(field, dict | list):
            text = str(field)
            answer = self.extract(text) if MARK in text else self.read_gold(text)
        else:
            answer = self.extract(example.reference or "")
        if answer is None:
            where = f"an answer after {MARK}" if self.marked else "an answer"
            raise CollmError(
                f'{example.label} has no gold answer for task {self.name!r}: give it a field "answer", '
                f"or {where} in its last assistant turn"
            )
        return answer

    def score(self, text: str, gold: str) -> float:
        """1 if the answer in `text` is the gold answer, else 0."""
        return float(self.extract(text) == gold)

    def further(
        self, answers: Sequence[str | None], golds: Sequence[str]
    ) -> dict[str, tuple[float, tuple[float, float]]]:
        """The metrics beside the main one: value and 95 % interval of each, by name."""
        return {}


def equations(text: str) -> tuple[int, int]:
    """How many equations `expression = number` the text shows correctly, and how many it shows at all.

    Exact arithmetic, the result rounded half-up to 4 decimals, or to as many as the text writes.
    """
    right = shown = 0
    for line in text.splitlines():
        for sign in re.finditer("=", line):
            expected = continuation(line[: sign.end()])
            written = re.match(rf"\s*{_NUMBER.pattern}", line[sign.end() :])
            if expected is None or written is None:
                continue
            shown += 1
            places = len(written["digits"].partition(".")[2])
            rounded = {first_number(continuation(line[: sign.end()], n) or "") for n in {min(places, 4), 4}}
            right += _canonical(written) in rounded
    return right, shown


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("exact_match", 1, marked_text, normalised, marked=True),
            Task("gsm8k", 1, marked_number, first_number, marked=True, arithmetic=True),
            Task("gsm8k_flexible", 1, any_number, first_number, marked=False, arithmetic=True),
            Task("word_problems", 1, marked_number, first_number, marked=True, arithmetic=True),
            Task("word_problems_flexible", 1, any_number, first_number, marked=False, arithmetic=True),
        )
    }
)
"""The tasks shipped. `exact_match` compares short answers of any kind, the others numbers; the `_flexible` ones take
an unmarked answer, too, which is what a model that never saw `####` deserves."""


def get_task(name: str) -> Task:
    """The shipped task of that name.

    Raises:
        CollmError: unknown; the message names the nearest.
    """
    if name not in TASKS:
        import difflib

        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CollmError(f"unknown task {name!r}{hint} (there are: {', '.join(TASKS)})")
    return TASKS[name]
