"""What every request passes on its way in and out: identity, the checks at the door, one line in the log."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collm.serving.limits import Access
from collm.serving.metrics import Metrics
from collm.serving.refusals import ClientGone, Refusal

_log = logging.getLogger("collm.serving")
REQUEST_ID = re.compile(r"[\w.:/=+-]{1,128}", re.ASCII)


def refused(refusal: Refusal) -> Response:
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


class Guard:
    """An ASGI middleware. Nothing of what a request or an answer says is logged, only what it was about."""

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app, self.access, self.metrics = app, access, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        told: dict[str, Any] = scope.setdefault("state", {}).setdefault("told", {})
        began, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = MutableHeaders(scope=message)
                own["X-Request-Id"] = request_id
                own["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, receive, sending)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, sending)
        except ClientGone:
            told["gone"] = True
        except Exception as error:
            _log.error("request %s failed", request_id, exc_info=error)
            if not status:
                await refused(internal())(scope, receive, sending)
        finally:
            if status >= 400:
                self.metrics.refuse(status)
            seconds = round(time.perf_counter() - began, 4)
            path = scope["path"]
            log(id=request_id, method=scope["method"], path=path[:200], status=status, seconds=seconds, **told)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse who may not ask.

        Raises:
            Refusal: the request is for another host, comes from another site's page, or has no valid key.
        """
        host = headers.get("host", "")
        if self.access.hosts and _name_of(host) not in self.access.hosts:
            raise Refusal(
                "this server does not answer for the Host of this request; ask it by its address, or start it with "
                "--allow-host",
                status=403,
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self.access.origins and urlsplit(origin).netloc != host:
            raise Refusal(
                "pages of this Origin may not ask; the server can be started with --allow-origin",
                status=403,
                code="origin_not_allowed",
            )
        if self.access.api_keys and scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # All are compared, so that the time tells nothing.
            right = [hmac.compare_digest(key.strip().encode(), each.encode()) for each in self.access.api_keys]
            if scheme.lower() != "bearer" or not any(right):
                raise Refusal(
                    "a valid API key is needed: send it as Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )


def internal() -> Refusal:
    return Refusal("the server failed at this request; its log says how", status=500, code="internal_error")


def log(**told: Any) -> None:
    """One line of JSON."""
    _log.info("%s", json.dumps({"event": "request", **told}))


def _name_of(host: str) -> str:
    """A Host without its port."""
    return re.sub(r":\d*$", "", host.lower())
