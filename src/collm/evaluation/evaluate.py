"""Run a system over a task's examples: batched, with progress, resumable."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from collm.data.examples import Example, examples_fingerprint
from collm.errors import CollmError
from collm.evaluation.result import EvalResult, is_result, result_path, summarise
from collm.evaluation.runs import kept, require_free
from collm.evaluation.shipped import get_task
from collm.evaluation.task import Task
from collm.report.trace import Trace, base_pieces
from collm.sampling_params import SamplingParams
from collm.types import Generation, Message

if TYPE_CHECKING:
    from collm.llm.methods import Method

GREEDY = SamplingParams()


class Writer(Protocol):
    """What an evaluation asks of a system; `CollaborativeLM` is one."""

    @property
    def model_names(self) -> tuple[str, ...]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def generate_each(
        self,
        prompts: Sequence[Sequence[Message] | str],
        params: SamplingParams | Sequence[SamplingParams],
        batch_size: int,
        *,
        policy: Method | None,
        alone: int | str | None,
    ) -> Iterator[tuple[int, Generation]]: ...


def evaluate(
    llm: Writer,
    task: Task | str,
    examples: Sequence[Example],
    params: SamplingParams = GREEDY,
    *,
    policy: Method | None = None,
    alone: int | str | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    name: str = "",
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> EvalResult:
    """The result of `evaluate_with_traces`; see there."""
    result, _ = evaluate_with_traces(
        llm,
        task,
        examples,
        params,
        policy=policy,
        alone=alone,
        batch_size=batch_size,
        out=out,
        name=name,
        identity=identity,
        progress=progress,
    )
    return result


def evaluate_with_traces(
    llm: Writer,
    task: Task | str,
    examples: Sequence[Example],
    params: SamplingParams = GREEDY,
    *,
    policy: Method | None = None,
    alone: int | str | None = None,
    batch_size: int = 16,
    out: str | Path | None = None,
    name: str = "",
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[EvalResult, list[Trace]]:
    """Let `llm` answer every example and score the answers.

    Each example draws from a seed of its own, made from `params.seed` and its id: neither the batch size nor a resumed
    run changes a text in float32 (with fewer bits near-ties may fall otherwise), and random choices are independent
    between examples.

    Args:
        policy: who writes, instead of what `params` says: a policy, or another way of decoding.
        alone: name or number of the only model to be used: a baseline.
        out: a `.jsonl` file for the traces, each written as soon as its text is finished; a run that finds its own
            traces there goes on after them. The result is written as `.json` beside it.
        name: how the system is called in tables.
        identity: what else tells this system from others (its checkpoint's name), beside what is read from the
            models themselves (`settings_of`); a file that was written by another system or under other settings is
            refused.
        progress: a progress bar on stderr.

    Raises:
        CollmError: no examples, an example without gold answer or a repeated id, an `out` of another run, a package
            that the task needs.
    """
    task = get_task(task) if isinstance(task, str) else task
    if not examples:
        raise CollmError("no examples to evaluate on")
    if len({example.id for example in examples}) < len(examples):
        raise CollmError("two examples have the same id; ids tell apart the rows of an evaluation: make them unique")
    task.require()
    if task.code and alone is None and getattr(llm, "sharing", None) is not None:
        from collm.llm.sharing import require_closing

        require_closing(getattr(llm, "models", ()), f"task {task.name!r}")
    golds = [task.gold(example) for example in examples]
    params = replace(params, stop=(*params.stop, *task.stop))
    groups = near_duplicates(examples)
    from collm.evaluation.system import settings_of, who_writes  # they know the models, and so torch

    params = who_writes(llm, params, policy, alone)
    settings = {
        "task": f"{task.name} v{task.version}",
        "examples": examples_fingerprint(examples),
        **settings_of(llm, params, policy, alone, identity),
    }
    settings["params.stop"] = list(params.stop)
    settings["params.stop_token_ids"] = list(params.stop_token_ids)
    path = Path(out) if out is not None else None
    if path is not None:
        require_free(path)
    figures = TextColumn("{task.fields[figures]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures)
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with kept(path, settings) as (done, keep):
        judged = {example.id: gold for example, gold in zip(examples, golds, strict=True)}
        other = next((trace for trace in done.values() if trace.gold != judged[trace.id]), None)
        if other is not None:
            raise CollmError(
                f"{path} holds answers that were judged by other gold answers ({other.id}: {other.gold!r} there, "
                f"{judged[other.id]!r} now): give another output file, or delete it to start afresh"
            )
        todo = [(example, gold) for example, gold in zip(examples, golds, strict=True) if example.id not in done]
        if path is not None and todo:
            # What stands there is of an earlier run, whose traces were deleted: beside these it would pass for theirs.
            result_path(path).unlink(missing_ok=True)
        with Progress(*columns, *times, console=Console(stderr=True), disable=not progress) as bar:
            running = Running()
            for trace in done.values():
                running.add(trace)
            row = bar.add_task(name or task.name, total=len(examples), completed=len(done), figures=str(running))
            for trace in _answers(llm, task, todo, params, batch_size, policy, alone):
                keep(trace)
                running.add(trace)
                bar.update(row, advance=1, figures=str(running))
        ordered = [done[example.id] for example in examples]
        result = summarise(
            name or default_name(llm.model_names, params, alone), task, ordered, params.seed, settings, groups
        )
        if path is not None:
            result = result if todo else _as_written(result, result_path(path))
            result.save(result_path(path))
    return result, ordered


def _as_written(result: EvalResult, path: Path) -> EvalResult:
    """Of texts that were there, whatever counts them now: with the commit and the versions that wrote them, if told."""
    if not is_result(path):
        return result
    before = EvalResult.load(path)
    return replace(result, commit=before.commit, versions=before.versions)


def near_duplicates(examples: Sequence[Example]) -> tuple[str, ...]:
    """The group of each example, from its field `group`; empty where no example has one.

    An example without it, among others that have one, is a group of its own.

    Raises:
        CollmError: a group that is neither a text nor a number.
    """
    found = [example.fields.get("group") for example in examples]
    for example, group in zip(examples, found, strict=True):
        if not isinstance(group, str | int | None):
            raise CollmError(f"{example.label}: group is the name of its near-duplicates, a text, not {group!r}")
    if all(group is None for group in found):
        return ()
    return tuple(
        f"only {example.id}" if group is None else str(group) for example, group in zip(examples, found, strict=True)
    )


def default_name(models: Sequence[str], params: SamplingParams, alone: int | str | None) -> str:
    """What a system is called in tables, so that one checkpoint's ways of decoding are told apart."""
    if alone is not None:
        return models[alone] if isinstance(alone, int) else alone
    parts = [" + ".join(models)]
    if params.deferral is not None and params.deferral != "threshold":
        parts.append(params.deferral)
    if params.deferral_rate is not None:
        parts.append(f"rate {params.deferral_rate:g}")
    if params.threshold is not None:
        parts.append(f"threshold {params.threshold:g}")
    return ", ".join(parts)


def _answers(
    llm: Writer,
    task: Task,
    rows: Sequence[tuple[Example, str]],
    params: SamplingParams,
    batch_size: int,
    policy: Method | None,
    alone: int | str | None,
) -> Iterator[Trace]:
    """Scored texts in the order in which they are finished; their seconds add up to the time that writing took."""
    prompts = [task.question(example) for example, _ in rows]
    own = [replace(params, seed=example_seed(params.seed, example.id)) for example, _ in rows]
    begin = time.perf_counter()
    for index, generation in llm.generate_each(prompts, own, batch_size, policy=policy, alone=alone):
        if generation.error is not None:  # what is finished is kept, and the next start goes on from there
            raise CollmError(f"{rows[index][0].id}: {generation.error}")
        now = time.perf_counter()
        (example, gold), prompt = rows[index], prompts[index]
        yield Trace(
            id=example.id,
            generation=generation,
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            base_pieces=base_pieces(generation, lambda token_id: llm.decode([token_id])),
            score=task.score(generation.text, gold),
            answer=task.extract(generation.text),
            gold=gold,
            seconds=now - begin,
        )
        begin = time.perf_counter()  # judging a program takes seconds, too


def example_seed(seed: int, example_id: str) -> int:
    """A seed of an example's own: noise is keyed by (seed, sample, position), so one seed for all would repeat it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{example_id}".encode()).digest()[:6], "big")


@dataclass
class Running:
    """The figures of the texts so far."""

    texts: int = 0
    score: float = 0.0
    tokens: int = 0
    deferred: int = 0

    def add(self, trace: Trace) -> None:
        self.texts += 1
        self.score += trace.score or 0
        self.tokens += len(trace.generation.steps)
        self.deferred += sum(step.deferred for step in trace.generation.steps)

    def __str__(self) -> str:
        if not self.texts:
            return ""
        return f"score {self.score / self.texts:.3f}, deferred {self.deferred / max(1, self.tokens):.1%}"
