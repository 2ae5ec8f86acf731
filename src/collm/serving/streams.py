"""Answers on their way to a client, who may go away."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from collm.serving.fields import Json
from collm.serving.guard import internal
from collm.serving.metrics import Metrics
from collm.serving.refusals import ClientGone, Refusal

_log = logging.getLogger("collm.serving")
T = TypeVar("T")
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


async def until_gone(request: Request, work: Awaitable[T], metrics: Metrics) -> T:
    """What `work` comes to, unless the client goes away first: then it is cancelled.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        metrics.disconnected.inc()
        raise ClientGone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events. A client that goes away, or does not read, ends it.

    Args:
        first: the event that has come already.
        stall_timeout: seconds that a client may take for a piece.
        done: called at its end, whichever it was.
    """

    def __init__(
        self,
        first: Json,
        events: AsyncGenerator[Json],
        stall_timeout: float,
        metrics: Metrics,
        done: Callable[[], None],
    ) -> None:
        self._sending: float | None = None
        """Since when the client has been given a piece that it has not taken."""
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._first, self._events, self._stall_timeout = first, events, stall_timeout
        self._metrics, self._done = metrics, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(self._send_all(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            while not (task.done() or watch.done() or self._is_stalled()):
                patience = self._stall_timeout / 4
                await asyncio.wait({task, watch}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() or isinstance(task.exception(), OSError):
                self._metrics.disconnected.inc()
            elif (error := task.exception()) is not None:
                raise error
        finally:
            watch.cancel()
            task.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
            await self._events.aclose()
            self._done()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._send(send, self._first)
            async for event in self._events:
                await self._send(send, event)
        except Refusal as refusal:
            await self._send(send, refusal.body())
        except OSError:
            raise
        except Exception as error:
            _log.error("a stream failed", exc_info=error)
            await self._send(send, internal().body())
        await self._send(send, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: Json | None) -> None:
        data = "[DONE]" if event is None else _ENCODE(event)
        self._sending = time.monotonic()
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
        self._sending = None

    def _is_stalled(self) -> bool:
        # Looked at now and then: a timer for every token would cost as much as the token's own event.
        return self._sending is not None and time.monotonic() - self._sending >= self._stall_timeout
