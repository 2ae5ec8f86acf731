"""What passes are made with on a device."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from collm.models.devices import input_device, is_spread
from collm.models.paged.blocks import BLOCK
from collm.models.paged.capture import Capture, CudaCapture
from collm.models.paged.dense import Dense
from collm.models.paged.ops import Ops
from collm.models.paged.telling import Telling

OLDEST = (8, 0)
"""Compute capability (Ampere) from which on the kernels are used."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """Kernels, or their twins, and what captures. Without `dense` every network runs by transformers' modules."""

    ops: Ops
    telling: Telling
    capture: Capture
    dense: Dense | None = None
    block: int = BLOCK


def machinery_for(lm: PreTrainedModel, name: str) -> Machinery | None:
    """That of the CUDA device of a network; None where there is none, or its parts lie on several.

    Warns:
        UserWarning: the device is there, and something is lacking; passes run eagerly then.
    """
    device = input_device(lm)
    if device.type != "cuda" or is_spread(lm):
        return None
    lacking = None
    if importlib.util.find_spec("triton") is None:
        lacking = "the package triton is not installed"
    elif torch.cuda.get_device_capability(device) < OLDEST:
        lacking = f"{torch.cuda.get_device_name(device)} is older than Ampere"
    if lacking is None:
        try:
            from collm.models.paged.triton_dense import TritonDense
            from collm.models.paged.triton_ops import TritonOps
            from collm.models.paged.triton_telling import TritonTelling

            return Machinery(TritonOps(), TritonTelling(), CudaCapture(device), TritonDense())
        except Exception as error:  # an installation that does not fit its driver fails in many ways
            lacking = f"Triton does not start ({type(error).__name__}: {error})"
    warnings.warn(f"{name}: {lacking}; passes run without graphs, which is right but slow", stacklevel=2)
    return None
