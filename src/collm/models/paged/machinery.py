"""What passes are made with on a device."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from collm.models.devices import is_offloaded, is_spread, places
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
    compiler: str | Callable[..., Any] = "inductor"
    """Backend of `torch.compile`, where modules are compiled."""


def machinery_for(lm: PreTrainedModel, name: str) -> Machinery | None:
    """That of the CUDA device of a network; None where it computes on none.

    Warns:
        UserWarning: something is lacking, or its parts lie on several devices; passes run eagerly then.
    """
    found = places(lm)
    if not has_cuda(found):
        return None
    lacking = _lacking(lm, found)
    if lacking is None:
        try:
            from collm.models.paged.triton_dense import TritonDense
            from collm.models.paged.triton_ops import TritonOps
            from collm.models.paged.triton_telling import TritonTelling

            return Machinery(TritonOps(), TritonTelling(), CudaCapture(found[0]), TritonDense())
        except Exception as error:  # an installation that does not fit its driver fails in many ways
            lacking = f"Triton does not start ({type(error).__name__}: {error})"
    tell_eager(name, lacking)
    return None


def has_cuda(found: Sequence[torch.device]) -> bool:
    return any(place.type == "cuda" for place in found)


def tell_eager(name: str, reason: str) -> None:
    warnings.warn(f"{name}: {reason}; passes run without graphs, which is right but slow", stacklevel=3)


def _lacking(lm: PreTrainedModel, found: Sequence[torch.device]) -> str | None:
    if is_offloaded(lm):
        return "some of its weights are fetched when they are needed, and graphs need them in place"
    if len(found) > 1 or is_spread(lm):
        return f"its parts lie on {', '.join(map(str, found))}, and graphs are of one device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        if torch.cuda.get_device_capability(found[0]) < OLDEST:
            return f"{torch.cuda.get_device_name(found[0])} is older than Ampere"
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is older than torch
        return f"{found[0]} does not start ({error})"
    return None
