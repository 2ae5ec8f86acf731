"""`collm compare`: systems that answered the same questions, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from collm.cli.console import Command
from collm.cli.options import EXISTING


@click.command(cls=Command, short_help="Put evaluations side by side, with paired tests.")
@click.argument("results", nargs=-1, required=True, type=EXISTING)
@click.option("--against", metavar="NAME", help="The system that the others are compared with.  [default: the first]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="The comparisons as one JSON list.")
def compare(results: tuple[Path, ...], against: str | None, seed: int, as_json: bool) -> None:
    """Compare RESULTS (the .json beside what `collm eval --out` wrote) on the questions that all of them answered.

    Each system is tested against one of them on the same examples: the exact McNemar test, and a paired bootstrap.
    """
    from rich.console import Console

    from collm.evaluation.result import EvalResult
    from collm.evaluation.result import compare as paired
    from collm.report.systems import SystemRow, systems_table

    found = [EvalResult.load(path) for path in results]
    names = [result.name for result in found]
    if against is not None and against not in names:
        raise click.UsageError(f"there is no system {against!r}; there are {', '.join(names)}")
    rival = found[0] if against is None else found[names.index(against)]
    comparisons = [paired(rival, result, seed=seed) for result in found if result is not rival]
    if as_json:
        click.echo(json.dumps([asdict(comparison) for comparison in comparisons], ensure_ascii=False))
        return
    rows = [
        SystemRow(r.name, r.value, r.ci95, deferral_rate=r.deferral_rate, changed_share=r.changed_share) for r in found
    ]
    Console().print(systems_table(rows, rival.metric, f"{rival.num_examples} questions of {rival.task}"))
    for comparison in comparisons:
        click.echo(comparison.summary())
