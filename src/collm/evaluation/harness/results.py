"""The harness's results as our own, so that systems can be compared on the same documents."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from collm.evaluation.harness.records import generation_figures
from collm.evaluation.result import EvalResult, commit, versions
from collm.evaluation.stats import bootstrap_ci

INVALID = "[invalid]"
"""What the harness's filters make of a text in which they find no answer."""
Rows = Sequence[Mapping[str, Any]]


def eval_results(
    name: str, results: Mapping[str, Any], samples: Mapping[str, Rows], settings: Mapping[str, Any], seed: int
) -> Iterator[tuple[str, EvalResult]]:
    """One for each task and filter, with the name of its file, where a metric is a mean of shares over documents.

    The first such metric of the task is the main one, the others go with it. Documents that are asked several times
    have one score.

    Args:
        name: how the system is called in tables.
        results: of the harness, with our figures under `collm`.
        samples: its log of every document, by task.
    """
    for task, rows in samples.items():
        by_filter: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            by_filter[str(row["filter"])].append(row)
        for filter, chosen in by_filter.items():
            means = dict(_means(results["results"][task], chosen, filter))
            if means:
                label = task if filter == "none" else f"{task}.{filter}"
                told = {**generation_figures([], settings["models"]), **results["collm"]["tasks"].get(task, {})}
                version = results["versions"].get(task)
                yield label, _result(name, label, version, chosen, means, told, settings, seed)


def _means(found: Mapping[str, Any], rows: Rows, filter: str) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Metrics and their scores by document: those that are shares, as tables, charts and intervals take them to be."""
    for metric in rows[0]["metrics"]:
        value, scores = found.get(f"{metric},{filter}"), [row[metric] for row in rows]
        # BLEU goes to 100, and would be told as 2040.0 %.
        if isinstance(value, int | float) and all(
            isinstance(score, int | float) and 0 <= score <= 1 for score in scores
        ):
            mean = sum(scores) / len(scores)
            if abs(mean - value) <= 1e-9 * max(1.0, abs(value)):  # perplexities and alike are no means
                yield metric, tuple(float(score) for score in scores)


def _result(
    name: str,
    task: str,
    version: Any,
    rows: Rows,
    means: Mapping[str, tuple[float, ...]],
    told: Mapping[str, Any],
    settings: Mapping[str, Any],
    seed: int,
) -> EvalResult:
    (metric, scores), *further = means.items()
    documents = hashlib.sha256(" ".join(str(row["doc_hash"]) for row in rows).encode()).hexdigest()[:16]
    return EvalResult(
        name=name,
        task=task,
        task_version=int(version) if isinstance(version, int | float) else 0,
        metric=metric,
        value=sum(scores) / len(scores),
        ci95=bootstrap_ci(scores),
        num_examples=len(rows),
        deferral_rate=told["deferral_rate"],
        tokens=told["tokens"],
        written_by=told["written_by"],
        changed_tokens=told["changed_tokens"],
        changed_share=told["changed_tokens"] / max(1, sum(told["written_by"].values())),
        abstained=told["abstained"],
        forward_passes=told["forward_passes"],
        no_answer=sum(list(row["filtered_resps"]) == [INVALID] for row in rows),
        finish_reasons=told["finish_reasons"],
        equations_right=0,
        equations_shown=0,
        seconds=told["seconds"],
        seed=seed,
        settings={**settings, "task": f"{task} of the lm-evaluation-harness", "examples": documents},
        commit=commit(),
        versions=versions(),
        unit=told["unit"],
        ids=tuple(str(row["doc_id"]) for row in rows),
        scores=scores,
        metrics={other: sum(values) / len(values) for other, values in further},
        metrics_ci95={other: bootstrap_ci(values) for other, values in further},
    )
