"""Texts of requests on their way through the engine: taken on or refused, merged, timed out, let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from collm.decoding.collaborative import Flow
from collm.engine import Event, Finished
from collm.engine.engine import CLOSED
from collm.errors import CollmError
from collm.llm import Chunk, CollaborativeLM, GenerationFailed, TokenPrompt
from collm.sampling_params import SamplingParams
from collm.serving.limits import Limits
from collm.serving.metrics import Metrics, Timing
from collm.serving.refusals import Refusal
from collm.types import Generation
from collm.views import Text

RETRY_AFTER = 1
"""Seconds after which somebody who was refused for want of room may ask again."""


@dataclass(frozen=True, slots=True)
class Order:
    """One text that a request asks for; `index`: of its choice. `alone`: the model, the same for all of a request."""

    index: int
    prompt: TokenPrompt
    params: SamplingParams
    alone: int | None


class Desk:
    """What all requests share. All of it runs in the server's event loop."""

    def __init__(self, llm: CollaborativeLM, limits: Limits, metrics: Metrics) -> None:
        self.llm, self.limits, self.metrics = llm, limits, metrics
        self.texts = 0
        """Texts that run or wait on behalf of clients."""

    @property
    def capacity(self) -> int:
        return self.llm.engine.max_num_seqs + self.limits.max_queue

    def require_room(self, count: int) -> None:
        """Refuse what there is no place for.

        Raises:
            Refusal: now (429), or ever (400).
        """
        most = min(self.limits.max_choices, self.capacity)
        if count > most:
            raise Refusal(f"the request asks for {count} texts; at most {most} can be asked for at once")
        if self.texts + count > self.capacity:
            raise Refusal(
                f"{self.texts} texts are being written or wait already: try again in a moment",
                status=429,
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER)},
            )

    async def write(self, orders: Sequence[Order]) -> AsyncIterator[tuple[int, Chunk]]:
        """The chunks of all texts, as they come, with the index of their choice. Closed early, it cancels them.

        Raises:
            Refusal: there is no room, a text cannot be written, a model failed, or it takes too long.
        """
        self.require_room(len(orders))
        self.texts += len(orders)
        timings = [Timing() for _ in orders]
        alone = orders[0].alone if orders else None
        deadline = asyncio.get_running_loop().time() + self.limits.request_timeout
        try:
            found = self.llm.astream_each(
                [order.prompt for order in orders], [order.params for order in orders], alone=alone, deadline=deadline
            )
            async with aclosing(found) as chunks:
                async for number, chunk in chunks:
                    order, timing = orders[number], timings[number]
                    if chunk.generation is None:
                        timing.token()
                    else:
                        self.metrics.finished(chunk.generation, timing, order.prompt.token_ids)
                        _require_whole(chunk.generation)
                    yield order.index, chunk
        except TimeoutError:
            raise self._too_late() from None
        except CollmError as error:
            raise _as_refusal(error) from error
        finally:
            self.texts -= len(orders)

    async def run(self, flow: Flow, text: Text) -> None:
        """A flow that reads and writes nothing, to its end.

        Raises:
            Refusal: there is no room, a model failed, or it takes too long.
        """
        self.require_room(1)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Finished] = loop.create_future()

        def told(event: Event) -> None:
            if isinstance(event, Finished):
                loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(event))

        engine = self.llm.engine
        self.texts += 1
        try:
            number = engine.submit(flow, text, 1, told)
        except CollmError as error:
            self.texts -= 1
            raise _as_refusal(error) from error
        try:
            async with asyncio.timeout(self.limits.request_timeout):
                finished = await done
        except TimeoutError:
            raise self._too_late() from None
        finally:
            self.texts -= 1
            engine.cancel(number)
        _require_whole(finished)

    def _too_late(self) -> Refusal:
        seconds = self.limits.request_timeout
        return Refusal(f"the answer was not complete within {seconds:g} seconds", status=504, code="timeout")


def _require_whole(ended: Generation | Finished) -> None:
    """Refuse a text that ended before its time."""
    if ended.finish_reason == "error":
        raise Refusal(ended.error or "a model failed", status=500, code="model_failed")
    if ended.finish_reason == "cancelled":
        raise Refusal("the server stops", status=503, code="shutting_down")


def _as_refusal(error: CollmError) -> Refusal:
    cancelled = isinstance(error, GenerationFailed) and error.generation.finish_reason == "cancelled"
    if cancelled or str(error) == CLOSED:
        return Refusal("the server stops", status=503, code="shutting_down")
    return Refusal(str(error))
