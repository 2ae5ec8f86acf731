"""The server as a process: its socket, its log, its end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from collm.errors import CollmError
from collm.serving.connection import Connection

DRAIN = 60
"""Seconds that a server which is told to stop gives to what it is writing."""
HEADER_BYTES = 32 << 10
BACKLOG = 2048
"""Connections that wait to be taken."""


def bind(host: str, port: int) -> socket.socket:
    """The socket to listen on, taken before weights are loaded. Port 0 takes any that is free.

    Raises:
        CollmError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    taken = socket.socket(family)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host.strip("[]"), port))
    except OSError as error:
        taken.close()
        raise _taken(f"{host}:{port}", error) from error
    return taken


def listen(bound: socket.socket) -> None:
    """Let connections come: from here on nobody is turned away.

    Raises:
        CollmError: another process has begun to listen there meanwhile.
    """
    try:
        bound.listen(BACKLOG)
    except OSError as error:
        raise _taken(address(bound).removeprefix("http://"), error) from error


def _taken(where: str, error: OSError) -> CollmError:
    return CollmError(f"cannot listen on {where}: {error.strerror or error}; choose another --host or --port")


def address(listening: socket.socket) -> str:
    """Where clients find it."""
    host, port, *_ = listening.getsockname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(app: ASGIApp, **settings: Any) -> uvicorn.Server:
    """A server that drains when it is told to stop: it takes on nothing, and finishes what it writes."""
    own: dict[str, Any] = {
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "timeout_graceful_shutdown": DRAIN,
        "h11_max_incomplete_event_size": HEADER_BYTES,
        # Nobody but the client is believed about who it is.
        "proxy_headers": False,
        "http": Connection,
        "backlog": BACKLOG,
        "ws": "none",
    }
    return uvicorn.Server(uvicorn.Config(app, **{**own, **settings}))


def run(app: ASGIApp, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C, in the main thread."""
    # The server raises the signal that ended it once more when it is done; that it ended in order is no error.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    make_server(app).run(sockets=[listening])


def log_to_stderr() -> None:
    """Our lines of JSON, bare. A log that cannot be written (a full disk) costs no request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("collm.serving")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logging.raiseExceptions = False
