"""Paired significance: systems against one of them, on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from collm.errors import CollmError
from collm.evaluation.result import EvalResult
from collm.evaluation.stats import holm, paired_difference


@dataclass(frozen=True)
class Comparison:
    """`second` against `first` on the same examples.

    `only_first`, `only_second`: examples that only this one gets right, or, where scores lie between right and wrong
    (`graded`), that it gets better than the other. `ci95` comes
    from resampling examples, or `num_groups` whole groups of near-duplicates (None where examples are independent).
    `p_value` is of the paired test that turns these around (`stats.sign_flip_test`); `test` is its name.
    `holm_p`: `p_value`, corrected for being one of several tests; None for a test that stands alone.
    """

    first: str
    second: str
    metric: str
    num_examples: int
    difference: float
    ci95: tuple[float, float]
    p_value: float
    test: str
    only_first: int
    only_second: int
    num_groups: int | None = None
    holm_p: float | None = None
    graded: bool = False

    def summary(self) -> str:
        """One line for people."""
        won = "better" if self.graded else "only right"
        corrected = "" if self.holm_p is None else f", Holm-corrected {self.holm_p:.3g}"
        grouped = "" if self.num_groups is None else f" in {self.num_groups} groups, which interval and test keep whole"
        return (
            f"{self.second} against {self.first}: "
            f"{100 * self.difference:+.1f} points of {self.metric.replace('_', ' ')} "
            f"(95 % interval {100 * self.ci95[0]:+.1f} to {100 * self.ci95[1]:+.1f}; "
            f"{self.test} p = {self.p_value:.3g}{corrected}; "
            f"{won}: {self.only_second} against {self.only_first} of {self.num_examples}{grouped})"
        )


def compare(first: EvalResult, second: EvalResult, *, seed: int = 0) -> Comparison:
    """Paired significance of `second - first`.

    Raises:
        CollmError: the two are of different tasks, task versions, examples, gold answers or groups of examples.
    """
    for what, a, b in (
        ("tasks", first.task, second.task),
        ("versions of the task", first.task_version, second.task_version),
        ("examples", sorted(first.ids), sorted(second.ids)),
        ("examples", first.settings.get("examples"), second.settings.get("examples")),
        # Older results tell of none.
        ("gold answers", first.golds or second.golds, second.golds or first.golds),
    ):
        if a != b:
            raise CollmError(
                f"{first.name!r} and {second.name!r} were evaluated on different {what}: evaluate both alike"
            )
    found = dict(zip(second.ids, second.scores, strict=True))
    a_scores, b_scores = first.scores, [found[id] for id in first.ids]
    groups = _common_groups(first, second)
    paired = paired_difference(a_scores, b_scores, groups=groups, seed=seed)
    binary = {*a_scores, *b_scores} <= {0.0, 1.0}
    only_first = sum(a > b for a, b in zip(a_scores, b_scores, strict=True))
    only_second = sum(b > a for a, b in zip(a_scores, b_scores, strict=True))
    return Comparison(
        first=first.name,
        second=second.name,
        metric=first.metric,
        num_examples=len(a_scores),
        difference=paired.difference,
        ci95=paired.ci95,
        p_value=paired.p_value,
        test="exact McNemar" if binary and groups is None else "sign-flip",
        only_first=only_first,
        only_second=only_second,
        num_groups=None if groups is None else len(set(groups)),
        graded=not binary,
    )


def rival_of(results: Sequence[EvalResult], name: str | None) -> EvalResult:
    """The result of this name that others are compared with; the first if no name is given.

    Raises:
        ValueError: no result has that name, or several have.
    """
    if name is None:
        return results[0]
    named = [result for result in results if result.name == name]
    if len(named) != 1:
        what = f"no system {name!r}" if not named else f"more than one system {name!r}"
        raise ValueError(f"there is {what}; there are {', '.join(repr(result.name) for result in results)}")
    return named[0]


def judged_alike(rival: EvalResult, results: Sequence[EvalResult]) -> tuple[list[EvalResult], list[EvalResult]]:
    """Of `results`, without the rival, those that were scored by its rule, and the others: what another rule counts as
    right is no matter of a paired test."""
    rule = (rival.task, rival.task_version)
    others = [result for result in results if result is not rival]
    alike = [result for result in others if (result.task, result.task_version) == rule]
    return alike, [result for result in others if (result.task, result.task_version) != rule]


def compare_all(rival: EvalResult, others: Sequence[EvalResult], *, seed: int = 0) -> list[Comparison]:
    """Each of `others` against `rival`, p-values corrected for their number (Holm) where there are several.

    Raises:
        CollmError: as `compare`.
    """
    found = [compare(rival, other, seed=seed) for other in others]
    if len(found) < 2:
        return found
    corrected = holm([comparison.p_value for comparison in found])
    return [replace(comparison, holm_p=p) for comparison, p in zip(found, corrected, strict=True)]


def _common_groups(first: EvalResult, second: EvalResult) -> tuple[str, ...] | None:
    """The group of each of `first`'s examples; a result without groups (an older one) takes those of the other."""
    found = dict(zip(second.ids, second.groups, strict=True)) if second.groups else {}
    groups = tuple(found[id] for id in first.ids) if found else None
    if first.groups and groups is not None and first.groups != groups:
        raise CollmError(
            f"{first.name!r} and {second.name!r} were evaluated with different groups of near-duplicates: "
            "evaluate both on the same file"
        )
    return first.groups or groups
