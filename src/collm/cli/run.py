"""`collm run`: all steps of a recipe, from scores to the report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from collm.cli.compare import show_comparison
from collm.cli.console import ResumableCommand, waiting
from collm.cli.options import changes_argument, recipe_argument

if TYPE_CHECKING:
    from collm.training.recipe import Recipe
    from collm.workflow.run import Outcome


@click.command(cls=ResumableCommand, short_help="All steps of a recipe: train, calibrate, evaluate, report.")
@recipe_argument
@changes_argument
@click.option("--restart", is_flag=True, help="Throw away what an earlier run of the recipe left.")
def run(recipe: Path, changes: tuple[str, ...], restart: bool) -> None:
    """Score, train, calibrate, evaluate and report, as RECIPE (YAML) says: collm init writes one.

    A stopped run goes on where it was; a finished one is told again. Everything lies in the recipe's `out`: the
    checkpoint, the curve (calibration/), the answers (evaluation/) and the page (report.html).

    KEY=VALUE changes a setting of the recipe for this run: collm run recipe.yaml training.epochs=2 out=runs/longer
    """
    from collm.training.recipe import load_recipe
    from collm.workflow.checking import check_run

    read = load_recipe(recipe, changes)
    asked = check_run(read)
    with waiting(f"running {recipe}: everything goes to {read.out}"):
        from collm.training.summary import summary
        from collm.workflow.run import run as run_steps

    outcome = run_steps(read, asked, restart=restart)
    lines = [line for line in summary(read.out) if line[0] not in ("checkpoint", "next")]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")
    show_comparison(outcome.results, outcome.rival, seed=read.training.seed)
    _show_next(read, outcome)


def _show_next(recipe: Recipe, outcome: Outcome) -> None:
    out = shlex.quote(str(recipe.out))
    click.echo(f"page        {outcome.report}")
    click.echo(f"checkpoint  {out}")
    chosen = outcome.chosen
    if chosen is not None:
        from collm.llm.deferral import told

        click.echo(f"by default  {told(chosen)}; --deferral-rate and --threshold say otherwise")
    click.echo(f'next        collm generate {out} "your question"')
    click.echo(f"            collm serve {out}")
