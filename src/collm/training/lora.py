"""LoRA adapters for the base that is trained: in which layers they go."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel

from collm.errors import CollmError, nearest
from collm.training.recipe import LoraSection

ALL = "all-linear"


def check_targets(section: LoraSection, model: PreTrainedModel) -> None:
    """Are there layers of these names? (PEFT passes over those of a list that it does not find.)

    Raises:
        CollmError: naming one that there is not.
    """
    wanted = section.target_modules
    if wanted == ALL:
        return
    layers = [name for name, _ in model.named_modules()]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    short = sorted({name.rpartition(".")[2] for name in linear})
    if isinstance(wanted, str):
        try:
            found = any(re.fullmatch(wanted, name) for name in layers)
        except re.error as error:
            raise CollmError(f"lora.target_modules: {wanted!r} is no regular expression: {error}") from error
        if not found:
            raise CollmError(f"lora.target_modules: no layer of the base matches {wanted!r}; one is called {linear[0]}")
        return
    for name in wanted:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            hint = nearest(name, short, f"there are {', '.join(short)}, or {ALL}")
            raise CollmError(f"lora.target_modules: the base has no layer {name!r}; {hint}")


def with_lora(section: LoraSection, model: PreTrainedModel) -> nn.Module:
    """The model with fresh adapters, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        exclude_modules=_routers(model) if section.target_modules == ALL else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _routers(model: nn.Module) -> list[str] | None:
    """The last names of linear layers that an architecture has made something else of (Llama 4's router returns two
    tensors), which PEFT would wrap as plain ones."""
    own = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models.")
    }
    return sorted(own) or None
