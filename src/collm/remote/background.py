"""The event loop that all remote models of a process share, in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Background:
    """Starts with the first coroutine; ends with the process."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._process = -1
        self._starting = threading.Lock()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """From any thread; the future cancels it."""
        with self._starting:
            if self._process != os.getpid():  # a fork keeps no threads
                self._loop, self._process = asyncio.new_event_loop(), os.getpid()
                threading.Thread(target=self._loop.run_forever, name="collm servers", daemon=True).start()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """From any thread but the loop's own."""
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


background = Background()


class Job:
    """A request on its way. `ending`: its last token is there, so there is nothing left to cancel."""

    def __init__(self, coroutine: Coroutine[Any, Any, None] | None) -> None:
        self.ending = False
        self._future: Future[None] | None = None
        if coroutine is not None:
            self.begin(coroutine)

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._future = background.start(coroutine)

    def cancel(self) -> None:
        if self._future is not None and not self.ending:
            self._future.cancel()
