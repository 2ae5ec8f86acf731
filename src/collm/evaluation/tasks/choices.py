"""Answers that are one of a few labels: yes, no, maybe."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from collm.evaluation.tasks.answers import MARK, marked, said
from collm.evaluation.tasks.boxes import boxed

YES_NO = ("yes", "no")
YES_NO_MAYBE = ("yes", "no", "maybe")
# "No evidence was found" begins with the word, not with the answer: after "no" comes a stop, the end, or a word that
# begins a clause. Not so behind a mark, where nothing but the answer stands.
_CLAUSE = "it|they|this|that|these|those|he|she|we|there|the|because|since|as|for|but|although|though|while"
_AFTER_NO = rf"(?=[^\S\n]*(?:[^\w\s]|\n|$|(?:{_CLAUSE})\b))"


def label_in(labels: Sequence[str]) -> Callable[[str], str | None]:
    """A rule that finds one of `labels` in a text.

    The first of: what `####` marks; the last `\\boxed{...}` that opens with one
    (none where the last box never closes); what follows the last "answer is"; the
    text's first words; its last line, if it says nothing else. Labels are whole words ("unknown" is no "no"), open the
    place where they stand ("not yes" is no "yes") and stand alone there ("yes or no" is neither). None where there is
    none.
    """

    def pattern(label: str, behind: str = "") -> str:
        others = "|".join(re.escape(other) for other in labels if other != label)
        alone = rf"(?!\s*(?:,|/|\band\b|\bor\b)\s*(?:{others})\b)"
        return re.escape(label) + r"\b(?!-\w)" + alone + (behind if label == "no" else "")

    def opens(behind: str = "") -> re.Pattern[str]:
        words = "|".join(pattern(label, behind) for label in labels)
        return re.compile(rf"[\s\W]*(?P<label>{words})", re.IGNORECASE)

    opening, given = opens(_AFTER_NO), opens()
    lone = re.compile(rf"\W*(?P<label>{'|'.join(map(re.escape, labels))})\W*", re.IGNORECASE)

    def label(text: str) -> str | None:
        place = marked(text) or "" if MARK in text else text
        contents = boxed(place)
        if contents is None:
            return None
        boxes = [match for content in contents if (match := given.match(re.sub(r"\\text\b", "", content)))]
        if boxes:
            found: re.Match[str] | None = boxes[-1]
        elif MARK in text:
            found = given.match(place)
        else:
            told = [match for rest in said(text) if (match := opening.match(rest))]
            last = text.strip().rpartition("\n")[2]
            found = told[-1] if told else opening.match(text) or lone.fullmatch(last)
        return found["label"].lower() if found else None

    return label


def label_field(labels: Sequence[str]) -> Callable[[object], str | None]:
    """A rule that reads a gold label from a field that holds nothing else."""

    def label(field: object) -> str | None:
        text = str(field).strip().lower()
        return text if text in labels else None

    return label


def same_label(answer: str | None, gold: str) -> Mapping[str, float]:
    return {"accuracy": float(answer == gold)}


def macro_f1(
    answers: Sequence[str | None],
    golds: Sequence[str],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Mean over labels of F1, with its 95 % percentile bootstrap interval.

    It is no mean over examples, so whole sets of examples (or of `groups` of near-duplicates) are resampled: n draws
    with replacement are one multinomial draw of how often each of the different ones occurs. Labels that occur neither
    as gold nor as answer do not count; a missing answer is a miss of its gold label and a false alarm for none.
    """
    import numpy as np
    from numpy.typing import NDArray

    labels = sorted({*golds, *(answer for answer in answers if answer is not None)})
    columns: dict[str | None, int] = {None: len(labels), **{label: i for i, label in enumerate(labels)}}
    units = range(len(golds)) if groups is None else np.unique(groups, return_inverse=True)[1]
    each = np.zeros((int(max(units)) + 1, len(labels), len(labels) + 1))  # pairs (gold, answer) of each unit
    for unit, gold, answer in zip(units, golds, answers, strict=True):
        each[unit, columns[gold], columns[answer]] += 1
    kinds, times = np.unique(each, axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(each), times / len(each), size=resamples)

    def f1(table: NDArray[np.float64]) -> NDArray[np.float64]:  # [..., labels, labels + 1] -> [...]
        hits = np.diagonal(table[..., :-1], axis1=-2, axis2=-1)
        occurs = table.sum(-1) + table[..., :-1].sum(-2)  # gold + answered = 2 hits + misses + false alarms
        of_label = np.divide(2 * hits, occurs, out=np.zeros_like(occurs), where=occurs > 0)
        return np.asarray(of_label.sum(-1) / (occurs > 0).sum(-1))

    low, high = np.quantile(f1(np.tensordot(draws.astype(float), kinds, axes=1)), [0.025, 0.975])
    return float(f1(each.sum(0))), (float(low), float(high))
