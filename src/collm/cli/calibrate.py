"""`collm calibrate`: thresholds for deferral rates, stored in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from collm.cli.console import ResumableCommand
from collm.cli.examples import askable, data_options, read_examples
from collm.cli.options import TASK_HELP, batch_size_option, unsandboxed_option
from collm.cli.param_types import OUTPUT_FOLDER, Named
from collm.cli.system import check_llm, identity, load_llm, model_options
from collm.errors import CollmError
from collm.files import claimed
from collm.sampling_params import Signal

if TYPE_CHECKING:
    from collm.models.info import CalibrationTable

DEFAULT_RATES = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1"


def parse_rates(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        rates = tuple(float(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"wants numbers with commas between them, as in 0,0.1,0.5, not {value!r}") from error
    if not all(0 <= rate <= 1 for rate in rates):
        raise click.BadParameter("rates lie between 0 and 1")
    return rates


@click.command(cls=ResumableCommand, short_help="Find thresholds for deferral rates.")
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--task", required=True, metavar="TASK", help=TASK_HELP)
@click.option("--data", required=True, metavar="DATA", help="Calibration examples, neither trained nor tested on.")
@click.option(
    "--signal",
    type=Named(get_args(Signal)),
    default="gate",
    show_default=True,
    help="What the threshold is for: the gate, the expected gain (--deferral expected_gain), or a rival that shall "
    "defer as often.",
)
@click.option("--rates", default=DEFAULT_RATES, show_default=True, callback=parse_rates, help="Wanted deferral rates.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Steps towards each rate.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of one answer.")
@batch_size_option
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes all random choices.")
@click.option(
    "--out",
    type=OUTPUT_FOLDER,
    metavar="DIR",
    help="Where the curve (CSV, SVG, PNG) goes, and every text written on the way, so that a stopped run "
    "resumes.  [default: the curve alone, to CHECKPOINT]",
)
@unsandboxed_option
@data_options
@model_options
def calibrate(
    checkpoint: Path, task: str, data: str, rates: tuple[float, ...], out: Path | None, **options: Any
) -> None:
    """Find the threshold for each deferral rate, and what quality it buys.

    The table is stored in the checkpoint, so that --deferral-rate just works; the curve is written as CSV and plot.
    """
    with nullcontext() if out is None else claimed(out, folder=True):
        _calibrate(checkpoint, task, data, rates, out, options)


def _calibrate(
    checkpoint: Path, task: str, data: str, rates: tuple[float, ...], out: Path | None, options: Mapping[str, Any]
) -> None:
    from collm.evaluation.shipped import get_task

    asked = get_task(task, sandboxed=not options["unsandboxed"])
    asked.require()
    examples = read_examples(data, options)
    system = check_llm(str(checkpoint), options)
    if len(system.model_names) == 1:
        raise CollmError(f"{checkpoint} has no assistant to defer to: give one (--assistant)")
    if options["signal"] in ("gate", "expected_gain") and not system.has_gate:
        raise CollmError(
            f"--signal {options['signal']} needs a gate, and {checkpoint} has none: train one (collm train), or take "
            "--signal entropy, top_probability or random"
        )
    from collm.calibration import calibrate as run
    from collm.calibration import store_table, trained_state, write_curve

    trained = trained_state(checkpoint)
    llm = load_llm(str(checkpoint), options)

    table = run(
        llm,
        asked,
        askable(llm, examples, options, asked),
        signal=options["signal"],
        target_rates=rates,
        seed=options["seed"],
        rounds=options["rounds"],
        max_tokens=options["max_tokens"],
        batch_size=options["batch_size"],
        out=out,
        identity=identity(str(checkpoint), options),
    )
    before = store_table(checkpoint, table, trained=trained)
    # In a checkpoint, the curves of all signals find room; a folder that is given holds one.
    files = write_curve(table, out or (checkpoint if table.signal == "gate" else checkpoint / table.signal))
    _show(table)
    instead = "" if before is None else f" (in place of an earlier table of {len(before.rows)} rates)"
    click.echo(f"stored in {checkpoint}{instead}; the curve is in {', '.join(str(path) for path in files)}")


def _show(table: CalibrationTable) -> None:
    from collm.calibration import missed
    from collm.report.plots import told_threshold

    far = missed(table)
    click.echo(f"{'wanted':>8} {'achieved':>9} {'threshold':>11} {table.metric:>12}")
    for index, row in enumerate(table.rows):
        notes = ("  best" if index == table.best else "") + ("  missed" if row in far else "")
        click.echo(
            f"{row.wanted:>8} {row.achieved_rate:>9.3f} {told_threshold(row, table.signal):>11} "
            f"{row.metric_value:>12.3f}{notes}"
        )
    if far:
        highest = max(row.achieved_rate for row in table.rows)
        rates = ", ".join(f"{row.target_rate:g}" for row in far)
        click.echo(
            f"warning: the rates {rates} were missed (highest achieved: {highest:.3f}): --deferral-rate takes a "
            "threshold between the two measured around it, or where there are no two gives what stands under achieved. "
            "Where assistants have nothing to say (tools), the base writes, and no threshold can change that; else "
            "more --rounds come nearer",
            err=True,
        )
