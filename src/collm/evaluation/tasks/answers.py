"""Where an answer stands in a text, and its one spelling.

These rules belong to versioned tasks: a change to one of them raises the version of every task that uses it.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

MARK = "####"

# A number with its sign, currency and percent sign. A "-" after a digit, letter or ")" is an operator, not a sign.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w).%])[-−])?[$£€¥]?\s?(?P<inner>(?<![\d.])-)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAID = re.compile(r"\b(?:final\s+)?answer\s*(?:is|:|=)\s*(?P<rest>[^\n]*)", re.IGNORECASE)

_SAYS = re.compile(r"\banswers?\s*(?:is|are|:|=)\s*:?", re.IGNORECASE)


def canonical(match: re.Match[str]) -> str:
    """The one spelling of a number that `NUMBER` matched."""
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
    match = NUMBER.search(result) or NUMBER.search(text)
    return canonical(match) if match else None


def last_number(text: str) -> str | None:
    """The last number in `text`, spelled as in `first_number`."""
    matches = list(NUMBER.finditer(_ascii_digits(text)))
    return canonical(matches[-1]) if matches else None


def marked(text: str) -> str | None:
    """What stands after the first `####` up to the end of its line: what follows is run-on text, not a second try."""
    _, mark, rest = text.partition(MARK)
    rest = rest.lstrip("#").strip(" \t").partition("\n")[0].strip()
    return rest or None if mark else None


def said(text: str) -> list[str]:
    """What follows each "answer is", "answers are" or "answer:", up to the end of its line."""
    return [text[match.end() :].partition("\n")[0] for match in _SAYS.finditer(text)]


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
    number = re.fullmatch(rf"{NUMBER.pattern}\s*%?\.?", text)
    if number:
        return canonical(number)
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*") or None


def marked_text(text: str) -> str | None:
    """What the text marks with `####`, normalised."""
    answer = marked(text)
    return normalised(answer) if answer is not None else None
