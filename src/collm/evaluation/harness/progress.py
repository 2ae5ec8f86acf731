"""A bar that counts requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def counting(doing: str, total: int, done: int, *, hidden: bool) -> Iterator[Callable[[], None]]:
    """On stderr; yields the function that counts one more."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=Console(stderr=True), disable=hidden) as bar:
        row = bar.add_task(doing, total=total, completed=done)
        yield lambda: bar.advance(row)
