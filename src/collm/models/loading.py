"""Models and tokenizers by name: Hugging Face folders, hub ids, GGUF files; safetensors or GGUF only.

A *spec* is a string:

- a folder or a hub id with a Hugging Face model in it;
- a folder with a PEFT adapter, which names the spec of its base model;
- `FILE.gguf`, dequantised on loading (its metadata bring the tokenizer);
- `pkg:PACKAGE/FILE.gguf`, a file inside an installed Python package (found, not imported);
- the name of a tool: `calculator`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError

TOOLS = ("calculator",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAMPLED_VALUES = 256
"""Values of each weight tensor that enter its fingerprint."""


def is_tool(spec: str) -> bool:
    return spec in TOOLS


def _locate(spec: str) -> tuple[str, dict[str, str]]:
    """The name and the keyword arguments under which transformers finds a spec."""
    if spec.startswith("pkg:"):
        package, _, inner = spec.removeprefix("pkg:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise CollmError(f"{spec}: there is no installed package {package!r}; install it with pip")
        spec = str(Path(next(iter(found.submodule_search_locations))) / inner)
    if spec.endswith(".gguf"):
        path = Path(spec)
        if not path.is_file():
            raise CollmError(f"{spec}: there is no such GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise CollmError(f"{spec}: reading GGUF files needs the package gguf; pip install 'collm[gguf]'")
        return str(path.parent), {"gguf_file": path.name}
    if is_tool(spec):
        raise CollmError(f"{spec!r} is a tool, not a model with weights; it can only be an assistant")
    if Path(spec).is_dir():
        return spec, {}
    # A hub id has two parts as well; where the first is a folder here, a mistyped path is likelier.
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or ("/" in spec and Path(spec).parent.is_dir()):
        raise CollmError(f"{spec}: there is no such folder; a model is a Hugging Face folder, a hub id or a .gguf file")
    return spec, {}


def refuse_pickle(name: str) -> None:
    """A folder whose only weights are pickled is refused with its own message: unpickling can run any code."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CollmError(
            f"{name} holds pickled weights ({', '.join(pickled[:3])}), which can run code when loaded and are refused; "
            "convert them to safetensors (load them where you trust them and call save_pretrained)"
        )


def adapter_config(spec: str) -> dict[str, Any] | None:
    """What a folder with a PEFT adapter says about it; None for any other spec.

    Raises:
        CollmError: it does not name its base model.
    """
    path = Path(spec) / "adapter_config.json"
    if is_tool(spec) or not path.is_file() or (Path(spec) / "config.json").is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text())
    if not config.get("base_model_name_or_path"):
        raise CollmError(f"{path} does not name its base model (base_model_name_or_path)")
    return config


def _load_adapter(spec: str, base: str, dtype: str, device: str) -> PreTrainedModel:
    """A base model with one adapter in its layers, not merged."""
    from peft import PeftModel

    model = load_model(base, dtype=dtype, device=device)
    PeftModel.from_pretrained(model, spec, autocast_adapter_dtype=False).eval()
    return model


def load_model(spec: str, *, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The causal language model of a spec, in evaluation mode.

    Raises:
        CollmError: no such model, pickled weights, unknown dtype.
    """
    if dtype not in DTYPES:
        raise CollmError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    _check_device(device)
    name, where = _locate(spec)
    refuse_pickle(name)
    adapter = adapter_config(spec)
    if adapter is not None:
        return _load_adapter(spec, adapter["base_model_name_or_path"], dtype, device)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], use_safetensors=None if where else True, trust_remote_code=False, **where
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(spec, error) from error
    if where:
        # Dequantised on loading, yet transformers still counts it as quantised and would refuse to save it.
        model.hf_quantizer = None  # type: ignore[assignment]
        config: Any = model.config
        if "quantization_config" in config.__dict__:
            del config.quantization_config
        config._name_or_path = spec
    return model.to(device).eval()  # type: ignore[arg-type,no-any-return]


def _check_device(device: str) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CollmError(f"there is no kind of device {device!r}; use cpu, cuda, cuda:1, mps, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise CollmError(f"device {device!r} was asked for, but torch sees no CUDA device; use cpu, or a CUDA build")


def _not_found(spec: str, error: Exception) -> CollmError:
    """Neither a folder nor on the hub: most often a mistyped name."""
    close = difflib.get_close_matches(spec, TOOLS, n=1)
    if close:
        return CollmError(f"there is no model {spec!r}; did you mean the tool {close[0]!r}?")
    if isinstance(error, OSError) and not Path(spec).exists():
        reason = str(error).splitlines()[0]
        return CollmError(f"{spec}: there is no such folder, and the hub did not give such a model ({reason})")
    return CollmError(f"could not load {spec!r}: {error}")


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a spec.

    Raises:
        CollmError: no such tokenizer.
    """
    adapter = adapter_config(spec)
    if adapter is not None and not (Path(spec) / "tokenizer_config.json").is_file():
        return load_tokenizer(adapter["base_model_name_or_path"])
    name, where = _locate(spec)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)
    except (OSError, ValueError, KeyError) as error:
        raise _not_found(spec, error) from error
    return tokenizer


def load_context_length(spec: str) -> int | None:
    """The longest sequence a model was made for, from its configuration alone."""
    adapter = adapter_config(spec)
    name, where = _locate(spec if adapter is None else adapter["base_model_name_or_path"])
    value = getattr(AutoConfig.from_pretrained(name, **where), "max_position_embeddings", None)
    return int(value) if value is not None else None


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """All end-of-sequence ids of a model: its generation config may name several, its tokenizer names one."""
    ids: set[int] = set()
    generation_config = model.generation_config
    for value in (generation_config.eos_token_id if generation_config else None, tokenizer.eos_token_id):
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(v) for v in value)
    return frozenset(ids)


def weights_fingerprint(model: nn.Module) -> str:
    """A hash over evenly spread values of every parameter: tells weights apart without reading all of them.

    Values are rounded to bfloat16, so that the same weights held in float32 or bfloat16 agree.
    """
    return named_fingerprint(model.named_parameters())


def named_fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // SAMPLED_VALUES)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(flat[::step][:SAMPLED_VALUES].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
