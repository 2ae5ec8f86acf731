"""Answers that are names, with synonyms: one of them (factoid) or all of them (list), as in BioASQ.

Measures as in the challenge (Tsatsaronis et al. 2015, https://doi.org/10.1186/s12859-015-0564-6). Answers and golds
travel as JSON lists, so that names may hold any sign.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from collm.evaluation.tasks.answers import MARK, normalised, said

MOST = 5
"""Candidates that a factoid answer may name."""
_BULLET = re.compile(r"^\s*(?:[-*•]|\d{1,2}[.)])\s+")
_ARTICLE = re.compile(r"^(?:the|an?)\s+")
_DASHES = str.maketrans("‐‑‒–—−", "------")


def name_of(text: str) -> str | None:
    """One spelling of a name: lower case, no outer punctuation, no leading article, one kind of dash; None if empty."""
    found = normalised(text.translate(_DASHES))
    return _ARTICLE.sub("", found) or None if found else None


def _names(parts: Sequence[str]) -> list[str]:
    """In one spelling each, in order, without repetitions."""
    return list(dict.fromkeys(name for part in parts if (name := name_of(_BULLET.sub("", part))) is not None))


def _place(text: str) -> list[str]:
    """The lines that give the answer: after `####`, else after "answer is", else the bulleted ones, else all.

    Behind `####` the rest of its line counts, or, where that is empty, the lines up to the next empty one.
    """
    if MARK in text:
        line, _, below = text.partition(MARK)[2].lstrip("#").partition("\n")
        return [line] if line.strip() else below.strip("\n").split("\n\n")[0].splitlines()
    told = [rest for rest in said(text) if name_of(rest)]
    lines = text.splitlines()
    return told[-1:] or [line for line in lines if _BULLET.match(line)] or lines


def candidates(text: str) -> str | None:
    """A factoid's answer: at most five names, best first, one a line or with ";" between them; JSON."""
    found = _names(_parts(text))[:MOST]
    return json.dumps(found, ensure_ascii=False) if found else None


def listed(text: str) -> str | None:
    """A list's answer: one name a line or ";" between them; JSON.

    One piece by that, which "," and "and" would divide, may be meant either way ("alpha and beta tubulin"): both
    readings are given, `[[whole], [part, part]]`, and `judge_list` takes the better one.
    """
    parts = _parts(text)
    found: list[str] | list[list[str]] = _names(parts)
    if len(found) == 1:
        divided = _names([part for whole in parts for part in re.split(r",\s+(?:and\s+)?|\s+and\s+", whole)])
        if len(divided) > 1:
            found = [_names(parts), divided]
    return json.dumps(found, ensure_ascii=False) if found else None


def _parts(text: str) -> list[str]:
    """A ";" in parentheses divides nothing: `t(9;22)(q34;q11)` is one name."""
    return [part for line in _place(text) for part in re.split(r";(?![^()]*\))", line)]


def gold_names(field: object) -> str | None:
    """Gold names, each with its synonyms: `[["TP53", "p53"], ["BRCA1"]]`; one without synonyms may stand bare."""
    entries = [
        entry if isinstance(entry, list) else [entry] for entry in (field if isinstance(field, list) else [field])
    ]
    groups = [_names([str(synonym) for synonym in entry]) for entry in entries]
    return json.dumps([group for group in groups if group], ensure_ascii=False) if any(groups) else None


def judge_factoid(answer: str | None, gold: str) -> Mapping[str, float]:
    """Strict: the first name is right; lenient: one of them is; MRR: 1 / rank of the first right one. No answer: 0."""
    right = {synonym for group in json.loads(gold) for synonym in group}
    names = [] if answer is None else json.loads(answer)
    rank = next((rank for rank, name in enumerate(names, start=1) if name in right), None)
    return {
        "strict_accuracy": float(rank == 1),
        "lenient_accuracy": float(rank is not None),
        "mrr": 1 / rank if rank else 0.0,
    }


def judge_list(answer: str | None, gold: str) -> Mapping[str, float]:
    """Precision, recall and F1; each gold name is matched once, so that a synonym given besides counts as wrong."""
    groups: list[list[str]] = json.loads(gold)
    found: list[Any] = [] if answer is None else json.loads(answer)
    readings: list[list[str]] = found if found and isinstance(found[0], list) else [found]
    return max((_judge_names(names, groups) for names in readings), key=lambda scores: scores["f1"])


def _judge_names(names: Sequence[str], groups: Sequence[Sequence[str]]) -> Mapping[str, float]:
    hits = _matching([[i for i, group in enumerate(groups) if name in group] for name in names])
    return {
        "f1": 2 * hits / (len(names) + len(groups)),
        "precision": hits / len(names) if names else 0.0,
        "recall": hits / len(groups),
    }


def _matching(choices: Sequence[Sequence[int]]) -> int:
    """How many rows can be given a column of their own among their `choices` (augmenting paths, Kuhn 1955)."""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column in choices[row]:
            if column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(choices)))
