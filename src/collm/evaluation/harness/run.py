"""Tasks of the harness, its own results kept with our figures beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, pattern_match

from collm.errors import CollmError, nearest
from collm.evaluation.harness.model import CollaborativeHarnessLM
from collm.evaluation.harness.records import LIKELIHOODS, TRACES
from collm.evaluation.harness.results import eval_results
from collm.evaluation.result import commit, is_result, versions
from collm.files import claimed, require_own, write_text

RESULTS = "results.json"
BOOTSTRAP = 1000
"""Resamples for standard errors that have no formula; what is random in them is below their own error."""


def run_tasks(
    lm: CollaborativeHarnessLM,
    tasks: Sequence[str],
    *,
    out: str | Path | None = None,
    include_path: Sequence[str | Path] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    name: str = "",
) -> dict[str, Any]:
    """The harness's results for `tasks`, and under `"collm"` who wrote, what it cost, and what it was run with.

    Args:
        tasks: names, groups, patterns, or paths of YAML files.
        out: folder for `results.json` and, for each task, `samples_TASK.jsonl` and `TASK.json`, the figures that
            `collm compare` reads; give `lm` the same.
        include_path: folders with task files of one's own, which come before those of the harness.
        num_fewshot: instead of the tasks' own number of examples in the prompt.
        limit: only the first documents of each task.
        system: a system message; with `apply_chat_template` only.
        generation: settings that replace the tasks' own, such as `max_gen_toks`.
        name: how the system is called in tables.

    Raises:
        CollmError: an unknown task, data that cannot be had, a model that fails.
    """
    if system is not None and not apply_chat_template:
        raise CollmError("a system message needs the chat template: add apply_chat_template (--apply-chat-template)")
    if not tasks:
        raise CollmError("no task is named; collm eval --tasks takes names with commas between them")
    with nullcontext() if out is None else claimed(out, folder=True):
        if out is not None:
            _require_free(Path(out))
        return _run(
            lm,
            tasks,
            out,
            _manager(tasks, [str(path) for path in include_path]),
            generation,
            name,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=apply_chat_template,
            system_instruction=system,
        )


def _require_free(out: Path) -> None:
    """Refuse a folder with results that no run of ours has left."""
    ours = any((out / name).exists() for name in (TRACES, LIKELIHOODS))
    for path in [out / RESULTS, *sorted(out.glob("samples_*.jsonl"))]:
        require_own(path, lambda _: ours, "an earlier run")


def _run(
    lm: CollaborativeHarnessLM,
    tasks: Sequence[str],
    out: str | Path | None,
    manager: TaskManager,
    generation: Mapping[str, Any] | None,
    name: str,
    **options: Any,
) -> dict[str, Any]:
    try:
        found = simple_evaluate(
            model=lm,
            tasks=_named(tasks, manager),
            task_manager=manager,
            gen_kwargs=dict(generation) if generation else None,
            bootstrap_iters=BOOTSTRAP,
            **options,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise CollmError(
            f"the data of a task cannot be had: {error}. Without a hub, describe local files in a task file of your "
            "own and give its folder as include_path (--include-path)"
        ) from error
    assert found is not None, "there is one process"
    results: dict[str, Any] = dict(found)
    samples: dict[str, list[dict[str, Any]]] = results.pop("samples")
    results["collm"] = {
        "tasks": lm.figures(),
        "settings": lm.settings,
        "seed": lm.params.seed,
        "commit": commit(),
        "versions": versions(),
    }
    if out is not None:
        for task, rows in samples.items():
            write_text(Path(out) / f"samples_{task}.jsonl", "".join(_json(row) + "\n" for row in rows))
        called = name or lm.alone or " + ".join(lm.llm.model_names)
        for task, result in eval_results(called, results, samples, lm.settings, lm.params.seed):
            require_own(Path(out) / f"{task}.json", is_result, "an evaluation")
            result.save(Path(out) / f"{task}.json")
        write_text(Path(out) / RESULTS, _json(results, indent=2) + "\n")
    return results


def _manager(tasks: Sequence[str], own: list[str]) -> TaskManager:
    """Reading the harness's own 13,000 task files takes a while: left out where nobody asks for them."""
    for folder in own:
        if not Path(folder).is_dir():
            raise CollmError(f"{folder} is not a folder; give the one that holds your task files")
    alone = TaskManager(include_path=own, include_defaults=False)
    return alone if all(_matches(task, alone) for task in tasks) else TaskManager(include_path=own)


def _matches(task: str, manager: TaskManager) -> list[str]:
    if task.endswith((".yaml", ".yml")) and Path(task).is_file():
        return [task]
    return list(pattern_match([task], manager.all_tasks))


def _named(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    names: dict[str, None] = {}
    for task in tasks:
        matches = _matches(task, manager)
        if not matches:
            hint = nearest(task, manager.all_tasks, "a folder of your own task files is given by --include-path")
            raise CollmError(f"the harness has no task {task!r}; {hint}")
        names |= dict.fromkeys(matches)
    return list(names)


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)
