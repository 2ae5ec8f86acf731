"""The page at `/`: three files that ask nobody but the server they come from."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
"""What lies at each address, and of which type it is."""
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
    return [Route(path, page, methods=["GET"]) for path in FILES]


async def page(request: Request) -> Response:
    name, kind = FILES[request.url.path]
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(_content(name), media_type=kind, headers=headers)


@cache
def _content(name: str) -> bytes:
    return (files("collm.serving") / "page" / name).read_bytes()
