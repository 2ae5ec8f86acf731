"""`collm report`: several evaluations on one page."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import Command
from collm.cli.param_types import EXISTING, OUTPUT_FILE


def _weights(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """`MODEL=NUMBER`, each."""
    found: dict[str, float] = {}
    for value in values:
        model, _, number = value.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not model or not 0 <= weight < float("inf"):
            raise click.BadParameter(f"{value!r} is not MODEL=NUMBER with a number from 0, such as large=4.5")
        found[model] = weight
    return found


@click.command(cls=Command, short_help="Put evaluations on one page, with curves and samples.")
@click.argument("results", nargs=-1, required=True, type=EXISTING)
@click.option("--out", required=True, type=OUTPUT_FILE, metavar="FILE", help="The page, an .html file.")
@click.option("--title", metavar="TEXT", help="Of the page.  [default: the name of the task]")
@click.option("--against", metavar="NAME", help="The system that the others are tested against.  [default: the first]")
@click.option(
    "--calibration",
    "checkpoints",
    multiple=True,
    type=EXISTING,
    metavar="CHECKPOINT",
    help="Draw the curves of its calibrations, too. Repeat it for several.",
)
@click.option(
    "--cost",
    "weights",
    multiple=True,
    callback=_weights,
    metavar="[SYSTEM/]MODEL=N",
    help="What a forward pass of this model costs (in that system).  [default: 1]",
)
@click.option(
    "--samples", type=click.IntRange(min=0), default=6, show_default=True, metavar="N", help="Texts of each system."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap, and of the choice of texts.")
def report(
    results: tuple[Path, ...],
    out: Path,
    title: str | None,
    against: str | None,
    checkpoints: tuple[Path, ...],
    weights: dict[str, float],
    samples: int,
    seed: int,
) -> None:
    """Write one page about RESULTS (the .json beside what `collm eval --out` wrote) of the same questions.

    It shows the table of systems, paired tests, quality against deferral rate and cost (runs of one system at several
    rates make a curve), what the gate says, which tokens are deferred and what they are changed to, and texts coloured
    by author. Traces are looked for beside each result. The page loads nothing and reads without any script.
    """
    from collm.errors import CollmError
    from collm.evaluation.comparison import rival_of
    from collm.evaluation.overview import Overview, read_results, write_overview
    from collm.evaluation.written import read_written
    from collm.models.info import load_info

    if out.suffix not in (".html", ".htm"):
        raise click.UsageError(f"--out {out}: a page ends in .html")
    found = read_results(results)
    try:
        rival = rival_of(found, against)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    tables, owners = [], []
    for checkpoint in checkpoints:
        info = load_info(checkpoint)
        if info is None or not info.calibration:
            raise CollmError(
                f"{checkpoint} has no calibration to draw; run collm calibrate, or leave --calibration out"
            )
        tables += info.calibration
        owners += [str(checkpoint)] * len(info.calibration)
    models = {name for result in found for name in result.forward_passes}
    models |= {f"{result.name}/{name}" for result in found for name in result.forward_passes}
    for name in weights:
        if name not in models:
            raise click.UsageError(f"--cost {name}: there is no such model; there are {', '.join(sorted(models))}")
    written = []
    for path, result in zip(results, found, strict=True):
        written.append(read_written(path, result, samples=samples, seed=seed))
        click.echo(f"{result.name}: {written[-1].missing or 'read with its traces'}", err=True)
    overview = Overview(
        title=title or f"Evaluations on {rival.task}",
        written=tuple(written),
        rival=rival,
        calibrations=tuple(tables),
        calibrated=tuple(owners) if len(set(owners)) > 1 else (),
        weights=weights,
        seed=seed,
    )
    write_overview(overview, out)
    click.echo(f"written to {out}")
