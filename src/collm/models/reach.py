"""Is what a spec names there? And is the Hugging Face hub: its client asks five times, half a minute long, before it
says no."""

from __future__ import annotations

import logging
import socket
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from collm.errors import CollmError
from collm.models.specs import ADAPTER, CONFIG, locate, no_such_model, require_config
from collm.models.whole import has_tokenizer_files, one_line, require_whole_folder

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


def require_model(spec: str) -> None:
    """Whatever can be told of a model without reading it: is it there, whole as far as its head says, no pickle?

    Raises:
        CollmError: no.
    """
    place = locate(spec)
    if isinstance(place, Path):
        from collm.models.gguf.header import read_header

        read_header(place)
        return
    folder = Path(place)
    if not folder.is_dir():
        require_on_hub(place)
        return
    require_whole_folder(folder)
    require_config(folder)
    if not (folder / ADAPTER).is_file() and not has_tokenizer_files(folder):
        raise CollmError(
            f"{spec} holds a model without its tokenizer: save that there, tokenizer.save_pretrained({str(folder)!r})"
        )


def require_on_hub(name: str) -> None:
    """Ask the hub, or its cache on this machine, for the smallest file of a model: before torch is imported.

    What else may go wrong on the way is left to those who fetch the whole.

    Raises:
        CollmError: there is no such model.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    keep_to_this_machine()
    for file in (CONFIG, ADAPTER, "collm.json"):
        try:
            hf_hub_download(name, file)
        except LocalEntryNotFoundError:
            if constants.is_offline_mode():
                continue
            return  # it did not answer
        except EntryNotFoundError:
            continue
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise no_such_model(name, f"the hub did not give such a model ({one_line(error)})") from error
        except (HfHubHTTPError, OSError):
            return
        return
    if constants.is_offline_mode():
        raise no_such_model(name, "the hub's cache on this machine has no such model (the hub is not asked)")
    raise no_such_model(name, f"what the hub has under this name is no model: it has no {CONFIG}")
