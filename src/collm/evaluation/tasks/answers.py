"""Where an answer stands in a text, and its one spelling.

These rules belong to versioned tasks: a change to one of them raises the version of every task that uses it.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from collm.evaluation.tasks.boxes import boxed

MARK = "####"

_CURRENCY = "[$£€¥]"
# "7" in "7:30", "7²" or "7^2" is no number by itself, nor is "50" in "1.234,50" or in "1'50".
_BEFORE = r"(?<![\d^])(?<!\d[:.,'’\u00a0\u2009\u202f])(?<!\d\{,\})(?<!\d\\,)"
_THOUSANDS = r"(?:,|\{,\}|\\,|[\u00a0\u2009\u202f])"
_POINTS = rf"(?:{_THOUSANDS}|[.'’])"
_BEHIND = rf"(?!\d|:\d|{_POINTS}\d|\^|[²³¹⁰⁴-⁹])"
# A number with its sign, currency, exponent and denominator. A sign stands right before its number and not right behind
# a digit, a letter or ")": there "-" is an operator, and before a space a dash or a bullet.
NUMBER = re.compile(
    rf"(?P<sign>(?<![\w).%])[-−–](?={_CURRENCY}|\.?\d))?(?:{_CURRENCY}\s?(?P<inner>[-−](?=\.?\d))?)?"
    rf"{_BEFORE}(?:(?P<whole>\d+)\s+(?=\d+/\d))?"
    rf"(?P<digits>(?:\d{{1,3}}(?:{_THOUSANDS}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    rf"(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\w))?(?:/(?P<over>0*[1-9]\d*)(?![\d/]))?{_BEHIND}"
)
# Digits in groups that have no one meaning: "1,23,456", "1.234,50", "1'000", or within a sentence "1 000".
_FIGURE = re.compile(
    rf"{_BEFORE}(?P<spaced>\d{{1,3}}(?: \d{{3}})+)(?![\d/])|{NUMBER.pattern}|{_BEFORE}(?P<grouped>\d+(?:{_POINTS}\d+)+)"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d))")
_SIGN_APART = re.compile(rf"\s*[-−–]\s+(?={_CURRENCY}?\s?\.?\d)")
_SPACED_THOUSANDS = re.compile(rf"\s*(?:[-−–]\s?)?{_CURRENCY}?\s?\d{{1,3}}(?: \d{{3}})+(?:\.\d+)?\s*\.?\s*")
_SAYS = re.compile(
    r"\banswers?\s*(?:to\s+(?:the|this|your)\s+(?:question|problem)\s*)?(?:is|are|:|=)\s*:?", re.IGNORECASE
)


def canonical(match: re.Match[str]) -> str:
    """The one spelling of a number that `NUMBER` matched: a decimal, or where that has no end, `1/3`."""
    number = Decimal(f"{re.sub(r'[^0-9.]', '', match['digits'])}E{match['exponent'] or 0}")
    minus = "-" if (match["sign"] or match["inner"]) and number != 0 else ""
    if match["over"] is not None:
        value = Fraction(number) / int(match["over"]) + int(match["whole"] or 0)
        places = _places(value.denominator)
        if places is None:
            return f"{minus}{value.numerator}/{value.denominator}"
        number = Decimal(f"{int(value * 10**places)}E-{places}")
    text = f"{number:f}"
    return minus + (text.rstrip("0").rstrip(".") if "." in text else text)


def _places(denominator: int) -> int | None:
    """Decimal places that a fraction in lowest terms takes, None where they have no end."""
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    return max(twos, fives) if denominator == 1 else None


def _plain(text: str) -> str:
    r"""With the digits 0 to 9, and `\frac12` and `½` as 1/2; superscripts stay, for 5² is not 52."""
    if not text.isascii():
        text = "".join(map(_plain_letter, text))
    return _LATEX_FRACTION.sub(r"\1\3/\2\4", text) if "frac" in text else text


def _plain_letter(letter: str) -> str:
    if unicodedata.category(letter) == "Nd":
        return str(unicodedata.digit(letter))
    compatible = unicodedata.normalize("NFKC", letter)
    if "⁄" in compatible:
        return " " + compatible.replace("⁄", "/")
    return compatible if "\uff01" <= letter <= "\uff5e" else letter


def first_number(text: str) -> str | None:
    """The first number in `text` in one spelling: `$1,000.50` is `1000.5`, `5.0` is `5`, `−3` is `-3`; None if none.

    Of an equation, the number after its last "=" is meant: `3 * 4 = 12` is `12`. A sign that opens the place may stand
    apart: `- 3`. A number whose digits are grouped in no way that has one meaning (`1,23,456`, `1.234,50`) is none, and
    no other number stands for it.
    """
    match = _first_figure(text)
    return _spelled(match) if match else None


def _first_figure(text: str) -> re.Match[str] | None:
    text = _plain(text)
    result = text.rpartition("=")[2]
    if _SPACED_THOUSANDS.fullmatch(result):
        result = result.replace(" ", "")
    apart = _SIGN_APART.match(result)
    if apart:
        result = "-" + result[apart.end() :]
    return _FIGURE.search(result) or _FIGURE.search(text)


def _spelled(figure: re.Match[str]) -> str | None:
    return None if figure["grouped"] or figure["spaced"] else canonical(figure)


def last_number(text: str) -> str | None:
    """The last number in `text`, spelled as in `first_number`."""
    matches = list(_FIGURE.finditer(_plain(text)))
    return _spelled(matches[-1]) if matches else None


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

    The first of: `#### 12`; the last `\\boxed{12}` with a number; the last "the answer is 12"; the last number. None
    where the last box never closes.
    """
    if MARK in text:
        return marked_number(text)
    boxes = boxed(text)
    if boxes is None:
        return None
    for places in (boxes, said(text)):
        figures = [figure for place in places if (figure := _first_figure(place)) is not None]
        if figures:
            return _spelled(figures[-1])
    return last_number(text)


def normalised(text: str) -> str | None:
    """A short answer in one spelling: a lone number as in `first_number`, else lower case without outer punctuation."""
    number = re.fullmatch(rf"{NUMBER.pattern}\s*%?\.?", _plain(text).strip())
    if number:
        return canonical(number)
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`*") or None


def marked_text(text: str) -> str | None:
    """What the text marks with `####`, normalised."""
    answer = marked(text)
    return normalised(answer) if answer is not None else None
