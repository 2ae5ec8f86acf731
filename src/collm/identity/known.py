"""Which weights a spec holds, without reading them again: noted in the user's cache at the first loading, for as long
as the files stay what they were.

A 70B model takes minutes to load and gigabytes to hold. Whoever only asks what scores were made with, or whether a run
may go on, needs neither.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from collm.errors import CollmError
from collm.files import cache_folder, write_text
from collm.identity.comparing import Identity
from collm.identity.finding import digest, local_identity
from collm.models.contents import model_files
from collm.models.loading import place_model, weights_fingerprint
from collm.models.placement import Placement

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Rises when `local_identity` or `weights_fingerprint` say something else of the same model."""


class Opened:
    """A model by its spec, loaded where its weights are wanted, and then once; what tells it apart may be known.

    Args:
        dtype, device: unless the spec says otherwise, as for `load_model`.
        model: it is loaded already.
    """

    def __init__(
        self, spec: str, *, dtype: str = "float32", device: str = "cpu", model: PreTrainedModel | None = None
    ) -> None:
        self.spec, self.placement = Placement(dtype, device).of(spec)
        self._model = model
        self._told: Mapping[str, Any] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode.

        Raises:
            CollmError: it cannot be loaded.
        """
        if self._model is None:
            path = self._note
            self._model = place_model(self.spec, self.placement)
            self._told = _told_of(self._model)
            # Files that were replaced meanwhile are noted by nobody.
            if path is not None and path == _note_path(self.spec, self.placement):
                _keep(path, self._told)
        return self._model

    @property
    def identity(self) -> Identity:
        """`local_identity`."""
        identity: Identity = self._known["identity"]
        return identity

    @property
    def fingerprint(self) -> str:
        """`weights_fingerprint`."""
        return str(self._known["fingerprint"])

    @property
    def _known(self) -> Mapping[str, Any]:
        if self._told is None and self._model is None and self._note is not None:
            self._told = _read(self._note)
        if self._told is None:
            self._told = _told_of(self.model)
        return self._told

    @cached_property
    def _note(self) -> Path | None:
        return _note_path(self.spec, self.placement)


def _told_of(model: PreTrainedModel) -> dict[str, Any]:
    return {"identity": dict(local_identity(model)), "fingerprint": weights_fingerprint(model)}


def _note_path(spec: str, placement: Placement) -> Path | None:
    """Named by all that decides what loading gives: the files, how they are placed, who reads them."""
    files = model_files(spec)
    if not files:
        return None
    looks = [[str(path.absolute()), *_looks(path)] for path in files]
    how = [placement.dtype, placement.quantization, placement.device if placement.quantization else None]
    readers = [version(package) for package in ("torch", "transformers", "safetensors")]
    return cache_folder() / "weights" / f"{digest(FORMAT_VERSION, looks, how, readers)}.json"


def _looks(path: Path) -> tuple[int, ...]:
    """Size and times are not enough: `cp -p` keeps both, but makes another file, changed now."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and isinstance(found.get("identity"), dict) and "fingerprint" in found
    return found if whole else None


def _keep(path: Path, told: Mapping[str, Any]) -> None:
    try:
        write_text(path, json.dumps(told))
    except CollmError as error:  # a cache is no reason to stop
        logger.debug("not noted: %s", error)
