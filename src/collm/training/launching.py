"""How many processes train, and whether they were started in a way that can work."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from collm.errors import CollmError


def require_launcher(state: PartialState) -> None:
    """Refuse what would fail later, or train something else than the recipe says.

    Raises:
        CollmError: several GPUs and one process; or processes that would begin with empty weights.
    """
    gpus = torch.cuda.device_count()
    # Without a launcher transformers' Trainer takes all GPUs from one process (DataParallel), slowly and not with us.
    if state.num_processes == 1 and gpus > 1 and "LOCAL_RANK" not in os.environ:
        raise CollmError(
            f"this machine has {gpus} GPUs, and training wants a process for each: start it with `accelerate launch "
            f"--multi_gpu --num_processes {gpus} -m collm train RECIPE` (each GPU holds the whole base; with "
            "--config_file and a file of recipes/accelerate they share it), or on one GPU with "
            "`CUDA_VISIBLE_DEVICES=0 collm train RECIPE`"
        )
    if _on("ACCELERATE_USE_FSDP") and _on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise CollmError(
            "with fsdp_cpu_ram_efficient_loading: true only the first process reads the weights, and the others would "
            "begin with empty ones: set it to false in accelerate's configuration"
        )


def _on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
