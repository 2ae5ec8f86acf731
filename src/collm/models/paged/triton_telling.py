"""The kernels of `telling_kernels.py`, launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from collm.models.head import DeferralHead
from collm.models.paged import telling_kernels as kernels
from collm.models.paged.launching import launch
from collm.models.paged.plan import Plan
from collm.models.paged.telling import columns

SHARES = 16
"""Programs that look through the logits of a token."""
LOOKED = 4096
"""Logits that a program looks at at a time, at most."""


class TritonTelling:
    """`Telling` by Triton's kernels; `looked`: see `LOOKED`."""

    def __init__(self, looked: int = LOOKED) -> None:
        self._looked = looked

    def tell(self, logits: Tensor, hidden: Tensor, head: DeferralHead | None, plan: Plan, vocab_size: int) -> Tensor:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        count, known, width = len(logits), min(vocab_size, logits.shape[1]), columns(head)
        share = triton.cdiv(known, SHARES)
        block = min(self._looked, triton.next_power_of_2(share))
        share = triton.cdiv(share, block) * block
        shares = triton.cdiv(known, share)
        parts = logits.new_empty((count, 5, shares), dtype=torch.float32)
        out = torch.empty((count, width), dtype=torch.int32, device=logits.device)
        launch(kernels.look, (count, shares),
            logits, parts, logits.stride(0), known, SHARE=share, BV=block, S=shares, num_warps=4,
        )  # fmt: skip
        number = 0 if head is None else head.num_assistants
        weight, bias = (hidden, hidden) if head is None else (head.weight, head.bias)
        launch(kernels.tell, (count,),
            parts, hidden, weight, bias, out, hidden.stride(0), hidden.shape[1],
            S=shares, SP=triton.next_power_of_2(shares), BH=triton.next_power_of_2(hidden.shape[1]), K=number,
            KP=triton.next_power_of_2(number + 1), C=width, num_warps=4,
        )  # fmt: skip
        launch(kernels.choose, (count,),
            logits, out, plan.numbers, plan.num_tokens, logits.stride(0), known, C=width,
            BV=min(self._looked, triton.next_power_of_2(known)), num_warps=8,
        )  # fmt: skip
        return out
