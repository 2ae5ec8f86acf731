"""How much memory there is for caches."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

from collm.models.devices import layer_devices

_log = logging.getLogger(__name__)

SPARE_SHARE = 0.1
"""Of the memory that is free when a model is loaded: for what ended texts leave in its cache."""


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now. What torch has kept of what nobody holds any more is given back first, for
    to the driver it is not free: weights before they were fused, which may be most of a model, and what a training
    before has needed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not every system tells
        return 4 << 30


def bytes_per_token(lm: PreTrainedModel) -> int:
    """What one position of one text takes in the KV pool."""
    config: Any = lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * lm.dtype.itemsize)


def tokens_in(lm: PreTrainedModel, share: float) -> int:
    """Positions (slots times their length) whose keys and values take this share of the free memory, on the device
    where it is scarcest."""
    layers = Counter(layer_devices(lm))
    each = bytes_per_token(lm) / layers.total()
    return max(1, int(min(share * free_bytes(device) / (count * each) for device, count in layers.items())))


def tell_room(device: torch.device, name: str, tokens: int, num_bytes: int) -> None:
    """How much a model's caches may hold, where nobody has said it in tokens."""
    _log.info("%s: %s keeps up to %d tokens of keys and values (%.1f GB)", device, name, tokens, num_bytes / 1e9)


def spare_tokens(lm: PreTrainedModel) -> int:
    return tokens_in(lm, SPARE_SHARE)
