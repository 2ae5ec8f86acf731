"""Mixtures of experts in a graph, which cannot wait for the host to learn which experts are asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

GROUPED, BATCHED = "grouped_mm", "batched_mm"
"""Names of transformers' experts whose work can be recorded; `batched_mm` copies the weights that each token uses. Its
eager experts ask which are used (`nonzero`), as do fallbacks of `grouped_mm`."""
NAMES_OF_NUMBER = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
NAMES_OF_USED = ("num_experts_per_tok", "moe_topk", "moe_k")


def num_experts(lm: PreTrainedModel) -> int:
    """Of a layer; 0 where there are none."""
    return _number(lm, NAMES_OF_NUMBER)


def share_used(lm: PreTrainedModel, tokens: int) -> float:
    """The share of a layer's experts that a pass over some tokens is expected to use.

    Of `E` experts each token uses `k` different ones. Where all are equally probable and tokens are independent, a
    given one is left out by all `T` tokens with probability `(1 - k / E)^T`, so that `1 - (1 - k / E)^T` are used.
    """
    number = num_experts(lm)
    if not number:
        return 0.0
    return 1 - (1 - min(_number(lm, NAMES_OF_USED), number) / number) ** tokens


def expert_weights(lm: PreTrainedModel) -> Iterator[Tensor]:
    """Those of all routed experts: shared ones are used by every token."""
    for name, parameter in lm.named_parameters():
        if "experts" in name.split("."):
            yield parameter


def _number(lm: PreTrainedModel, names: tuple[str, ...]) -> int:
    config: Any = lm.config.get_text_config()
    return next((int(found) for name in names if (found := getattr(config, name, None))), 0)


@contextmanager
def computed_by(config: Any, way: str | None) -> Iterator[None]:
    """A network's experts are computed this way (None: as they are)."""
    if way is None:
        yield
        return
    before = config._experts_implementation
    config._experts_implementation = way
    try:
        yield
    finally:
        config._experts_implementation = before


def ways(lm: PreTrainedModel, device: torch.device) -> tuple[str, ...]:
    """Ways to compute a network's experts that can be recorded on a device, the best first."""
    if not num_experts(lm) or not lm._can_set_experts_implementation():
        return ()
    return (GROUPED, BATCHED) if _has_grouped(lm.dtype, device) else (BATCHED,)


def _has_grouped(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has a kernel for it. On CUDA that is for bfloat16 on Hopper and on Blackwell of servers: for all
    else it loops over the experts, whose offsets it asks the device for (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    if not hasattr(torch.nn.functional, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return False
    return device.type != "cuda" or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10))
