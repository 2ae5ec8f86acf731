"""Products of a layer that share their input, as one; LoRA adapters included, whichever is active."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CannotFuse(Exception):
    """The modules are of a kind that is left to themselves."""


class Product:
    """`x W^T + b` for modules that stand above one another in W, and what the active adapter adds to each.

    The modules' own weights become parts of W: there is never a second copy.

    Args:
        names: of the linear modules, attributes of `owner`, which adapters may wrap at any time.

    Raises:
        CannotFuse: one of them is no plain linear layer, with or without LoRA.
    """

    def __init__(self, owner: nn.Module, *names: str) -> None:
        self._owner, self._names = owner, names
        linears = [_base(getattr(owner, name)) for name in names]
        sizes = [linear.weight.shape[0] for linear in linears]
        self._ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        self.weight = _stacked([linear.weight for linear in linears])
        biases = [linear.bias for linear in linears]
        with_bias = [bias for bias in biases if bias is not None]
        if len(with_bias) not in (0, len(biases)):
            raise CannotFuse("some have a bias")
        self.bias = _stacked(with_bias) if with_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        found = F.linear(x, self.weight, self.bias)
        start = 0
        for name, end in zip(self._names, self._ends, strict=True):
            module: Any = getattr(self._owner, name)
            for adapter in getattr(module, "active_adapters", ()):
                if adapter in module.lora_A:
                    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                    more = F.linear(F.linear(x.to(a.dtype), a), b) * module.scaling[adapter]
                    found[:, start:end] += more.to(found.dtype)
            start = end
        return found


def _base(module: Any) -> nn.Linear:
    """The plain linear layer of a module."""
    if hasattr(module, "lora_A"):
        plain = not any(getattr(module, "use_dora", {}).values()) and not any(getattr(module, "lora_bias", {}).values())
        if not plain or getattr(module, "merged", False):
            raise CannotFuse(f"{type(module).__name__} is more than LoRA")
        module = module.base_layer
    linear = isinstance(module, nn.Linear) and type(module.weight) is nn.Parameter
    if not linear or getattr(module, "_hf_hook", None) is not None:
        raise CannotFuse(f"{type(module).__name__} is no plain linear layer")
    found: nn.Linear = module
    return found


@torch.no_grad()
def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts above one another; they become parts of it. If they are that already, nothing moves."""
    first = parts[0]
    at, together = first.data_ptr(), True
    for part in parts:
        own = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        together &= own and part.data_ptr() == at and part.is_contiguous()
        at += part.nbytes
    rows = sum(part.shape[0] for part in parts)
    shape = (rows, *first.shape[1:])
    if together:
        return first.data.as_strided(shape, first.stride(), first.storage_offset())
    whole = torch.cat([part.data for part in parts])
    start = 0
    for part in parts:
        end = start + part.shape[0]
        part.data = whole[start:end]
        start = end
    assert math.prod(shape) == whole.numel()
    return whole
