"""`collm compare`: systems that answered the same questions, side by side."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from collm.cli.console import Command, echo_json
from collm.cli.param_types import EXISTING

if TYPE_CHECKING:
    from collm.evaluation.result import EvalResult


@click.command(cls=Command, short_help="Put evaluations side by side, with paired tests.")
@click.argument("results", nargs=-1, required=True, type=EXISTING)
@click.option("--against", metavar="NAME", help="The system that the others are compared with.  [default: the first]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--json", "as_json", is_flag=True, help="The comparisons as one JSON list.")
def compare(results: tuple[Path, ...], against: str | None, seed: int, as_json: bool) -> None:
    """Compare RESULTS (the .json beside what `collm eval --out` wrote) on the questions that all of them answered.

    Each system is tested against one of them on the same examples: the exact McNemar test, and a bootstrap interval of
    the difference. With several, p-values corrected for their number (Holm) stand beside the raw ones. Examples that
    come in groups of near-duplicates (their field `group`) are kept together in both. A system that was scored by
    another task's rule stands in the table, and is not tested. Systems of one name are told apart by their files.
    """
    from collm.evaluation.comparison import compare_all, judged_alike, rival_of
    from collm.evaluation.overview import told_apart
    from collm.evaluation.result import EvalResult

    found = told_apart(results, [EvalResult.load(path) for path in results])
    try:
        rival = rival_of(found, against)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        tested, untested = judged_alike(rival, found)
        echo_json([asdict(comparison) for comparison in compare_all(rival, tested or untested, seed=seed)])
        return
    show_comparison(found, rival, seed=seed)


def show_comparison(found: list[EvalResult], rival: EvalResult, *, seed: int = 0) -> None:
    """The table of systems, and a line for each paired test."""
    from collm.evaluation.comparison import compare_all, judged_alike
    from collm.evaluation.overview import system_row
    from collm.report.systems import systems_table
    from collm.report.terminal import print_table

    tested, untested = judged_alike(rival, found)
    # Where nothing can be tested, the error says why.
    comparisons = compare_all(rival, tested or untested, seed=seed)
    title = f"{rival.num_examples} questions of {rival.task}"
    if rival.num_groups is not None:
        title += f" in {rival.num_groups} groups of near-duplicates"
    print_table(systems_table([system_row(result) for result in found], rival.metric, title))
    for comparison in comparisons:
        click.echo(comparison.summary())
    if untested:
        told = ", ".join(f"{other.name} (task {other.task} v{other.task_version})" for other in untested)
        click.echo(f"not tested, since another rule says what is right: {told}")
