"""How callers wait for what is written for them: whole texts or chunk by chunk, in a thread or an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import islice
from queue import SimpleQueue

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
    events = asyncio.Queue[Event]()
    writing.start(engine, partial(_tell_loop, asyncio.get_running_loop(), events))
    try:
        while (chunk := writing.chunk(await events.get())).generation is None:
            yield chunk
        yield chunk
    finally:
        engine.cancel(writing.number)


def _when_finished(done: SimpleQueue[tuple[int, Writing]], end: tuple[int, Writing], event: Event) -> None:
    if isinstance(event, Finished):
        done.put(end)


def _tell_loop(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)
