"""Weights that no process holds whole (FSDP2, DeepSpeed ZeRO): the gate kept in float32 among them, and all of them
gathered to be saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from collm.errors import CollmError


def shard_gate(trainer: Trainer) -> None:
    """Under FSDP2, make the gate a unit of its own that is kept and computed in float32.

    As part of the base's unit it would be computed in the dtype of mixed precision. Before the optimizer is made.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    module: Any = trainer.model
    if plugin is None or plugin.fsdp_version != 2 or module.head is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard

    processes = trainer.accelerator.num_processes
    if isinstance(module.head, FSDPModule) or module.head.weight.shape[1] % processes:
        return  # a width that is no multiple cannot be cut, and the few assistants' rows neither
    # By columns: accelerate finds parameters again by the addresses of their parts, which must not be empty.
    fully_shard(module.head, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))


def gathered_weights(trainer: Trainer) -> dict[str, Any] | None:
    """The state of the whole module where it is spread over processes; None where each holds all of it. Collective.

    The first process gets the tensors; the others may get none.

    Raises:
        CollmError: DeepSpeed is told not to gather.
    """
    if trainer.is_fsdp_enabled:
        state: dict[str, Any] = trainer.accelerator.get_state_dict(trainer.model)
        return state
    if not trainer.is_deepspeed_enabled or not hasattr(trainer, "deepspeed") or trainer.deepspeed is None:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    engine: Any = trainer.deepspeed
    module: Any = trainer.accelerator.unwrap_model(trainer.model)
    try:
        if engine.zero_optimization_stage() == 3 and trainer.info.kind == "lora":
            state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        else:
            state = trainer.accelerator.get_state_dict(engine)
    except ValueError as error:
        raise CollmError(
            "DeepSpeed does not gather the weights, so nothing could be saved: set "
            "zero_optimization.stage3_gather_16bit_weights_on_model_save to true in its configuration"
        ) from error
    # The gate's own values: those of the forward pass are in DeepSpeed's dtype.
    gate = {} if module.head is None else _full_precision(module.head, safe_get_full_fp32_param)
    return {**(state or {}), **{f"head.{name}": value for name, value in gate.items()}}


def _full_precision(head: nn.Module, full: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in head.named_parameters():
        value = full(parameter)
        found[name] = (parameter if value is None else value).detach().float().cpu()
    return found
