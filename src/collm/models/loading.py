"""Models and tokenizers by their specs: Hugging Face folders, hub ids, GGUF files; safetensors or GGUF only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.models import devices
from collm.models.attaching import attach
from collm.models.gguf import conversion as gguf
from collm.models.guard import guarded
from collm.models.network import load_network, not_found
from collm.models.placement import Placement
from collm.models.quiet import quiet
from collm.models.specs import adapter_config, locate, split_spec
from collm.models.tokenizers import require_words
from collm.models.whole import end_ids, require_tokenizer_files

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLED_VALUES = 256
"""Values of each weight tensor that enter its fingerprint."""


def load_model(spec: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The causal language model of a spec, in evaluation mode.

    Args:
        dtype, device: unless the spec itself says otherwise (`SPEC?device_map=auto&quantization=nf4`).

    Raises:
        CollmError: no such model, unknown dtype, pickled or damaged weights, or weights that do not fit the model.
    """
    name, placement = Placement(dtype, device).of(spec)
    return place_model(name, placement)


def place_model(name: str, placement: Placement) -> PreTrainedModel:
    """`load_model` for a spec without settings, or with ones that count before those of the placement."""
    name, placement = placement.of(name)
    if placement.device == "auto":
        placement = replace(placement, device=devices.best_device())
    adapter = adapter_config(name)
    if adapter is not None:
        return _with_adapter(place_model(str(adapter["base_model_name_or_path"]), placement), name)
    place = locate(name)
    if isinstance(place, Path):
        if placement.device_map is not None or placement.quantization is not None:
            raise CollmError(
                f"{name}: a GGUF file goes to one device, and brings its own quantisation; "
                "collm convert makes a folder of it, for device_map and quantization"
            )
        with quiet():
            model = gguf.load_model(place, placement.torch_dtype)
        model.config._name_or_path = name
    else:
        model = load_network(place, **placement.arguments())
    if placement.device_map is None and placement.quantization is None:
        model = model.to(placement.device)  # type: ignore[arg-type]
    model.eval()
    if placement.quantization is not None:
        with torch.inference_mode():
            # bitsandbytes repacks its weights at their first use on a CPU: done now, they are the same ever after.
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=devices.input_device(model)), use_cache=False)
    return model


def _with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A base model with one adapter in its layers, not merged."""
    attach(model, folder)
    return model


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a spec.

    Raises:
        CollmError: no such tokenizer.
    """
    adapter = adapter_config(spec)
    if adapter is not None and not (Path(split_spec(spec)[0]) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter["base_model_name_or_path"])
    place = locate(spec)
    if isinstance(place, Path):
        with quiet():
            return gguf.load_tokenizer(place)
    require_tokenizer_files(Path(place))
    with quiet(), guarded(f"the tokenizer of {spec!r}", place):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            tokenizer.decode(tokenizer("a 1")["input_ids"])  # a setting of the wrong kind shows at the first use
        except OSError as error:
            raise not_found(spec, error) from error
    require_words(tokenizer, spec)
    return tokenizer


def load_context_length(spec: str) -> int | None:
    """The longest sequence a model was made for, from its configuration alone."""
    adapter = adapter_config(spec)
    place = locate(spec if adapter is None else adapter["base_model_name_or_path"])
    with quiet(), guarded(f"the configuration of {spec!r}", place):
        try:
            config: Any = gguf.load_config(place) if isinstance(place, Path) else AutoConfig.from_pretrained(place)
        except OSError as error:
            raise not_found(spec, error) from error
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value is not None else None


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All end-of-sequence ids of a model: its generation config may name several, its tokenizer names one.

    Raises:
        CollmError: they are no ids.
    """
    told = model.generation_config.eos_token_id if model.generation_config else None
    return end_ids(told, model.name_or_path or "the generation config") | end_ids(tokenizer.eos_token_id, "tokenizer")


def weights_fingerprint(model: nn.Module) -> str:
    """A hash over evenly spread values of every parameter: tells weights apart without reading all of them.

    Two hashes, of the values rounded to bfloat16 and to float16: the same weights held in another precision agree in
    one of them (`info.same_weights`).
    """
    return named_fingerprint(devices.parameters(model))


def named_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    digests = {torch.bfloat16: hashlib.sha256(), torch.float16: hashlib.sha256()}
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        sampled = flat[::step][:SAMPLED_VALUES].cpu()
        for dtype, digest in digests.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sampled.to(dtype).view(torch.int16).numpy().tobytes())
    return "-".join(digest.hexdigest()[:16] for digest in digests.values())
