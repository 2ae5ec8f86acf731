"""`collm oracle`: what deferring could gain at best, token by token on gold text."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.calibrate import parse_rates
from collm.cli.console import ResumableCommand, echo_json, waiting
from collm.cli.examples import data_options, read_examples
from collm.cli.param_types import OUTPUT_FILE
from collm.cli.system import check_llm, identity, load_llm, model_options
from collm.files import beside, claimed, require_apart, require_own

if TYPE_CHECKING:
    from collm.evaluation.oracle import OracleReport


@click.command(cls=ResumableCommand, short_help="What deferring could gain at best, on gold text.")
@click.argument("checkpoint")
@click.option("--data", required=True, metavar="DATA", help="Gold text: examples as for training.")
@click.option(
    "--threshold", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of the gate, a probability."
)
@click.option(
    "--rates", default="0.1,0.2,0.3", show_default=True, callback=parse_rates, help="More rates to compare at."
)
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Longer is cut off.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--out", type=OUTPUT_FILE, metavar="FILE", help="Keeps what was read (.jsonl), so that a stopped run resumes."
)
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
@data_options
@model_options
def oracle(checkpoint: str, data: str, out: Path | None, as_json: bool, **options: Any) -> None:
    """Read DATA with every model of CHECKPOINT and say, token by token, who would have been right.

    Nothing is written: each token is predicted after the gold tokens before it (each chunk after the gold chunks, where
    models have different tokenizers). CHECKPOINT may be a plain model with assistants, too; it has no gate, and its
    rivals are then compared at the oracle's own rate.
    """
    examples = read_examples(data, options)
    if len(check_llm(checkpoint, options).model_names) == 1:
        raise click.UsageError("there is no assistant to be compared with: give one with --assistant")
    figures = None if out is None else beside(out, ".json")
    with nullcontext() if out is None else claimed(out):
        with waiting(f"reading with {checkpoint}"):
            from collm.data.encoding import usable
            from collm.evaluation.oracle import is_report, report
            from collm.evaluation.reading import read

        if out is not None and figures is not None:
            for path in (out, figures):
                require_apart(path, [data])
            require_own(figures, is_report, "collm oracle")
        llm = load_llm(checkpoint, options)
        if out is not None and figures is not None and not out.exists():
            figures.unlink(missing_ok=True)  # of a reading that was deleted: it would pass for the new one's
        reading = read(
            llm.models,
            llm.formatters,
            usable(examples, llm.formatters, skip_bad=options["skip_bad"]),
            max_length=options["max_length"],
            out=out,
            identity=identity(checkpoint, options),
            sharing=llm.sharing,
        )
        found = report(
            reading,
            llm.model_names,
            threshold=options["threshold"],
            rates=options["rates"],
            seed=options["seed"],
            unit="token" if llm.sharing is None else "chunk",
        )
        if figures is not None:
            found.save(figures)
    if as_json:
        echo_json(found.to_dict())
    else:
        _show(found)


def _show(found: OracleReport) -> None:
    from collm.llm.deferral import far
    from collm.report.systems import SystemRow, systems_table
    from collm.report.terminal import print_table
    from collm.types import told_rate

    rows = [
        SystemRow(
            row.name, row.accuracy, row.ci95, deferral_rate=row.deferral_rate, note=f"asked at {row.asked_rate:.1%}"
        )
        for row in found.rows
    ]
    title = f"{found.tokens} gold {found.unit}s of {found.examples} examples"
    print_table(systems_table(rows, f"{found.unit}_accuracy", title))
    for at, reached in zip(found.by_rate, found.reached, strict=True):
        figures = [
            f"{name} {at[name]:.1%}" + (f" (rate reached: {rate:.1%})" if far(rate, at["rate"]) else "")
            for name, rate in reached.items()
        ]
        click.echo(f"at a rate of {told_rate(at['rate'])}: {', '.join(figures)}")
