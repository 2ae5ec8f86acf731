"""`collm eval`: a task's metric with its interval."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.console import ResumableCommand
from collm.cli.options import (
    OUTPUT,
    alone_option,
    batch_size_option,
    data_options,
    decoding_options,
    identity,
    load_llm,
    model_options,
    read_examples,
    sampling_params,
    task_option,
)

if TYPE_CHECKING:
    from collm.evaluation.result import EvalResult


@click.command("eval", cls=ResumableCommand, short_help="Answer and score the questions of a task.")
@click.argument("checkpoint")
@task_option
@click.option("--data", required=True, metavar="DATA", help="Test examples.")
@click.option("--out", type=OUTPUT, metavar="FILE", help="Trace of every answer; with it, a stopped run resumes.")
@click.option("--name", metavar="NAME", help="What the system is called in the table.")
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
@alone_option
@batch_size_option
@data_options
@decoding_options
@model_options
def evaluate(checkpoint: str, task: str, data: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Let CHECKPOINT answer the questions of DATA and score the answers.

    CHECKPOINT may be a plain model, too: the same questions then show what it reaches alone.
    """
    params = sampling_params(options)

    from collm.evaluation.evaluate import evaluate as run
    from collm.evaluation.task import get_task

    result = run(
        load_llm(checkpoint, options),
        get_task(task),
        read_examples(data, options),
        params,
        batch_size=options["batch_size"],
        out=out,
        name=options["name"] or "",
        alone=options["alone"],
        identity=identity(checkpoint, options),
    )
    if as_json:
        click.echo(json.dumps(asdict(result), ensure_ascii=False))
    else:
        _show(result)


def _show(result: EvalResult) -> None:
    from rich.console import Console

    from collm.report.systems import SystemRow, systems_table

    row = SystemRow(
        result.name,
        result.value,
        result.ci95,
        deferral_rate=result.deferral_rate,
        changed_share=result.changed_share,
    )
    Console().print(systems_table([row], result.metric))
    counts = ", ".join(f"{name} {count}" for name, count in result.forward_passes.items())
    click.echo(
        f"{result.num_examples} questions of {result.task} (version {result.task_version}), seed {result.seed}; "
        f"{result.tokens} tokens in {result.seconds:.0f} s; {result.no_answer} without an answer; "
        f"forward passes: {counts}"
    )
    if result.metrics:
        click.echo(result.further())
    if result.equations_shown:
        share = result.equations_right / result.equations_shown
        click.echo(f"equations computed right: {result.equations_right} of {result.equations_shown} ({share:.1%})")
