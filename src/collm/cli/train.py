"""`collm train`: a recipe makes a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import ResumableCommand, waiting
from collm.cli.options import changes_argument, recipe_argument


@click.command(cls=ResumableCommand, short_help="Train a base with its gate, as a recipe says.")
@recipe_argument
@changes_argument
@click.option("--restart", is_flag=True, help="Throw away what an earlier run of the recipe left.")
def train(recipe: Path, changes: tuple[str, ...], restart: bool) -> None:
    """Train a base model with a gate as RECIPE (YAML) says.

    Pseudo-labels, the gate's initialisation, then marginal likelihood. A stopped run resumes.

    KEY=VALUE changes a setting of the recipe for this run: collm train recipe.yaml training.epochs=2 out=runs/longer
    """
    from collm.training.checking import check_recipe
    from collm.training.recipe import load_recipe

    read = load_recipe(recipe, changes)
    check_recipe(read)
    with waiting(f"training {read.out} as {recipe} says"):
        from collm.training.summary import summary
        from collm.training.train import train as run

    lines = summary(run(read, restart=restart))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        click.echo(f"{name:<{width}}  {value}")
