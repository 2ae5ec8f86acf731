"""Do two specs name the same model? Told from the files, before anything is loaded."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm.models.specs import adapter_config, is_tool, is_url, locate, split_spec
from collm.models.whole import read_object, weight_files

BLOCKS, BLOCK = 1024, 64
"""Bytes of each file of weights that are looked at: so many blocks of this length, evenly spread."""
HEADER = 1 << 16
"""Bytes at the beginning of a file: names and shapes of the tensors."""
VOLATILE = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
)
"""What a configuration says besides how to compute."""
OF_TRAINING = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "attention_dropout",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "problem_type",
    "id2label",
    "label2id",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
)
"""And besides, what decides no law: the trainer changes some of it, and ends of texts are told by themselves."""


def contents(spec: str) -> str | None:
    """A hash of a model's configuration and of samples of its weights as they lie on the disk; None where they do not.

    Other hashes mean other files; equal ones may be of models that differ in little (`same_files`). The same weights
    may be cut into files otherwise, or be kept in another precision.
    """
    found = _weights_of(spec)
    return None if found is None else _digest(*found[0], told=found[1])


def same_files(one: str, other: str) -> bool:
    """Do two specs with equal `contents` hold the same weights, byte for byte? Reads all of them, unless they are one
    file. (A model fine-tuned in a few rows, biases or norms is mostly its base.)"""
    pairs = [() if found is None else found[0] for found in (_weights_of(one), _weights_of(other))]
    return len(pairs[0]) == len(pairs[1]) > 0 and all(
        a.samefile(b) or filecmp.cmp(a, b, shallow=False) for a, b in zip(*pairs, strict=True)
    )


def _weights_of(spec: str) -> tuple[list[Path], Any] | None:
    """The files with a model's weights, an adapter's base included, and what its configuration says."""
    if is_tool(spec) or is_url(spec):
        return None
    spec, _ = split_spec(spec)
    adapter = adapter_config(spec)
    if adapter is not None:
        base, own = _weights_of(str(adapter["base_model_name_or_path"])), Path(spec) / "adapter_model.safetensors"
        return None if base is None or not own.is_file() else ([own, *base[0]], [base[1], adapter])
    place = _place(spec)
    if place is None:
        return None
    if place.is_file():
        return [place], None
    return weight_files(place), _told(read_object(place / "config.json"))


def model_files(spec: str) -> list[Path] | None:
    """The files that decide what a spec loads, an adapter's base included; None where they are not at hand."""
    if is_tool(spec):
        return []
    spec, _ = split_spec(spec)
    adapter = adapter_config(spec)
    if adapter is not None:
        own = [Path(spec) / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        base = model_files(str(adapter["base_model_name_or_path"]))
        return None if base is None or not all(path.is_file() for path in own) else own + base
    place = _place(spec)
    if place is None:
        return None
    if place.is_file():
        return [place]
    # What may change what is loaded, or how it is computed.
    return [*sorted(place.glob("*.json")), *weight_files(place)]


def _place(spec: str) -> Path | None:
    """The GGUF file of a model that is no adapter, or its folder, which has a configuration and weights; None where
    they are not at hand."""
    place = locate(spec)
    if isinstance(place, Path):
        return place
    folder = Path(place) if Path(place).is_dir() else _downloaded(place)
    if folder is None or not (folder / "config.json").is_file() or not weight_files(folder):
        return None
    return folder


def _downloaded(name: str) -> Path | None:
    """Where a hub id lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _told(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _told(value) for key, value in config.items() if key not in VOLATILE}
    return config


def computation(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration of transformers says of how to compute, as JSON values."""
    kept = {key: value for key, value in config.items() if key not in OF_TRAINING and not key.startswith("_")}
    found: dict[str, Any] = json.loads(json.dumps(_told(kept), default=str))
    return found


def same_configuration(one: Any, other: Any) -> bool:
    """Do two configurations of transformers mean the same computation?"""
    return bool(_told(one.to_dict()) == _told(other.to_dict()))


def _digest(*paths: Path, told: Any = None) -> str:
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(HEADER))
            for number in range(BLOCKS if size > HEADER else 0):
                file.seek(HEADER + (size - HEADER) * number // BLOCKS)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:32]
