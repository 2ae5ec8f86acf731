"""`collm eval`: a task's metric with its interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from collm.cli.console import ResumableCommand
from collm.cli.options import (
    OUTPUT,
    batch_size_option,
    data_options,
    decoding_options,
    load_llm,
    model_options,
    read_examples,
    sampling_params,
)


@click.command("eval", cls=ResumableCommand, short_help="Answer and score the questions of a task.")
@click.argument("checkpoint")
@click.option("--task", required=True, metavar="TASK", help="What answers are worth: a built-in task's name.")
@click.option("--data", required=True, metavar="DATA", help="Test examples.")
@click.option("--out", type=OUTPUT, metavar="FILE", help="Trace of every answer; with it, a stopped run resumes.")
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
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

    chosen = get_task(task)
    examples = read_examples(data, options)
    result = run(load_llm(checkpoint, options), chosen, examples, params, batch_size=options["batch_size"], out=out)
    click.echo(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else result.summary())
