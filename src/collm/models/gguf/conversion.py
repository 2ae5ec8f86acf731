"""GGUF files as Hugging Face folders: dequantised by transformers once, then read from a folder that is kept.

transformers parses such a file three times and dequantises it at every start. What comes out is kept in the user's
cache, by the hash of the file, with its tokenizer and configuration: the same values, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.errors import CollmError
from collm.files import refuse_full, whole_folder
from collm.models.gguf.cache import kept
from collm.models.gguf.completing import complete, require_places
from collm.models.gguf.fields import Fields
from collm.models.gguf.header import Header, read_header
from collm.models.gguf.splitting import ADDS_BOS, SPLITS, split_as, without_prefix
from collm.models.guard import require_every_tensor
from collm.models.network import load_network, loading
from collm.signs import sign

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TEXT = "text"
"""The part of a conversion that is no weights: configuration and tokenizer."""


def load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a GGUF file, dequantised: out of the cache, or where there is no room for one, out of the file.

    Raises:
        CollmError: the file is damaged, or of a kind that transformers cannot read.
    """
    header = read_header(path)
    name = _name(dtype)
    size = header.num_values * dtype.itemsize

    def write(folder: Path) -> None:
        sign(f"{path.name}: converting it once for later starts")
        _save(_dequantised(header, dtype), folder)

    folder = kept(header, "float32") if name != "float32" else None
    folder = folder or kept(header, name, write, size)
    if folder is None:
        return _dequantised(header, dtype)
    return load_network(str(folder), dtype=dtype)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that a GGUF file's metadata describe. One whose way of splitting is unknown comes with a warning.

    Raises:
        CollmError: the file is damaged, or its kind of tokenizer is unknown.
    """
    from transformers import AutoTokenizer

    header = read_header(path)
    _tell_unknown(header)
    folder = _text(header)
    if folder is None:
        return _tokenizer(header)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer


def load_config(path: Path) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        CollmError: the file is damaged, or its architecture is unknown.
    """
    from transformers import AutoConfig

    header = read_header(path)
    folder = _text(header)
    config: PreTrainedConfig = _config(header) if folder is None else AutoConfig.from_pretrained(folder)
    return config


def fill_cache(path: Path, dtype: torch.dtype) -> Path | None:
    """Convert a file for later starts; where its weights now lie, None if there is no room for them.

    Raises:
        CollmError: the file is damaged, or of a kind that transformers cannot read.
    """
    load_tokenizer(path)
    load_model(path, dtype)
    return kept(read_header(path), _name(dtype)) or kept(read_header(path), "float32")


def convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a GGUF file as a Hugging Face folder: weights (safetensors), configuration, tokenizer.

    Raises:
        CollmError: the file is damaged or of an unknown kind; the folder holds something or cannot be written.
    """
    refuse_full(folder)
    header = read_header(path)
    _tell_unknown(header)
    tokenizer = _tokenizer(header)
    model = load_model(path, dtype)
    with whole_folder(folder) as temporary:
        _save(model, temporary)
        tokenizer.save_pretrained(temporary)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Raises:
    OSError: the disk is full.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tell_unknown(header: Header) -> None:
    pre = header.pre_tokenizer
    if pre is None or pre in SPLITS:
        return
    says = f"splits text as {pre!r} does, which is unknown here" if pre else "does not say how it splits text"
    warnings.warn(
        f"{header.path}: its tokenizer {says}; GPT-2's way is taken, so that some texts may get other tokens than the "
        "model was trained on. Where the original model's folder is at hand, use its tokenizer",
        stacklevel=2,
    )


def _text(header: Header) -> Path | None:
    def write(folder: Path) -> None:
        _config(header).save_pretrained(folder)
        _tokenizer(header).save_pretrained(folder)

    return kept(header, TEXT, write, 0)


def _reading(header: Header, read: Callable[..., Any], **settings: Any) -> Any:
    """Let transformers read a file. What it cannot read, it says in many kinds of exceptions."""
    try:
        with loading, _without_bar():
            return read(str(header.path.parent), gguf_file=header.path.name, trust_remote_code=False, **settings)
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CollmError(f"{header.path}: transformers cannot read it: {reason[0]}") from error


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers shows a bar of tqdm's own here, which its settings do not reach."""
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    bar = getattr(module, "tqdm", None)
    if bar is None:
        yield
        return
    module.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        module.tqdm = bar


@contextmanager
def _quick_reader() -> Iterator[None]:
    """Where no weights are read, transformers gets metadata from `Fields` in the place of the package's own reader."""
    import gguf

    module: Any = gguf
    own = module.GGUFReader
    module.GGUFReader = Fields
    try:
        yield
    finally:
        module.GGUFReader = own


def _config(header: Header) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _quick_reader():
        config: PreTrainedConfig = _reading(header, AutoConfig.from_pretrained)
    complete(config, header)
    return config


def _tokenizer(header: Header) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    pre = header.pre_tokenizer
    settings: dict[str, Any] = {}
    if pre in ADDS_BOS and "tokenizer.ggml.add_bos_token" not in header.metadata:
        settings["add_bos_token"] = True
    with _quick_reader():
        tokenizer: PreTrainedTokenizerBase = _reading(header, AutoTokenizer.from_pretrained, **settings)
    if pre is not None:
        split_as(tokenizer.backend_tokenizer, pre)
    if header.metadata.get("tokenizer.ggml.add_space_prefix") is False:
        without_prefix(tokenizer.backend_tokenizer)
    return tokenizer


def _dequantised(header: Header, dtype: torch.dtype) -> PreTrainedModel:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    folder = _text(header)
    # transformers' own reading of it would lack what `complete` adds.
    settings["config"] = _config(header) if folder is None else AutoConfig.from_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):
        # Some architectures would otherwise stay packed, in layers of another kind.
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    found: tuple[PreTrainedModel, Any] = _reading(header, AutoModelForCausalLM.from_pretrained, **settings)
    model, report = found
    require_every_tensor(model, report, str(header.path))
    require_places(model, header)
    # Dequantised, yet transformers still counts it as quantised and would refuse to save it.
    model.hf_quantizer = None  # type: ignore[assignment]
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    return model
