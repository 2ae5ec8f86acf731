"""The kernels of `llama_kernels.py`, launched."""

from __future__ import annotations

import triton
from torch import Tensor

from collm.models.paged import llama_kernels as kernels
from collm.models.paged.dense import Heads, Turns
from collm.models.paged.launching import launch
from collm.models.paged.plan import Plan

NUMBERS = 1024
"""Numbers of a program of `embed` and of `gated`."""


class TritonDense:
    """`Dense` by Triton's kernels. All tensors are contiguous."""

    def embed(self, plan: Plan, table: Tensor) -> Tensor:
        width = table.shape[1]
        out = table.new_empty((plan.num_tokens, width))
        grid = plan.num_tokens, triton.cdiv(width, NUMBERS)
        launch(kernels.embed, grid, plan.numbers, table, out, plan.num_tokens, width, B=NUMBERS)
        return out

    def add_norm(self, x: Tensor, delta: Tensor | None, factor: float, weight: Tensor, eps: float) -> Tensor:
        out, width = x.new_empty(x.shape), x.shape[1]
        launch(kernels.add_norm, (len(x),),
            x, x if delta is None else delta, weight, out, float(factor), width, eps, ADD=delta is not None,
            B=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
        return out

    def gated(self, gate_up: Tensor) -> Tensor:
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((count, width))
        launch(kernels.gated, (count, triton.cdiv(width, NUMBERS)), gate_up, out, width, B=NUMBERS)
        return out

    def turn_and_store(
        self,
        qkv: Tensor,
        heads: Heads,
        turns: Turns,
        norms: tuple[Tensor, Tensor] | None,
        keys: Tensor,
        values: Tensor,
        plan: Plan,
    ) -> Tensor:
        count = len(qkv)
        query = qkv.new_empty((count, heads.queries, heads.dim))
        query_norm, key_norm = norms or (qkv, qkv)
        launch(kernels.turn_and_store, (count, heads.queries + 2 * heads.keys),
            qkv, query, keys, values, turns.cos, turns.sin, query_norm, key_norm, plan.numbers, count, heads.eps,
            HQ=heads.queries, KV=heads.keys, D=heads.dim, DP=triton.next_power_of_2(heads.dim), R=heads.rotated,
            BLOCK=keys.shape[2], NORM=norms is not None, num_warps=1,
        )  # fmt: skip
        return query
