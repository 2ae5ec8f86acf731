"""The JSON object of a request: read within bounds of size and time."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from collm.data.messages import require_texts
from collm.errors import CollmError
from collm.serving.limits import Limits
from collm.serving.metrics import Metrics
from collm.serving.refusals import Refusal


async def read_body(request: Request, limits: Limits, metrics: Metrics) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        Refusal: it is none, too large, or does not come.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal("send JSON, with Content-Type: application/json", code="invalid_content_type")
    data = await _arrived(request, limits, metrics)
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refusal("the request is not a JSON object", code="invalid_json")
    try:
        require_texts(found, "the request")
    except CollmError as error:
        raise Refusal(str(error), code="invalid_value") from error
    return found


async def _arrived(request: Request, limits: Limits, metrics: Metrics) -> bytes:
    most = limits.max_body_bytes
    too_large = Refusal(f"the request has more than {most} bytes", status=413, code="request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise Refusal("the request did not arrive in time", status=408, code="timeout") from None
    except ClientDisconnect as error:
        metrics.disconnected.inc()
        raise Refusal("the request ended early", code="incomplete") from error
    return bytes(data)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")
