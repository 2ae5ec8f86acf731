"""What a server takes on, and from whom."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_queue`: texts that may wait beside those that run; more are refused (429).

    `max_body_bytes`: of one request. `max_choices`: texts of one request (prompts times `n`). Times in seconds:
    `request_timeout` for a whole request, `body_timeout` for its body to arrive, `stall_timeout` for a client to take
    a piece of its answer.
    """

    max_queue: int = 64
    max_body_bytes: int = 8 << 20
    max_choices: int = 128
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    stall_timeout: float = 60.0


@dataclass(frozen=True, slots=True)
class Access:
    """Who may ask.

    `api_keys`: one of them is needed under /v1, if there are any. `hosts`: what a request's Host may be; none: any.
    A server on this machine's own address can be reached by every web page that its user opens (DNS rebinding), so
    there it is that address alone. `origins`: other sites whose pages may ask (CORS); none by default.
    """

    api_keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()
