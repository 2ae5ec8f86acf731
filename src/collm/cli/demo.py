"""`collm demo`: the whole method in minutes, without downloads."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import ResumableCommand, waiting
from collm.cli.param_types import OUTPUT_FOLDER


@click.command(cls=ResumableCommand, short_help="The whole method in minutes, without downloads.")
@click.option(
    "--out",
    type=OUTPUT_FOLDER,
    default="collm-demo",
    show_default=True,
    metavar="DIR",
    help="Where all of it goes.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes all random choices.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of each of the two processes. Another number gives other figures: sums of floats in another order.",
)
def demo(out: Path, seed: int, threads: int) -> None:
    """Train three small models from scratch, teach them to write together, and show what that is worth.

    Two to three minutes on two quiet CPU cores. Writes DIR/results.json and DIR/report.html.
    """
    from collm.training.checking import require_packages

    require_packages(("accelerate",))
    with waiting(f"the demo goes to {out}"):
        from collm.demo import run_demo

    run_demo(out, seed=seed, threads=threads)
