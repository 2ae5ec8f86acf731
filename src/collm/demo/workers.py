"""The demo's processes: stages side by side, and what they are at, told to whoever waits."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

Tell = Callable[[tuple[int, str]], None]
"""Takes a process and what it has to say."""
LOGGER = "collm"
STAGES = "collm.demo"
"""Loggers: all of the package's, whose warnings are told, and the demo's, of which everything is."""
UNTOLD = "collm.training.watch"
"""It warns of a base that is worse alone than before. Here it has to be: what its experts write it leaves to them."""
SILENCE = 30.0
"""Seconds after which it is said again what is being done."""


@dataclass(frozen=True)
class Job:
    """A function of `collm.demo.stages` by its name: whoever only hands out work need not import torch.

    `work`: how much there is to do, in any unit that all jobs have in common.
    """

    stage: str
    arguments: tuple[Any, ...] = ()
    work: float = 0.0


class Progress:
    """Says on stderr what is being done, since when, and how long the rest takes, as soon as that can be told."""

    def __init__(self, begin: float, console: Console, work: float = 0.0, workers: int = 1) -> None:
        self.begin, self.console = begin, console
        self._todo, self._workers = work, max(1, workers)
        self._done = self._seconds = 0.0

    def __call__(self, what: str) -> None:
        self.console.print(
            Text(f"[{time.monotonic() - self.begin:5.0f} s{self._left()}] {what}"), soft_wrap=True, highlight=False
        )

    def finished(self, work: float, seconds: float) -> None:
        """A job has ended, after so many seconds."""
        self._done += work
        self._seconds += seconds

    def _left(self) -> str:
        """From the pace of the jobs that have ended; those under way are believed to keep it."""
        if not self._done:
            return ""
        whole = self._todo * self._seconds / self._done / self._workers
        minutes = (whole - (time.monotonic() - self.begin)) / 60
        return f", {minutes:.0f} min left" if minutes >= 0.75 else ", soon done"


class Workers:
    """Runs stages side by side; what the libraries print on the way goes to a log file.

    Args:
        count: of processes; 0 runs everything here.
        say: takes the lines that the stages log, their warnings among them.
        finished: takes the work of a job that has ended, and the seconds that it took.
        threads: of each process.
    """

    def __init__(
        self,
        count: int,
        log: Path,
        say: Callable[[str], None],
        finished: Callable[[float, float], None] = lambda work, seconds: None,
        threads: int = 1,
    ) -> None:
        self.log = log
        self.say, self.finished = say, finished
        self.pool: ProcessPoolExecutor | None = None
        if count:
            context = get_context("spawn")
            self._lines: Any = context.Queue()
            begin = (self._lines, threads)
            self.pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=begin)
            self._listener = threading.Thread(target=self._listen, daemon=True)
            self._listener.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self._lines.put(None)
            self._listener.join()

    def all(self, jobs: Sequence[Job]) -> list[Any]:
        """Results in the order of the jobs; the first error is raised, and what has not begun is dropped."""
        if self.pool is None:
            return [self._here(job) for job in jobs]
        futures: list[Future[Any]] = []
        for job in jobs:
            future = self.pool.submit(_logged, self.log, job)
            future.add_done_callback(lambda done, work=job.work: self._note(work, done))  # type: ignore[misc]
            futures.append(future)
        return [future.result()[0] for future in futures]

    def _here(self, job: Job) -> Any:
        with _relayed(lambda line: self.say(line[1])):
            result, seconds = _logged(self.log, job)
        self.finished(job.work, seconds)
        return result

    def _note(self, work: float, done: Future[Any]) -> None:
        if not done.cancelled() and done.exception() is None:
            self.finished(work, done.result()[1])

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


def _begin(lines: Any, threads: int) -> None:
    import torch

    import_module(STAGES + ".stages")
    global _tell
    _tell = lines.put
    # Whatever OMP_NUM_THREADS says: with another number sums are taken in another order, and are other sums.
    torch.set_num_threads(threads)


def _logged(log: Path, job: Job) -> tuple[Any, float]:
    """What a job returns, and the seconds that it took."""
    stage, begin = getattr(import_module(STAGES + ".stages"), job.stage), time.monotonic()
    with log.open("a") as file, _quiet(file), contextlib.nullcontext() if _tell is None else _relayed(_tell):
        try:
            return stage(*job.arguments), time.monotonic() - begin
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
        if own or (record.levelno >= logging.WARNING and record.name != UNTOLD):
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
