"""`collm prepare`: published data as files that the other commands take."""

from __future__ import annotations

import json
from pathlib import Path

import click

from collm.cli.console import Command
from collm.cli.param_types import EXISTING, OUTPUT_FOLDER
from collm.data.sources import FORMATS


def _parts(ctx: click.Context, param: click.Parameter, value: str | None) -> dict[str, float] | None:
    if value is None:
        return None
    parts: dict[str, float] = {}
    for entry in value.split(","):
        name, _, share = entry.partition("=")
        try:
            parts[name.strip()] = float(share or 1)
        except ValueError as error:
            raise click.BadParameter(f"wants NAME=SHARE, as in train=0.9,validation=0.1, not {entry!r}") from error
    return parts


@click.command(cls=Command, short_help="Turn published data into files for the other commands.")
@click.argument("format", type=click.Choice(list(FORMATS)))
@click.argument("source", type=EXISTING)
@click.option("--out", required=True, type=OUTPUT_FOLDER, metavar="DIR", help="Where PART.jsonl goes.")
@click.option(
    "--parts",
    callback=_parts,
    help="Split by a hash of the question: train=0.9,validation=0.1.  [default: the authors' own parts where the "
    "format has some (mbpp), else all]",
)
@click.option(
    "--test-ids",
    type=EXISTING,
    metavar="FILE",
    help="JSON whose keys or entries are the ids of the official test part; the other records go to --parts.",
)
@click.option("--snippets", type=click.IntRange(min=0), metavar="N", help="BioASQ: snippets put before a question.")
def prepare(
    format: str, source: Path, out: Path, parts: dict[str, float] | None, test_ids: Path | None, snippets: int | None
) -> None:
    """Read SOURCE (a file, or a folder of files) as FORMAT has it, and write rows with messages and gold answers.

    A part whose questions stand in another part of DIR is refused. docs/tasks.md tells where the data come from.
    """
    from collm.data.prepare import prepare as run

    ids = None
    if test_ids is not None:
        try:
            ids = {str(key) for key in json.loads(test_ids.read_text(encoding="utf-8"))}
        except (ValueError, TypeError) as error:
            raise click.UsageError(f"--test-ids {test_ids}: neither a JSON list nor an object ({error})") from error
    options = {} if snippets is None else {"snippets": snippets}
    for path, count in run(format, source, out, parts, test_ids=ids, **options).items():
        click.echo(f"{path}: {count} rows")
