"""Several runs of one system at different rates as a curve: quality against deferral rate, and against cost."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from collm.evaluation.result import EvalResult
from collm.identity.comparing import NAMED
from collm.report.chart import Point, Series

_NUMBER = re.compile(r"-?\b(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|inf)\b")
_AT_A_RATE = ("params.threshold", "params.deferral_rate", "params.task")
"""What says at which rate a run was; the task is the one in whose calibration a rate was looked up."""
_IN_PYTHON = ("policy", "decides")
"""Who writes, as it is written in Python, threshold and all."""


def family(result: EvalResult) -> str:
    """Equal for runs of one system at different rates: its settings but for the threshold.

    A run that tells nothing of which models these were (no `identity`) is a family of its own.
    """
    settings = {name: value for name, value in result.settings.items() if name not in _AT_A_RATE}
    for name in _IN_PYTHON:
        found = settings.pop(name, None)
        if found is not None:
            settings[name] = _NUMBER.sub("#", found)
    known = "" if settings.get("identity") else result.name
    return json.dumps([result.task, result.task_version, known, settings], sort_keys=True)


def series(results: Sequence[EvalResult], x: Mapping[int, float]) -> list[Series]:
    """One series for each system at several rates, one point for each other system.

    Args:
        x: by the number of the result, where its point lies; those that are not there are left out, which changes
            nothing of how the others look.
    """
    members: dict[str, list[int]] = {}
    for number, result in enumerate(results):
        members.setdefault(family(result), []).append(number)
    names = _curve_names([[results[number] for number in numbers] for numbers in members.values()])
    found = []
    for look, (name, numbers) in enumerate(zip(names, members.values(), strict=True)):
        placed = sorted((number for number in numbers if number in x), key=lambda number: x[number])
        points = tuple(_point(results[number], x[number]) for number in placed)
        found.append(Series(name, points, look))
    return [one for one in found if one.points]


def _point(result: EvalResult, x: float) -> Point:
    low, high = result.ci95
    told = f"{result.name}: {result.value:.1%} ({low:.1%} to {high:.1%}), {result.deferral_rate:.1%} deferred"
    return Point(x, result.value, result.ci95, told)


def _curve_names(curves: Sequence[Sequence[EvalResult]]) -> list[str]:
    """One for each curve; those that would share one have the names of their runs: nobody could say whose they are."""
    names = [_curve_name(results) for results in curves]
    shared = Counter(names)
    return [
        ", ".join(result.name for result in results) if shared[name] > 1 else name
        for name, results in zip(names, curves, strict=True)
    ]


def _curve_name(results: Sequence[EvalResult]) -> str:
    """What the names have in common, else the checkpoint's name."""
    identity = results[0].settings.get("identity", {})
    checkpoint = str(identity.get(NAMED, identity).get("checkpoint", ""))
    return common_name([result.name for result in results]) or Path(checkpoint).name or results[0].name


def common_name(names: Sequence[str]) -> str:
    """The words that all names begin with; empty if there are none."""
    split = [re.findall(r"[^\s_,;:@-]+[\s_,;:@-]*", name) for name in names]
    shared: list[str] = []
    for words in zip(*split, strict=False):
        if len({word.strip(" _,;:@-") for word in words}) > 1:
            break
        shared.append(words[0])
    return "".join(shared).strip(" _,;:@-(")


def cost(result: EvalResult, weights: Mapping[str, float]) -> float | None:
    """Forward passes per written token over all models, each times its weight: `SYSTEM/MODEL` or `MODEL` names it,
    else it is 1. None where no token was written."""
    passes = result.passes_per_token
    if not passes:
        return None
    return sum(count * weights.get(f"{result.name}/{name}", weights.get(name, 1.0)) for name, count in passes.items())
