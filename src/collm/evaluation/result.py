"""What an evaluation found, and the comparison of two of them on the same examples."""

from __future__ import annotations

import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.evaluation.stats import bootstrap_ci, mcnemar_exact, paired_bootstrap
from collm.evaluation.task import Task, equations
from collm.files import write_text
from collm.report.trace import Trace


@dataclass(frozen=True)
class EvalResult:
    """One system on one task. Shares are of written tokens, `ci95` is a bootstrap over examples.

    `written_by`: tokens per model. `changed_tokens`: written by an assistant where the base would have written another
    token. `abstained`: deferrals that an assistant handed back, so that the base wrote the token.
    `no_answer`: texts in which no answer was found (they count as wrong). `equations_right` of `equations_shown` are
    computed right, where the task shows arithmetic. `ids` and `scores` are per example, for paired comparisons.
    `commit` ends in "-dirty" where files were changed since; None outside a checkout.
    """

    name: str
    task: str
    task_version: int
    metric: str
    value: float
    ci95: tuple[float, float]
    num_examples: int
    deferral_rate: float
    tokens: int
    written_by: dict[str, int]
    changed_tokens: int
    changed_share: float
    abstained: int
    forward_passes: dict[str, int]
    no_answer: int
    finish_reasons: dict[str, int]
    equations_right: int
    equations_shown: int
    seconds: float
    seed: int
    settings: dict[str, Any]
    commit: str | None
    versions: dict[str, str]
    ids: tuple[str, ...]
    scores: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def summary(self) -> str:
        """A few lines for people."""
        low, high = self.ci95
        lines = [
            f"{self.name}: {self.metric.replace('_', ' ')} {self.value:.1%} (95 % interval {low:.1%} to {high:.1%}, "
            f"{self.num_examples} examples of {self.task} v{self.task_version})",
            f"  {self.tokens} tokens, {self.deferral_rate:.1%} written by assistants, {self.changed_tokens} changed "
            f"({self.changed_share:.1%}), {self.abstained} deferrals handed back",
            "  forward passes: " + (", ".join(f"{name} {n}" for name, n in self.forward_passes.items()) or "not told"),
            f"  no answer found in {self.no_answer} texts; {self.seconds:.1f} s",
        ]
        if self.equations_shown:
            share = self.equations_right / self.equations_shown
            lines.insert(1, f"  {self.equations_right} of {self.equations_shown} equations right ({share:.1%})")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Raises CollmError for a file that is not the result of an evaluation."""
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            kept = {field.name: row[field.name] for field in fields(cls)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CollmError(f"{path} is not the result of an evaluation ({error}); run collm eval again") from error
        pairs = {name: tuple(kept[name]) for name in ("ci95", "ids", "scores")}
        return cls(**{**kept, **pairs})


@dataclass(frozen=True)
class Comparison:
    """`second` against `first` on the same examples.

    `only_first`, `only_second`: examples that only one of them gets right; `mcnemar_p` is the exact two-sided p-value
    over these, None where scores are not just 0 and 1. `bootstrap_p` comes from resampling examples.
    """

    first: str
    second: str
    metric: str
    num_examples: int
    difference: float
    ci95: tuple[float, float]
    bootstrap_p: float
    only_first: int
    only_second: int
    mcnemar_p: float | None

    def summary(self) -> str:
        """One line for people."""
        exact = "" if self.mcnemar_p is None else f"exact McNemar p = {self.mcnemar_p:.3g}, "
        return (
            f"{self.second} against {self.first}: "
            f"{100 * self.difference:+.1f} points of {self.metric.replace('_', ' ')} "
            f"(95 % interval {100 * self.ci95[0]:+.1f} to {100 * self.ci95[1]:+.1f}; {exact}"
            f"bootstrap p = {self.bootstrap_p:.3g}; only right: {self.only_second} against {self.only_first} "
            f"of {self.num_examples})"
        )


def compare(first: EvalResult, second: EvalResult, *, seed: int = 0) -> Comparison:
    """Paired significance of `second - first`.

    Raises:
        CollmError: the two are of different tasks, task versions or examples.
    """
    for what, a, b in (
        ("tasks", first.task, second.task),
        ("versions of the task", first.task_version, second.task_version),
        ("examples", sorted(first.ids), sorted(second.ids)),
        ("examples", first.settings.get("examples"), second.settings.get("examples")),
    ):
        if a != b:
            raise CollmError(
                f"{first.name!r} and {second.name!r} were evaluated on different {what}: evaluate both alike"
            )
    found = dict(zip(second.ids, second.scores, strict=True))
    a_scores, b_scores = first.scores, [found[id] for id in first.ids]
    paired = paired_bootstrap(a_scores, b_scores, seed=seed)
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
        bootstrap_p=paired.p_value,
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=mcnemar_exact(only_first, only_second) if binary else None,
    )


def summarise(name: str, task: Task, traces: Sequence[Trace], seed: int, settings: dict[str, Any]) -> EvalResult:
    """The figures of scored traces (at least one)."""
    written: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    right = shown = 0
    for trace in traces:
        generation = trace.generation
        names = generation.model_names
        # Models that wrote nothing are named, too.
        written.update({**dict.fromkeys(names, 0), **Counter(names[step.author] for step in generation.steps)})
        passes.update(dict(zip(names, generation.forward_passes, strict=False)))
        if task.arithmetic:
            found = equations(generation.text)
            right, shown = right + found[0], shown + found[1]
    steps = [step for trace in traces for step in trace.generation.steps]
    changed = sum(step.changed for step in steps)
    scores = tuple(trace.score or 0.0 for trace in traces)
    return EvalResult(
        name=name,
        task=task.name,
        task_version=task.version,
        metric=task.metric,
        value=sum(scores) / len(scores),
        ci95=bootstrap_ci(scores),
        num_examples=len(traces),
        deferral_rate=sum(step.deferred for step in steps) / max(1, len(steps)),
        tokens=len(steps),
        written_by=dict(written),
        changed_tokens=changed,
        changed_share=changed / max(1, len(steps)),
        abstained=sum(step.abstained for step in steps),
        forward_passes=dict(passes),
        no_answer=sum(trace.answer is None for trace in traces),
        finish_reasons=dict(Counter(trace.generation.finish_reason for trace in traces)),
        equations_right=right,
        equations_shown=shown,
        seconds=round(sum(trace.seconds for trace in traces), 3),
        seed=seed,
        settings=settings,
        commit=commit(),
        versions=versions(),
        ids=tuple(trace.id for trace in traces),
        scores=scores,
    )


def commit() -> str | None:
    """The commit of this package's checkout, with "-dirty" after changes; None where it is not in one."""
    here = Path(__file__).resolve().parents[3]
    if not (here / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("collm", "torch", "transformers", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
