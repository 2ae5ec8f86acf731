"""The engine that lives on: callable from any thread, while one thread owns the flows and each device has one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from weakref import finalize

from collm.decoding.collaborative import Flow
from collm.decoding.experience import Experience
from collm.engine.passes import Batch, run_pass
from collm.engine.running import Finished, Sink
from collm.engine.scheduler import Scheduler, lengths_of
from collm.errors import CollmError
from collm.types import FinishReason, Usage
from collm.values import Fault, LanguageModel, Replies, Reply, StreamingModel
from collm.views import Text

_log = logging.getLogger(__name__)

CLOSED = "this system is closed; load it again"

PATIENCE_AT_CLOSE = 5.0
"""Seconds that `close` waits for passes that run."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is busy with: texts that run, texts that wait, and for each model the tokens of those that run."""

    running: int
    waiting: int
    tokens: tuple[int, ...]


class Engine:
    """Texts of all callers share the passes of the models, and their caches and experience, until it is closed.

    Args:
        models: the base first.
        max_num_seqs: texts that run at a time; further ones wait, first come, first served.
        timeout: seconds after which a pass is given up and its texts end with an error; None waits for ever.
        patience: see `Scheduler`.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        max_num_seqs: int = 16,
        timeout: float | None = None,
        patience: float = 1.0,
        experience: Experience | None = None,
    ) -> None:
        if max_num_seqs < 1:
            raise ValueError(f"max_num_seqs must be at least 1, not {max_num_seqs}")
        self.models = tuple(models)
        self._driver = _Driver(self.models, max_num_seqs, timeout, patience, experience)
        self._close = finalize(self, self._driver.stop)

    @property
    def experience(self) -> Experience:
        return self._driver.scheduler.experience

    @property
    def max_num_seqs(self) -> int:
        return self._driver.scheduler.max_num_seqs

    @property
    def load(self) -> Load:
        scheduler = self._driver.scheduler
        texts = [item.text for item in tuple(scheduler.running.values())]
        tokens = tuple(sum(len(text.views[number]) for text in texts) for number in range(len(self.models)))
        return Load(len(texts), len(scheduler.waiting), tokens)

    def count_passes(self, told: Callable[[int, int], None]) -> None:
        """Have `told` hear of each pass its model's number and how many tokens it read; in the engine's thread, so it
        must not wait, nor fail."""
        self._driver.scheduler.on_pass = told

    def grow(self, max_num_seqs: int) -> None:
        """Let at least so many texts run at a time from now on."""
        self._driver.call(partial(self._driver.grow, max_num_seqs))

    def require_room(self, text: Text, max_tokens: int) -> None:
        """Refuse a text that can never fit into the caches, as `submit` does.

        Raises:
            CollmError: naming the model.
        """
        self._driver.scheduler.require_room(lengths_of(text, max_tokens))

    def submit(self, flow: Flow, text: Text, max_tokens: int, sink: Sink) -> int:
        """Start a text, as soon as there is room; returns its number.

        `sink` is told each step and then, exactly once, how it ended; in the engine's thread, so it must not wait.

        Raises:
            CollmError: the text can never fit into the caches, or the engine is closed.
        """
        self.require_room(text, max_tokens)
        number = next(self._driver.numbers)
        self._driver.call(partial(self._driver.submit, number, flow, text, max_tokens, sink))
        return number

    def require_own_process(self) -> None:
        """Whoever waits for a text in a process that was forked off would wait for ever.

        Raises:
            CollmError: saying so.
        """
        self._driver.require_own_process()

    def cancel(self, number: int) -> None:
        """End a text (`"cancelled"`), wherever it is; nothing happens if it has ended."""
        self._driver.call(partial(self._driver.scheduler.cancel, number), needed=False)

    def close(self) -> None:
        """End all texts (`"cancelled"`) and stop the threads; passes that run are waited for, a few seconds, and their
        texts end then, too, whether or not a pass has come back."""
        self._close()


class _Driver:
    """The threads, which know nothing of the `Engine`, so that they end when nobody holds it any more."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        max_num_seqs: int,
        timeout: float | None,
        patience: float,
        experience: Experience | None,
    ) -> None:
        inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self.inbox = inbox
        # Nothing goes on beside the passes of a single device, so the thread that owns the flows runs them, too: waking
        # another one costs some ten microseconds a pass.
        self._alone = (
            len({model.device for model in models if not model.instant}) == 1
            and timeout is None
            and not any(isinstance(model, StreamingModel) for model in models)
        )
        self._flows = threading.Lock()
        """Held by whoever touches the texts: the driver, but for the time of a pass that it runs itself."""
        self.scheduler = Scheduler(
            models,
            max_num_seqs=max_num_seqs,
            timeout=timeout,
            patience=patience,
            experience=experience,
            post=self.inbox.put,
            heard=lambda: not inbox.empty(),
            during=self._flows if self._alone else None,
        )
        self.numbers = count()
        self._busy = False
        """It has just run a pass: there may be more to do already."""
        self._idle: dict[Hashable, SimpleQueue[Callable[[], None] | None]] = {}
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()
        self._process = os.getpid()
        self._stopped = False

    def call(self, what: Callable[[], None], *, needed: bool = True) -> None:
        """Do something in the thread that owns the flows, which starts with the first call."""
        if needed:
            self.require_own_process()
        elif self._process != os.getpid():
            return
        with self._starting:
            if self._stopped:
                if needed:
                    raise CollmError(CLOSED)
                return
            self.inbox.put(what)
            if not self._threads:
                self._start()

    def require_own_process(self) -> None:
        if self._process != os.getpid():
            raise CollmError("a fork keeps no threads: load the system again in this process")

    def submit(self, number: int, flow: Flow, text: Text, max_tokens: int, sink: Sink) -> None:
        try:
            self.scheduler.submit(number, flow, text, max_tokens, sink)
        except CollmError as error:
            sink(Finished("error", Usage(), str(error)))

    def grow(self, max_num_seqs: int) -> None:
        self.scheduler.max_num_seqs = max(self.scheduler.max_num_seqs, max_num_seqs)

    def stop(self) -> None:
        if self._process != os.getpid():
            return  # after a fork there are no threads, and a lock may never be released
        with self._starting:
            if self._stopped:
                return
            self._stopped = True
            self.inbox.put(_stop)
        until = time.monotonic() + PATIENCE_AT_CLOSE
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        if self._flows.acquire(blocking=False):  # the driver has ended, or its pass does not come back
            try:
                self._end_all("cancelled", None)
            finally:
                self._flows.release()
            self.inbox.put(_stop)

    def _start(self) -> None:
        for device in self.scheduler.devices:
            passes = self._idle[device] = SimpleQueue()
            if not self._alone:
                name = f"collm {device}"
                self._threads.append(threading.Thread(target=_run_passes, args=(passes,), name=name, daemon=True))
        self._threads.insert(0, threading.Thread(target=self._drive, name="collm engine", daemon=True))
        for thread in self._threads:
            thread.start()

    def _drive(self) -> None:
        with self._flows:
            self._drive_on()

    def _drive_on(self) -> None:
        reason = None
        try:
            while self._round():
                pass
        except BaseException as error:  # a fault of the engine itself: nobody may wait for ever
            _log.critical("the engine failed", exc_info=error)
            reason = f"the engine failed: {type(error).__name__}: {error}"
            with self._starting:
                self._stopped = True
        self._end_all("error" if reason else "cancelled", reason)
        for passes in self._idle.values():
            passes.put(None)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        """Nobody may wait for ever: also not for a text whose submission has not been read yet."""
        with suppress(Empty):
            while True:
                call = self.inbox.get_nowait()
                try:
                    call()
                except Exception:
                    _log.exception("a call failed while the engine ended")
        for number in [*self.scheduler.running, *(item.number for item in self.scheduler.waiting)]:
            try:
                self.scheduler.cancel(number, reason, error)
            except Exception:
                _log.exception("text %d could not be ended", number)

    def _round(self) -> bool:
        """Do what was asked for, and start passes. False once it is to stop."""
        scheduler, going = self.scheduler, self._hear()
        scheduler.expire()
        scheduler.admit()
        self._busy = False
        for device, passes in self._idle.items():
            batch = scheduler.next_pass(device) if going else None
            if batch is None:
                continue
            if self._alone:
                self._busy = True
                self._flows.release()
                try:
                    found = self._run(batch)
                finally:
                    self._flows.acquire()
                scheduler.finish(device, batch, *found)
            else:
                passes.put(partial(self._pass, device, batch))
        return going

    def _hear(self) -> bool:
        """Do what others ask for; wait for it where there is nothing else to do. False once it is to stop."""
        if self._busy and self.inbox.empty():
            return True
        going = True
        with suppress(Empty):
            call = self.inbox.get_nowait() if self._busy else self.inbox.get(timeout=self._patience())
            while True:
                going &= call is not _stop
                call()
                call = self.inbox.get_nowait()
        return going

    def _patience(self) -> float | None:
        deadline = self.scheduler.deadline()
        return None if deadline is None else max(0.0, deadline - time.perf_counter())

    def _pass(self, device: Hashable, batch: Batch) -> None:
        self.inbox.put(partial(self.scheduler.finish, device, batch, *self._run(batch)))

    def _run(self, batch: Batch) -> tuple[Replies, float]:
        """One pass, and how long it took."""
        began = time.perf_counter()
        try:
            replies = run_pass(self.scheduler.models, batch)
        except BaseException as error:  # this thread has to go on, and to say that the pass is over
            _log.critical("a pass failed", exc_info=error)
            fault: Reply = Fault(f"the pass failed: {type(error).__name__}: {error}")
            replies = [[fault] * max(1, query.num_last) for query in batch.queries]
        return replies, time.perf_counter() - began


def _stop() -> None:
    """The last call of a driver."""


def _run_passes(passes: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := passes.get()) is not None:
        call()
        del call
