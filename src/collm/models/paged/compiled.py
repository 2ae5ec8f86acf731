"""transformers' modules compiled by torch: quicker in a graph, after some seconds for each number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collm.models.paged.pool import Modules, Pass

LARGEST = 128
"""Tokens of a pass that is compiled: up to about so many the weights are what a pass waits for, and beyond them there
is less to gain for the same seconds."""
MOST = 64
"""Numbers of tokens and networks that torch may compile one piece of code for; its own 8 are fewer than our graphs."""


class CompiledModules(Modules):
    """What graphs record of a network without a pass of its own. Passes without graphs have any number of tokens, for
    each of which torch would compile anew: these are left to `Modules`.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, lm: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
        super().__init__(lm)
        # Not this object's own method: it would hold itself, and the network with it, when nobody else does.
        plain = Modules(lm)
        self._compiled: Callable[[Pass], Tensor] = torch.compile(plain.__call__, dynamic=False, backend=backend)

    def __call__(self, issued: Pass) -> Tensor:
        if issued.plan.num_tokens > LARGEST:
            return super().__call__(issued)
        from torch._dynamo import config

        with config.patch(recompile_limit=MOST, accumulated_recompile_limit=16 * MOST):
            return self._compiled(issued)
