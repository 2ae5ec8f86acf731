"""Instructions that a program can check: IFEval (Zhou et al. 2023), by the checker of the lm-evaluation-harness.

An answer is the whole text. The gold one is JSON: the instructions' ids and arguments, and the prompt that a text may
have to repeat. Strict takes the text as it is; loose also without its first line, its last line and asterisks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

from collm.errors import CollmError

STRICT, LOOSE = "prompt_level_strict_acc", "prompt_level_loose_acc"
PROMPT_METRICS = (STRICT, LOOSE)
"""The harness's names. A prompt's instructions must all be followed."""


def text_as_it_is(text: str) -> str | None:
    return text if text.strip() else None


def instructions_field(field: Any) -> str | None:
    """The gold answer of the field `answer`: `{"prompt", "instruction_id_list", "kwargs"}`."""
    if not isinstance(field, Mapping):
        return None
    names, kwargs = field.get("instruction_id_list"), field.get("kwargs")
    if not isinstance(field.get("prompt"), str) or not isinstance(names, list) or not isinstance(kwargs, list):
        return None
    if not names or len(names) != len(kwargs) or not all(isinstance(given, Mapping) for given in kwargs):
        return None
    return json.dumps({key: field[key] for key in ("prompt", "instruction_id_list", "kwargs")}, ensure_ascii=False)


def require_sentences() -> None:
    """Raises CollmError without the data by which the checker tells sentences: it would fetch them otherwise."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise CollmError(
            "task 'ifeval' needs NLTK's punkt_tab, by which sentences are told: python -m nltk.downloader punkt_tab. "
            "Without a network: set NLTK_DATA to a folder with tokenizers/punkt_tab in it; the wheel of "
            "llama-index-core has one, _static/nltk_cache"
        ) from None


@cache
def _checker() -> ModuleType:
    require_sentences()
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import utils

    DetectorFactory.seed = 0  # or a text's language could be another one at the next look
    return utils  # type: ignore[no-any-return]


@cache
def _known() -> frozenset[str]:
    _checker()
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    return frozenset(INSTRUCTION_DICT)


@contextmanager
def _same_draws(gold: str) -> Iterator[None]:
    """What the checker draws is the prompt's own: where an argument is none that it takes (in two of IFEval's prompts
    "#" and "!" are letters to be counted), it puts another one in its place, by Python's shared generator."""
    state = random.getstate()
    random.seed(gold)
    try:
        yield
    finally:
        random.setstate(state)


def followed(answer: str | None, gold: str) -> dict[str, list[bool]]:
    """For each instruction whether it is followed, strictly and loosely, by the metric of whole prompts.

    Raises:
        CollmError: an instruction that the checker does not know; its data are missing.
    """
    told = json.loads(gold)
    names = told["instruction_id_list"]
    if answer is None:
        return {metric: [False] * len(names) for metric in PROMPT_METRICS}
    unknown = sorted(set(names) - _known())
    if unknown:
        raise CollmError(f"IFEval has no instruction {unknown[0]!r}; there are: {', '.join(sorted(_known()))}")
    checker = _checker()
    asked = checker.InputExample(key=0, instruction_id_list=names, prompt=told["prompt"], kwargs=told["kwargs"])
    with _same_draws(gold):
        strict = checker.test_instruction_following_strict(asked, answer)
    with _same_draws(gold):
        loose = checker.test_instruction_following_loose(asked, answer)
    return {STRICT: list(strict.follow_instruction_list), LOOSE: list(loose.follow_instruction_list)}


def judge_prompt(answer: str | None, gold: str) -> Mapping[str, float]:
    return {metric: float(all(each)) for metric, each in followed(answer, gold).items()}


def _of_instructions(
    metric: str, answers: Sequence[str | None], golds: Sequence[str], groups: Sequence[str] | None
) -> tuple[float, tuple[float, float]]:
    """The share of all instructions that are followed, with its interval: prompts, or groups, are resampled whole."""
    from collm.evaluation.stats import bootstrap_ci

    each = [followed(answer, gold)[metric] for answer, gold in zip(answers, golds, strict=True)]
    units = list(map(str, range(len(each)))) if groups is None else groups
    found = [float(right) for verdicts in each for right in verdicts]
    of_unit = [unit for unit, verdicts in zip(units, each, strict=True) for _ in verdicts]
    return sum(found) / len(found), bootstrap_ci(found, groups=of_unit)


def strict_instructions(
    answers: Sequence[str | None], golds: Sequence[str], groups: Sequence[str] | None = None
) -> tuple[float, tuple[float, float]]:
    return _of_instructions(STRICT, answers, golds, groups)


def loose_instructions(
    answers: Sequence[str | None], golds: Sequence[str], groups: Sequence[str] | None = None
) -> tuple[float, tuple[float, float]]:
    return _of_instructions(LOOSE, answers, golds, groups)
