"""What the files here tell of a base behind a server; nothing is asked yet, and nothing needs torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from collm.errors import CollmError
from collm.models.info import CheckpointInfo, load_info
from collm.models.served import ServedInfo
from collm.models.specs import is_url
from collm.remote.address import Address


@dataclass(frozen=True, slots=True)
class ServedBase:
    """`folder`: the spec whose tokenizer it has, the export itself where there is a `gate`."""

    url: str
    folder: str
    info: CheckpointInfo
    gate: ServedInfo | None


def find_base(path: str, base: str | None) -> ServedBase:
    """A base on a server, as its files here describe it: an export with the server as `base`, or a URL as `path` that
    names a tokenizer. Nothing is asked yet.

    Raises:
        CollmError: no tokenizer, a checkpoint that is no export, a server that cannot decide for a gate.
    """
    url = path if is_url(path) else str(base)
    address = Address.parse(url)
    address.key()
    if is_url(path) and base is not None:
        raise CollmError(f"the base is the server {address.urls[0]} already: leave out --base")
    if is_url(path) and address.tokenizer is None:
        raise CollmError(
            f"{address.urls[0]}: name the folder whose tokenizer the model has (tokenizer=FOLDER): the export that it "
            "serves, for then its gate is known, too, or a plain model"
        )
    folder = str(address.tokenizer) if is_url(path) else path
    info = load_info(folder)
    if info is None:
        return ServedBase(url, folder, CheckpointInfo(), None)
    if info.kind != "export":
        raise CollmError(
            f"{folder} is no export: a server needs one, for the gate (collm export {folder} DIR; collm vllm-serve DIR)"
        )
    if address.kind != "vllm":
        raise CollmError(
            f"{address.urls[0]}: a base with a gate needs a vLLM that runs collm's plugin (vllm+http://..., started by "
            f"collm vllm-serve), not {address.kind}"
        )
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise CollmError(f"{folder} has no config.json, where an export tells how to read its gate")
    return ServedBase(
        url, folder, info, ServedInfo.from_config(json.loads(config.read_text()).get("collm"), str(config))
    )
