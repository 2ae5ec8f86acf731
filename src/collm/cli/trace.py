"""`collm trace`: who wrote which token, from a trace file."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

from collm.cli.console import Command
from collm.cli.param_types import OUTPUT_FILE
from collm.errors import CollmError
from collm.files import beside, require_apart

if TYPE_CHECKING:
    from collm.report.trace import Trace


@click.command(cls=Command, short_help="Show who wrote which token.")
@click.argument("trace_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--html", type=OUTPUT_FILE, metavar="FILE", help="Write a page: authors in colour, the gate on hover.")
@click.option("--classes", is_flag=True, help="Count instead: deferred names, numbers, function words, ...")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N texts.")
def trace(trace_file: Path, html: Path | None, classes: bool, limit: int | None) -> None:
    """Show the texts of TRACE_FILE (from `collm eval --out` or `collm generate --trace`), coloured by author."""
    if html is not None and classes:
        raise click.UsageError("--classes prints a table and --html writes a page of texts: ask for one of them")
    if html is not None:
        require_apart(html, [trace_file])
    texts = beside(trace_file, ".jsonl", instead_of=".json")
    if trace_file.suffix == ".json" and texts.is_file():
        raise click.UsageError(f"{trace_file} is a result; its texts are in {texts}")
    from collm.report.terminal import classes_table, print_table, print_traces
    from collm.report.tokens import token_figures
    from collm.report.trace import stream_traces

    traces: Iterator[Trace] = islice(stream_traces(trace_file), limit)
    first = next(traces, None)
    if first is None:
        raise CollmError(f"{trace_file} holds no texts")
    traces = chain([first], traces)
    if classes:
        print_table(classes_table(token_figures(traces)))
        return
    if html is None:
        print_traces(traces)
        return
    from collm.report.html import write_html

    write_html(list(traces), html)
    click.echo(f"written to {html}")
