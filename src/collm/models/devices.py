"""Where the parts of a model lie, which may be several devices, and memory that is none (accelerate's offloading)."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

META = torch.device("meta")
"""Where weights are said to lie that are fetched when they are needed."""
STREAMS = 32
"""Streams of a device that torch has: it hands them out in turn, and then the first one again."""
_own: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()
_lock = Lock()


def best_device() -> str:
    """What `auto` stands for."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def own_stream(owner: object, device: torch.device) -> torch.cuda.Stream:
    """A stream that no other owner has who lives, while there are such. What runs at the same time on streams that are
    one by chance waits for one another; and torch gives the products of a stream one place for what they put down
    meanwhile, which is in the graphs that are recorded there, too."""
    with _lock:
        taken = list(_own.values())
        found = torch.cuda.Stream(device)
        for _ in range(STREAMS - 1):
            if found not in taken:
                break
            found = torch.cuda.Stream(device)
        _own[owner] = found
    return found


def computes_on(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, or are brought to."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            place = hook.execution_device
            found = torch.device(f"cuda:{place}") if isinstance(place, int) else torch.device(place)
            # `cuda` is one of them, as tensors have it.
            bare = found.type == "cuda" and found.index is None
            return torch.device("cuda", torch.cuda.current_device()) if bare else found
    return next((tensor.device for tensor in module.parameters() if tensor.device != META), torch.device("cpu"))


def input_device(lm: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return computes_on(lm.get_input_embeddings())


def output_device(lm: PreTrainedModel) -> torch.device:
    """Where logits come out, and so where the gate lies."""
    head: Any = lm.get_output_embeddings()
    return computes_on(head)


def places(lm: PreTrainedModel) -> list[torch.device]:
    """All devices on which its parts compute, in their order, each once."""
    return list(dict.fromkeys([input_device(lm), *layer_devices(lm), output_device(lm)]))


def is_spread(lm: nn.Module) -> bool:
    """Does it lie on several devices, or partly on none?"""
    return len({tensor.device for tensor in lm.parameters()}) > 1 or is_offloaded(lm)


def layer_devices(lm: PreTrainedModel) -> list[torch.device]:
    """Where each layer computes, and so where its keys and values lie."""
    backbone: Any = lm.base_model
    layers = getattr(backbone, "layers", None)
    count: int = lm.config.get_text_config().num_hidden_layers
    return [input_device(lm)] * count if layers is None else [computes_on(layer) for layer in layers]


def is_offloaded(lm: nn.Module) -> bool:
    """Are there weights that lie in a file, or in the host's memory, until they are needed?"""
    return any(tensor.device == META for tensor in lm.parameters())


def is_quantized(lm: nn.Module) -> bool:
    return any(not tensor.is_floating_point() for tensor in lm.parameters())


def parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name, each once, those that are offloaded fetched one by one."""
    for name, tensor in model.named_parameters():
        yield name, stored(model, name, tensor)


def stored(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """The values of a model's parameter or buffer: itself, or what it is an offloaded one's stand-in for."""
    if tensor.device != META:
        return tensor
    owner, _, own = name.rpartition(".")
    found = [hook.weights_map[own] for hook in _hooks(model.get_submodule(owner)) if hook.weights_map is not None]
    assert found, f"{name} lies nowhere"
    values: Tensor = found[0]
    return values


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module."""
    hook: Any = getattr(module, "_hf_hook", None)
    if hook is None:
        return []
    return [each for each in getattr(hook, "hooks", [hook]) if hasattr(each, "weights_map")]
