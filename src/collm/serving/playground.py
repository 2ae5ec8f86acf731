"""The page at `/`: files that ask nobody but the server they come from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from collm.report import pages

FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/answer.js": ("answer.js", "text/javascript"),
    "/copy.js": ("copy.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""What lies at each address, and of which type it is."""
SHARED = {"/tokens.js": ("tokens.js", "text/javascript"), "/tokens.css": ("tokens.css", "text/css")}
"""What the pages of reports have, too: tokens and the panel of one of them."""
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""No script, style or address but the server's own: what a model writes cannot become any of them."""


def routes() -> list[Route]:
    return [Route(path, page, methods=["GET"]) for path in (*FILES, *SHARED)]


async def page(request: Request) -> Response:
    _, kind = (FILES | SHARED)[request.url.path]
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(_content(request.url.path), media_type=kind, headers=headers)


@cache
def _content(path: str) -> bytes:
    if path in SHARED:
        return pages.source(SHARED[path][0]).encode()
    return (files("collm.serving") / "page" / FILES[path][0]).read_bytes()
