"""A line to whoever waits: shown by the command line, and in notebooks and at Python's prompt."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("collm")


def interactive() -> bool:
    """Does somebody type what is run, in a notebook or at a prompt? Scripts keep their stderr to themselves."""
    return "ipykernel" in sys.modules or hasattr(sys, "ps1")


def sign(line: str) -> None:
    """Tell that something has begun that takes seconds."""
    if logger.isEnabledFor(logging.INFO):  # the command line, or whoever asked for it
        logger.info("%s", line)
    elif interactive():
        print(line, file=sys.stderr, flush=True)
