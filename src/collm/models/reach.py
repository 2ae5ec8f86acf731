"""Is the Hugging Face hub there? Its client asks five times, half a minute long, before it says no."""

from __future__ import annotations

import logging
import socket
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies

logger = logging.getLogger(__name__)

PATIENCE = 4.0
"""Seconds."""


@lru_cache
def keep_to_this_machine() -> None:
    """Where the hub is out of reach, take what its cache here holds, and say so; asked once, and not behind a proxy."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or getproxies() or address.hostname is None:
        return
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=PATIENCE).close()
    except OSError:
        logger.warning(
            "%s cannot be reached: models are taken from its cache on this machine, if they are there "
            "(HF_HUB_OFFLINE=1 in the environment says so from the start)",
            constants.ENDPOINT,
        )
        constants.HF_HUB_OFFLINE = True
