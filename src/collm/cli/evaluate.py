"""`collm eval`: a task's metric with its interval, or tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from collm.cli.asking import decoding_options, sampling_params
from collm.cli.console import ResumableCommand, echo_json
from collm.cli.examples import askable, data_options, read_examples
from collm.cli.options import TASK_HELP, alone_option, batch_size_option, unsandboxed_option
from collm.cli.param_types import OUTPUT
from collm.cli.system import check_llm, identity, load_llm, model_options
from collm.files import claimed
from collm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collm.evaluation.result import EvalResult

OWN = ("task", "data", "split", "skip_bad", "unsandboxed")
"""Options that say nothing to the harness."""
HARNESS = ("include_path", "num_fewshot", "apply_chat_template", "system")
"""Options that say nothing without --tasks."""
OF_TASKS = {"max_tokens": "max_gen_toks", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k"}
"""What the harness's tasks say for themselves, unless it is given; in our words and in the harness's."""


@click.command("eval", cls=ResumableCommand, short_help="Answer and score the questions of a task.")
@click.argument("checkpoint")
@click.option("--task", metavar="TASK", help=TASK_HELP)
@click.option("--data", metavar="DATA", help="Test examples.")
@click.option("--tasks", metavar="NAMES", help="Instead: tasks of the lm-evaluation-harness, with commas between them.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    metavar="DIR",
    help="Of --tasks: a folder of task files of your own.",
)
@click.option("--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Of --tasks: examples in the prompt.")
@click.option("--apply-chat-template", is_flag=True, help="Of --tasks: prompts as conversations.")
@click.option("--system", metavar="TEXT", help="Of --tasks: a system message for every conversation.")
@click.option(
    "--out",
    type=OUTPUT,
    metavar="PATH",
    help="File for the trace of every answer, with --tasks a folder for all that is found; a stopped run resumes.",
)
@click.option("--name", metavar="NAME", help="What the system is called in the table.")
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
@unsandboxed_option
@alone_option
@batch_size_option
@data_options
@decoding_options
@model_options
def evaluate(
    checkpoint: str,
    task: str | None,
    data: str | None,
    tasks: str | None,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Let CHECKPOINT answer the questions of DATA and score the answers.

    CHECKPOINT may be a plain model, too: the same questions then show what it reaches alone.

    With --tasks, let EleutherAI's lm-evaluation-harness ask: gsm8k,hendrycks_math,ifeval,pubmedqa and all others. How
    long answers may be and how tokens are drawn is then said by the tasks, unless it is given here.
    """
    ctx = click.get_current_context()
    given = {name for name in ctx.params if ctx.get_parameter_source(name) != ParameterSource.DEFAULT}
    params = sampling_params(options)
    if tasks is not None:
        _refuse(given, OWN, "--tasks asks what the harness's tasks say: leave out {}")
        _harness(checkpoint, tasks, params, given, out, as_json, options)
        return
    _refuse(given, HARNESS, "{} says something about tasks of the harness: add --tasks")
    if task is None or data is None:
        missing = "--task" if task is None else "--data"
        raise click.UsageError(f"give --task and --data, or --tasks for the harness's own; {missing} is missing")

    from collm.evaluation.runs import require_free
    from collm.evaluation.shipped import get_task

    # What can be found wrong without the models is told before they are loaded.
    if out is not None:
        require_free(out, [data])
    asked, examples = get_task(task, sandboxed=not options["unsandboxed"]), read_examples(data, options)
    asked.require()
    check_llm(checkpoint, options, params)
    with nullcontext() if out is None else claimed(out):
        llm = load_llm(checkpoint, options, params)

        from collm.evaluation.evaluate import evaluate as run

        result = run(
            llm,
            asked,
            askable(llm, examples, options, asked),
            params,
            batch_size=options["batch_size"],
            out=out,
            name=options["name"] or "",
            alone=options["alone"],
            identity=identity(checkpoint, options),
        )
    if as_json:
        echo_json(asdict(result))
    else:
        _show(result)


def _refuse(given: set[str], names: tuple[str, ...], message: str) -> None:
    """Refuse options that would be ignored."""
    for name in names:
        if name in given:
            raise click.UsageError(message.format("--" + name.replace("_", "-")))


def _harness(
    checkpoint: str,
    tasks: str,
    params: SamplingParams,
    given: set[str],
    out: Path | None,
    as_json: bool,
    options: Mapping[str, Any],
) -> None:
    generation: dict[str, Any] = {theirs: options[ours] for ours, theirs in OF_TASKS.items() if ours in given}
    if "temperature" in given:
        generation["do_sample"] = options["temperature"] > 0
    if "stop" in given:
        generation["until"] = list(options["stop"])
    check_llm(checkpoint, options, params)
    with nullcontext() if out is None else claimed(out, folder=True):
        llm = load_llm(checkpoint, options, params)

        from collm.evaluation.harness import CollaborativeHarnessLM, run_tasks

        lm = CollaborativeHarnessLM(llm, params, alone=options["alone"], batch_size=options["batch_size"], out=out)
        results = run_tasks(
            lm,
            [name.strip() for name in tasks.split(",") if name.strip()],
            out=out,
            generation=generation,
            limit=options["limit"],
            name=options["name"] or "",
            **{name: options[name] for name in HARNESS},
        )
    if as_json:
        echo_json(results, default=str)
    else:
        _show_harness(results)


def _show_harness(results: dict[str, Any]) -> None:
    from rich.table import Table

    from collm.report.terminal import print_table
    from collm.types import told_length

    table = Table("task", "filter", "shots", "metric")
    for heading in ("value", "± standard error"):
        table.add_column(heading, justify="right")
    for task, found in {**results["results"], **results.get("groups", {})}.items():
        shots = str(results["n-shot"].get(task, ""))
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr"):
                error = found.get(f"{metric}_stderr,{kind}")
                table.add_row(task, kind, shots, metric, _number(value), _number(error))
    print_table(table)
    for task, told in results["collm"]["tasks"].items():
        parts = []
        if "texts" in told:
            passes = ", ".join(f"{name} {count}" for name, count in told["forward_passes"].items())
            length = told_length(told["tokens"], sum(told["written_by"].values()), told["unit"])
            parts.append(
                f"{told['texts']} texts of {length}, {told['deferral_rate']:.1%} written by assistants; "
                f"forward passes: {passes}"
            )
        if "scored_texts" in told:
            credit = ", ".join(f"{name} {share:.1%}" for name, share in told["credit"].items())
            parts.append(
                f"{told['scored_texts']} texts of {told['scored_tokens']} tokens scored; credited to: {credit}"
            )
        click.echo(f"{task}: " + "; ".join(parts))


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""


def _show(result: EvalResult) -> None:
    from collm.report.systems import SystemRow, systems_table
    from collm.report.terminal import print_table

    row = SystemRow(
        result.name,
        result.value,
        result.ci95,
        deferral_rate=result.deferral_rate,
        changed_share=result.changed_share,
    )
    print_table(systems_table([row], result.metric))
    counts = ", ".join(f"{name} {count}" for name, count in result.forward_passes.items())
    click.echo(
        f"{result.num_examples} questions of {result.task} (version {result.task_version}), seed {result.seed}; "
        f"{result.length} in {result.seconds:.0f} s; {result.no_answer} without an answer; "
        f"forward passes: {counts}"
    )
    if result.metrics:
        click.echo(result.further())
    if result.equations_shown:
        share = result.equations_right / result.equations_shown
        click.echo(f"equations computed right: {result.equations_right} of {result.equations_shown} ({share:.1%})")
