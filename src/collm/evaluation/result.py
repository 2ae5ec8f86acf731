"""What an evaluation found: one JSON file for each."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.evaluation.stats import bootstrap_ci
from collm.evaluation.task import Task
from collm.evaluation.tasks.equations import equations
from collm.files import beside, write_text
from collm.report.trace import Trace
from collm.types import Unit, told_length, unit_of

SCORING = ("lm-eval", "math-verify", "rouge-score")
"""Packages that say what is right, in some tasks; of an extra."""


@dataclass(frozen=True)
class EvalResult:
    """One system on one task. Shares are of written tokens, `ci95` is a bootstrap over examples, or over groups.

    `written_by`: tokens per model. `changed_tokens`: written by an assistant where the base would have written another
    token. `abstained`: deferrals to which the assistant gave no answer, so that the base wrote the token. With a `unit`
    of "chunk" (models with different tokenizers) these three and all shares count chunks; `tokens` are the base's.
    `no_answer`: texts in which no answer was found (they count as wrong). `equations_right` of `equations_shown` are
    computed right, where the task shows arithmetic. `ids` and `scores` are per example, for paired comparisons; so are
    `groups`: examples of one group are near-duplicates of one another; empty where the data tell of none.
    `metrics`, `metrics_ci95`: the task's further metrics, by name.
    `commit`, `versions`: of the start that wrote the last texts; `commit` ends in "-dirty" where files were changed
    since, and is None outside a checkout. `golds`: a hash of the answers that texts were judged by, by id; empty in
    results of older versions.
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
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_ci95: dict[str, tuple[float, float]] = field(default_factory=dict)
    groups: tuple[str, ...] = field(default_factory=tuple)
    unit: Unit = "token"
    golds: str = ""

    @property
    def steps(self) -> int:
        """Tokens, or chunks where `unit` says so: what shares are of."""
        return sum(self.written_by.values())

    @property
    def rate(self) -> float | None:
        """`deferral_rate`; None where nothing was written, as by tasks whose given answers are scored."""
        return self.deferral_rate if self.steps else None

    @property
    def length(self) -> str:
        """For people: of all texts."""
        return told_length(self.tokens, self.steps, self.unit)

    @property
    def asked_rate(self) -> float:
        """Share of places at which an assistant was asked, whether it answered or not."""
        return self.deferral_rate + self.abstained / max(1, self.steps)

    @property
    def passes_per_token(self) -> dict[str, float]:
        """Forward passes per written token, by model: what the texts cost; empty where none was written."""
        return {name: count / self.tokens for name, count in self.forward_passes.items()} if self.tokens else {}

    @property
    def num_groups(self) -> int | None:
        """Of near-duplicates; None where examples are independent."""
        return len(set(self.groups)) if self.groups else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; with `passes_per_token`."""
        return {**asdict(self), "passes_per_token": self.passes_per_token}

    def summary(self) -> str:
        """A few lines for people."""
        low, high = self.ci95
        grouped = "" if self.num_groups is None else f" in {self.num_groups} groups"
        passes = [f"{name} {n} ({n / max(1, self.tokens):.2f} per token)" for name, n in self.forward_passes.items()]
        lines = [
            f"{self.name}: {self.metric.replace('_', ' ')} {self.value:.1%} (95 % interval {low:.1%} to {high:.1%}, "
            f"{self.num_examples} examples{grouped} of {self.task} v{self.task_version})",
            f"  {self.length}, {self.deferral_rate:.1%} written by assistants, {self.changed_tokens} changed "
            f"({self.changed_share:.1%}), {self.abstained} deferrals without an answer",
            "  forward passes: " + (", ".join(passes) or "not told"),
            f"  no answer found in {self.no_answer} texts; {self.seconds:.1f} s",
        ]
        if self.equations_shown:
            share = self.equations_right / self.equations_shown
            lines.insert(1, f"  {self.equations_right} of {self.equations_shown} equations right ({share:.1%})")
        if self.metrics:
            lines.insert(1, "  " + self.further())
        return "\n".join(lines)

    def further(self) -> str:
        """The further metrics with their intervals, for people."""
        told = []
        for name, value in self.metrics.items():
            low, high = self.metrics_ci95[name]
            told.append(f"{name.replace('_', ' ')} {value:.1%} ({low:.1%} to {high:.1%})")
        return ", ".join(told)

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvalResult:
        """Raises CollmError for a file that is not the result of an evaluation."""
        result = result_path(path)
        if Path(path).suffix != ".json" and result.is_file():
            raise CollmError(f"{path} holds the texts of an evaluation; its result is {result}")
        try:
            row = json.loads(Path(path).read_text(encoding="utf-8"))
            # Fields with a default came later: older results do without them.
            late = {f.name for f in fields(cls) if f.default is not MISSING or f.default_factory is not MISSING}
            kept = {f.name: row[f.name] for f in fields(cls) if f.name in row or f.name not in late}
            kept["metrics_ci95"] = {name: tuple(pair) for name, pair in kept.get("metrics_ci95", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CollmError(f"{path} is not the result of an evaluation ({error}); run collm eval again") from None
        pairs = {name: tuple(kept.get(name, ())) for name in ("ci95", "ids", "scores", "groups")}
        return cls(**{**kept, **pairs})


def result_path(traces: str | Path) -> Path:
    """Where the figures of a trace file lie."""
    return beside(traces, ".json")


def is_result(path: str | Path) -> bool:
    """Is a file the result of an evaluation?"""
    try:
        EvalResult.load(path)
    except CollmError:
        return False
    return True


def trace_path(result: str | Path) -> Path:
    """Where the traces of a result file lie, unless they were put elsewhere."""
    named = beside(result, ".jsonl", instead_of=".json")
    bare = beside(result, "", instead_of=".json")
    # `--out model-0.1` wrote into a file of that very name.
    return bare if bare.is_file() and not named.is_file() else named


def summarise(
    name: str,
    task: Task,
    traces: Sequence[Trace],
    seed: int,
    settings: dict[str, Any],
    groups: Sequence[str] = (),
) -> EvalResult:
    """The figures of scored traces (at least one); `groups` of near-duplicates, one name for each trace, or none."""
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
    golds = [trace.gold or "" for trace in traces]
    further = task.further([trace.answer for trace in traces], golds, groups or None)
    return EvalResult(
        name=name,
        task=task.name,
        task_version=task.version,
        metric=task.metric,
        value=sum(scores) / len(scores),
        ci95=bootstrap_ci(scores, groups=groups or None),
        num_examples=len(traces),
        deferral_rate=sum(step.deferred for step in steps) / max(1, len(steps)),
        tokens=sum(len(step.all_token_ids) for step in steps),
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
        metrics={metric: value for metric, (value, _) in further.items()},
        metrics_ci95={metric: ci95 for metric, (_, ci95) in further.items()},
        groups=tuple(groups),
        unit=unit_of(steps),
        golds=_fingerprint(traces),
    )


def _fingerprint(traces: Sequence[Trace]) -> str:
    golds = sorted((trace.id, trace.gold or "") for trace in traces)
    return hashlib.sha256(json.dumps(golds).encode()).hexdigest()[:16]


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
    for package in ("collm", "torch", "transformers", "numpy", *SCORING):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            if package not in SCORING:
                found[package] = "not installed"
    return found
