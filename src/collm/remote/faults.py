"""What goes wrong with a server, as a value: what it was, whether to ask again, and how long to wait for it."""

from __future__ import annotations

import json
import logging
import random
import ssl
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

import httpx

from collm.errors import CollmError
from collm.remote.address import Address

_log = logging.getLogger(__name__)

ATTEMPTS = 5
"""How often one thing is asked without any progress."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between attempts: doubled each time, and shortened at random, lest all clients come back at once."""
PATIENCE = 120.0
"""Seconds after which nothing is asked again, whatever a server asks for."""
CONNECT_TIMEOUT = 5.0


class ServerFault(CollmError):
    """A server that could not be reached, refused, or answered what it should not.

    `repeatable`: the same request may work later, or on another replica. `busy`: the server lives and asks for patience
    (429, 503 with Retry-After), which is no reason to call it broken. `retry_after`: seconds it asked for.
    """

    def __init__(
        self, message: str, *, repeatable: bool = False, busy: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.repeatable = repeatable
        self.busy = busy
        self.retry_after = retry_after

    def of(self, url: str) -> ServerFault:
        """The same, with the server's name before it."""
        told = f"{url}: {self}"
        return ServerFault(told, repeatable=self.repeatable, busy=self.busy, retry_after=self.retry_after)


class Patience:
    """Counts the attempts at one thing, and waits between them."""

    def __init__(self, clock: Callable[[], float], sleep: Callable[[float], Awaitable[None]]) -> None:
        self._clock, self._sleep = clock, sleep
        self.progress()

    def progress(self) -> None:
        self._attempts, self._end = 0, self._clock() + PATIENCE

    async def after(self, fault: ServerFault) -> None:
        """Wait until it may be asked again.

        Raises:
            ServerFault: the same, if it is of no use.
        """
        self._attempts += 1
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (self._attempts - 1)) * random.uniform(0.5, 1.0)
        pause = max(pause, fault.retry_after or 0.0)
        if not fault.repeatable:
            raise fault
        if self._attempts >= ATTEMPTS or self._clock() + pause > self._end:
            asked = f", which asks to wait {fault.retry_after:g} s" if fault.retry_after else ""
            raise ServerFault(f"{fault} (asked {self._attempts} times{asked})") from fault
        _log.info("%s; asking again in %.1f s", fault, pause)
        await self._sleep(pause)


def fault_of(error: Exception, address: Address) -> ServerFault:
    """What an error of the network, or of reading, means."""
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return ServerFault("the server answered something that is no JSON", repeatable=True)
    if isinstance(error, httpx.ConnectTimeout):
        return ServerFault(f"no connection within {CONNECT_TIMEOUT:g} s", repeatable=True)
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return ServerFault(f"no token within {address.timeout:g} s", repeatable=True)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return ServerFault(
                f"its certificate is not trusted ({cause.verify_message}): renew it, or name the file of the authority "
                "that signed it (ca=FILE)"
            )
        cause = cause.__cause__ or cause.__context__
    what = "no connection" if isinstance(error, httpx.ConnectError) else "the connection broke"
    return ServerFault(f"{what} ({type(error).__name__}{f': {error}' if str(error) else ''})", repeatable=True)


def refusal(response: httpx.Response, body: bytes, address: Address) -> ServerFault:
    """What a status other than 200 means."""
    status = response.status_code
    try:
        error = json.loads(body)
        error = error.get("error", error)
        message = str(error.get("message", error))
    except (ValueError, AttributeError):
        message = body.decode(errors="replace")
    message = " ".join(message.split())[:300]
    if status in (401, 403):
        named = f"is the key in {address.key_env} right?"
        how = named if address.key_env else "name where its key is (key_env=VARIABLE)"
        return ServerFault(f"the server wants a key (status {status}): {how}")
    after = _retry_after(response.headers.get("Retry-After"))
    busy = status == 429 or (status == 503 and after is not None)
    repeatable = busy or status in (408, 500, 502, 503, 504)
    return ServerFault(f"status {status}: {message}", repeatable=repeatable, busy=busy, retry_after=after)


def _retry_after(value: str | None) -> float | None:
    """Seconds, or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
