"""Summaries against reference texts: ROUGE (Lin 2004) by the package `rouge-score` (extra `eval`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from collm.evaluation.tasks.answers import MARK

METRICS = ("rouge2", "rouge1", "rougeL")


def whole_text(text: str) -> str | None:
    """The text up to a mark, if it has one; None if empty."""
    return text.partition(MARK)[0].strip() or None


def reference_texts(field: object) -> str | None:
    """One reference, or a list of them, as JSON."""
    texts = [str(text).strip() for text in (field if isinstance(field, list) else [field])]
    kept = [text for text in texts if text]
    return json.dumps(kept, ensure_ascii=False) if kept else None


def judge_summary(answer: str | None, gold: str) -> Mapping[str, float]:
    """F1 of common bigrams, words and of the longest common subsequence, each with its best reference.

    Words are runs of a-z and 0-9 in lower case, Porter-stemmed.
    """
    if answer is None:
        return dict.fromkeys(METRICS, 0.0)
    scores = _scorer().score_multi(json.loads(gold), answer)
    return {name: float(scores[name].fmeasure) for name in METRICS}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(METRICS), use_stemmer=True)
