"""`collm trace`: who wrote which token, from a trace file."""

from __future__ import annotations

from pathlib import Path

import click

from collm.cli.console import Command
from collm.cli.options import OUTPUT


@click.command(cls=Command, short_help="Show who wrote which token.")
@click.argument("trace_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--html", type=OUTPUT, metavar="FILE", help="Write a page: authors in colour, the gate on hover.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N texts.")
def trace(trace_file: Path, html: Path | None, limit: int | None) -> None:
    """Show the texts of TRACE_FILE (from `collm eval --out` or `collm generate --trace`), coloured by author."""
    from collm.report.terminal import print_traces
    from collm.report.trace import read_traces

    traces = read_traces(trace_file)[:limit]
    if html is None:
        print_traces(traces)
        return
    from collm.report.html import write_html

    write_html(traces, html)
    click.echo(f"written to {html}")
