"""The plain twin of the engine: the same scheduler, driven by whoever reads its events, one pass after the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from queue import SimpleQueue

from collm.decoding.collaborative import Flow
from collm.decoding.experience import Experience
from collm.engine.passes import run_pass
from collm.engine.running import Event
from collm.engine.scheduler import Scheduler
from collm.values import LanguageModel
from collm.views import Text

Writing = tuple[Flow, Text, int]
"""A flow, its text and its `max_tokens`."""


class Twin:
    """Texts are submitted and cancelled between the rounds; a round is at most one pass of each device."""

    def __init__(
        self,
        models: Sequence[LanguageModel],
        max_num_seqs: int = 16,
        *,
        experience: Experience | None = None,
        patience: float = 1.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._clock = clock
        self.scheduler = Scheduler(
            models,
            max_num_seqs=max_num_seqs,
            experience=experience,
            patience=patience,
            clock=clock,
            post=self._inbox.put,
            heard=lambda: not self._inbox.empty(),
            during=nullcontext(),
        )
        self.events: deque[tuple[int, Event]] = deque()
        self._count = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def submit(self, flow: Flow, text: Text, max_tokens: int) -> int:
        number = self._count
        self.scheduler.submit(number, flow, text, max_tokens, partial(self._tell, number))
        self._count += 1
        return number

    def _tell(self, number: int, event: Event) -> None:
        self.events.append((number, event))

    def cancel(self, number: int) -> None:
        self.scheduler.cancel(number)

    def step(self) -> list[tuple[int, Event]]:
        """One round; what happened in it."""
        scheduler = self.scheduler
        scheduler.admit()
        passes = [(device, scheduler.next_pass(device)) for device in scheduler.devices]
        for device, batch in passes:
            if batch is not None:
                began = self._clock()
                replies = run_pass(scheduler.models, batch)
                scheduler.finish(device, batch, replies, self._clock() - began)
        if self.num_unfinished and not any(batch for _, batch in passes) and not self.events:
            self._inbox.get()()  # only a streaming model can be what everybody waits for
        while not self._inbox.empty():
            self._inbox.get()()
        happened = list(self.events)
        self.events.clear()
        return happened


def run(
    writings: Iterable[Writing],
    models: Sequence[LanguageModel],
    max_num_seqs: int = 16,
    *,
    experience: Experience | None = None,
    patience: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[tuple[int, Event]]:
    """Drive texts to their ends; they are drawn from `writings` as there is room. Yields their numbers and events."""
    twin = Twin(models, max_num_seqs, experience=experience, patience=patience, clock=clock)
    waiting = iter(writings)
    while True:
        for flow, text, max_tokens in islice(waiting, max_num_seqs - twin.num_unfinished):
            twin.submit(flow, text, max_tokens)
        if not twin.num_unfinished:
            return
        yield from twin.step()
