"""How callers wait for what is written for them: whole texts or chunk by chunk, in a thread or an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from itertools import islice
from queue import SimpleQueue
from weakref import WeakKeyDictionary

from collm.engine import Engine, Event, Finished
from collm.llm.writing import Chunk, Writing
from collm.types import Generation


def finished(
    engine: Engine, writings: Sequence[tuple[int, Writing]], at_a_time: int
) -> Iterator[tuple[int, Generation]]:
    """Each text with its number as soon as it is whole; those that run are cancelled where nobody reads on."""
    done: SimpleQueue[tuple[int, Writing]] = SimpleQueue()
    waiting, running = iter(writings), set[int]()
    try:
        for _ in writings:
            for i, writing in islice(waiting, max(1, at_a_time) - len(running)):
                running.add(writing.start(engine, partial(_when_finished, done, (i, writing))))
            engine.require_own_process()
            i, writing = done.get()
            running.discard(writing.number)
            yield i, writing.generation()
    finally:
        for number in running:
            engine.cancel(number)


def chunks(engine: Engine, writing: Writing) -> Iterator[Chunk]:
    """A text as it comes; cancelled where nobody reads on."""
    events: SimpleQueue[Event] = SimpleQueue()
    writing.start(engine, events.put)
    try:
        while (chunk := writing.chunk(events.get())).generation is None:
            yield chunk
            engine.require_own_process()
        yield chunk
    finally:
        engine.cancel(writing.number)


async def achunks(engine: Engine, writing: Writing) -> AsyncIterator[Chunk]:
    """As `chunks`, in an event loop."""
    async with aclosing(merged(engine, [writing])) as found:
        async for _, chunk in found:
            yield chunk


async def merged(
    engine: Engine, writings: Sequence[Writing], deadline: float | None = None
) -> AsyncGenerator[tuple[int, Chunk]]:
    """The chunks of several texts as they come, each with the number of its text.

    Args:
        deadline: in the event loop's time.

    Raises:
        TimeoutError: at the deadline. As wherever nobody reads on, the texts are cancelled.
    """
    loop = asyncio.get_running_loop()
    reader, post = _Reader(loop), partial(_postboxes.setdefault(loop, _Postbox()).post, loop)
    timer = None if deadline is None else loop.call_at(deadline, reader.take, (-1, None))
    started: list[int] = []
    try:
        for i, writing in enumerate(writings):
            started.append(writing.start(engine, partial(_tell, post, reader, i)))
        left = len(writings)
        while left:
            i, event = await reader.get()
            if event is None:
                raise TimeoutError
            chunk = writings[i].chunk(event)
            left -= chunk.generation is not None
            yield i, chunk
    finally:
        if timer is not None:
            timer.cancel()
        for number in started:
            engine.cancel(number)


class _Reader:
    """What has come for whoever reads, in an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._there: deque[tuple[int, Event | None]] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def take(self, found: tuple[int, Event | None]) -> None:
        self._there.append(found)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> tuple[int, Event | None]:
        while not self._there:
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._there.popleft()


class _Postbox:
    """From the engine's thread to an event loop, which is woken once for all that a pass has brought: waking it costs
    both threads more than what it is told."""

    def __init__(self) -> None:
        self._posted: deque[tuple[_Reader, tuple[int, Event]]] = deque()
        self._due = False

    def post(self, loop: asyncio.AbstractEventLoop, reader: _Reader, found: tuple[int, Event]) -> None:
        self._posted.append((reader, found))
        if not self._due:
            self._due = True
            try:
                loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed, and nobody reads
                self._due = False
                self._posted.clear()

    def _deliver(self) -> None:
        self._due = False  # first: what is posted from now on may come too late for this round
        while self._posted:
            reader, found = self._posted.popleft()
            reader.take(found)


def _when_finished(done: SimpleQueue[tuple[int, Writing]], end: tuple[int, Writing], event: Event) -> None:
    if isinstance(event, Finished):
        done.put(end)


_postboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Postbox] = WeakKeyDictionary()


def _tell(post: Callable[[_Reader, tuple[int, Event]], None], reader: _Reader, i: int, event: Event) -> None:
    post(reader, (i, event))
