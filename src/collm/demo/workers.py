"""The demo's processes: stages side by side, and what they are at, told to whoever waits."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

Stage = Callable[..., Any]
Tell = Callable[[tuple[int, str]], None]
"""Takes a process and what it has to say."""
LOGGER = "collm"
STAGES = "collm.demo"
"""Loggers: all of the package's, whose warnings are told, and the demo's, of which everything is."""
SILENCE = 30.0
"""Seconds after which it is said again what is being done."""


class Progress:
    """Says on stderr what is being done, and since when."""

    def __init__(self, begin: float, console: Console) -> None:
        self.begin = begin
        self.console = console

    def __call__(self, what: str) -> None:
        self.console.print(Text(f"[{time.monotonic() - self.begin:5.0f} s] {what}"), soft_wrap=True, highlight=False)


class Workers:
    """Runs stages side by side; what the libraries print on the way goes to a log file.

    Args:
        count: of processes, one thread each; 0 runs everything here.
        say: takes the lines that the stages log, their warnings among them.
    """

    def __init__(self, count: int, log: Path, say: Callable[[str], None]) -> None:
        self.log = log
        self.say = say
        self.pool: ProcessPoolExecutor | None = None
        if count:
            context = get_context("spawn")
            self._lines: Any = context.Queue()
            self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(self._lines,))
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self._lines.put(None)
            self._listener.join()

    def all(self, jobs: list[tuple[Stage, tuple[Any, ...]]]) -> list[Any]:
        """Results in the order of the jobs; the first error is raised, and what has not begun is dropped."""
        if self.pool is None:
            return [self.here(*job) for job in jobs]
        futures: list[Future[Any]] = [self.pool.submit(_logged, self.log, *job) for job in jobs]
        return [future.result() for future in futures]

    def here(self, stage: Stage, arguments: tuple[Any, ...]) -> Any:
        """Run a stage in this process."""
        with _relayed(lambda line: self.say(line[1])):
            return _logged(self.log, stage, arguments)

    def _listen(self) -> None:
        doing: dict[int, str] = {}
        while True:
            try:
                line = self._lines.get(timeout=SILENCE)
            except queue.Empty:
                if any(doing.values()):
                    self.say("still at it: " + "; ".join(filter(None, doing.values())))
                continue
            if line is None:
                return
            process, what = line
            doing[process] = what
            if what:
                self.say(what)


_tell: Tell | None = None
"""In a worker: how lines get to the process that talks."""


def _begin(lines: Any) -> None:
    import torch

    global _tell
    _tell = lines.put
    # Small models lose time to threads; and sums in another order would be other sums.
    torch.set_num_threads(1)


def _logged(log: Path, stage: Stage, arguments: tuple[Any, ...]) -> Any:
    with log.open("a") as file, _quiet(file), contextlib.nullcontext() if _tell is None else _relayed(_tell):
        try:
            return stage(*arguments)
        finally:
            if _tell is not None:
                _tell((os.getpid(), ""))  # at nothing, from now on


class _Relay(logging.Handler):
    """What the demo says, and whatever warns; to the log as well, where the libraries' words stand beside it."""

    def __init__(self, tell: Tell) -> None:
        super().__init__(logging.INFO)
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        own = record.name.startswith(STAGES)
        if own or record.levelno >= logging.WARNING:
            line = record.getMessage() if own else f"{record.levelname.lower()}: {record.getMessage()}"
            print(line, file=sys.stderr)
            self.tell((os.getpid(), line))


@contextlib.contextmanager
def _relayed(tell: Tell) -> Iterator[None]:
    package, own, relay = logging.getLogger(LOGGER), logging.getLogger(STAGES), _Relay(tell)
    before = own.level
    package.addHandler(relay)
    own.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(relay)
        own.setLevel(before)


@contextlib.contextmanager
def _quiet(file: TextIO) -> Iterator[None]:
    from datasets.utils.logging import disable_progress_bar as no_dataset_bars
    from transformers.utils.logging import disable_progress_bar as no_model_bars

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    no_dataset_bars()
    no_model_bars()
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
