r"""Mathematical answers: where `\boxed{...}` stands, and whether two expressions mean the same.

Equality is that of math-verify (Kydlíček and Gandenberger 2025; package `math-verify`, extra `eval`): numbers,
fractions, roots, sets, intervals, matrices and equations by value, not by spelling. What it cannot read is compared as
text.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from decimal import Decimal

from collm.evaluation.tasks.answers import MARK, marked, said
from collm.evaluation.tasks.boxes import BOX, boxed

_SCIENTIFIC = re.compile(r"(?P<digits>[-+]?\d+(?:\.\d+)?)[eE](?P<exponent>[-+]?\d{1,2})")
_OUTER = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
SECONDS = 5
"""After which a comparison counts as unequal: models write expressions that no simplification ends on."""


def mathematical_answer(text: str) -> str | None:
    r"""The first of: the last non-empty `\boxed{...}`; what `####` marks; what follows the last "answer is".

    None where the last box never closes.
    """
    contents = boxed(text)
    if contents is None:
        return None
    boxes = [found for content in contents if (found := cleaned(content)) is not None]
    if boxes:
        return boxes[-1]
    if MARK in text:
        return cleaned(marked(text) or "")
    told = [found for rest in said(text) if (found := cleaned(_expression(rest))) is not None]
    return told[-1] if told else None


def mathematical_gold(field: object) -> str | None:
    r"""The gold answer of an example: the last `\boxed{...}` of a worked solution, or the whole field."""
    text = str(field)
    return mathematical_answer(text) if BOX.search(text) or MARK in text else cleaned(text)


def _expression(sentence: str) -> str:
    """What a sentence gives as its answer: its first formula where it starts with one, else all up to its end."""
    sentence = sentence.strip().lstrip("*: ")
    for begin, end in _OUTER:
        if sentence.startswith(begin) and end in sentence[len(begin) :]:
            return sentence[len(begin) : sentence.index(end, len(begin))]
    return re.split(r"[.;!?](?:\s|$)", sentence, maxsplit=1)[0]


def cleaned(expression: str) -> str | None:
    r"""Without outer dollar signs, final stop, percent and currency signs; one minus; `1e3` as 1000. None if empty."""
    text = re.sub("[−–]", "-", expression).replace("∞", r"\infty").strip().strip("*").strip()
    for begin, end in _OUTER:
        if text.startswith(begin) and text.endswith(end) and len(text) >= len(begin) + len(end):
            text = text[len(begin) : -len(end)].strip()
            break
    text = re.sub(r"\\?[%$]|\\!|(?<=\d)\\[,;:](?=\d{3})", "", text).strip().removesuffix(".").strip()
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        text = f"{Decimal(scientific['digits']).scaleb(int(scientific['exponent'])):f}"
    return text or None


def same_mathematics(answer: str | None, gold: str) -> Mapping[str, float]:
    """1 where `answer` and `gold` are equal as expressions."""
    return {"accuracy": float(answer is not None and (_squeezed(answer) == _squeezed(gold) or _verified(answer, gold)))}


def _squeezed(expression: str) -> str:
    return re.sub(r"\s+", "", expression).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")


def _verified(answer: str, gold: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what it cannot read is no fault of the run
    # Its time limit is a signal, which only the main thread may set.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    as_latex = [LatexExtractionConfig()]
    wanted, given = (parse(f"${text}$", as_latex, parsing_timeout=seconds) for text in (gold, answer))
    return bool(wanted and given and verify(wanted, given, timeout_seconds=seconds))
