"""The kernels of `kernels.py`, launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from collm.models.paged import kernels
from collm.models.paged.launching import launch
from collm.models.paged.plan import Plan

PROGRAMS = 264
"""Programs of the attention kernel at least, over all heads: two for each multiprocessor of a Hopper GPU."""


KEYS = 64
"""Positions that the attention kernel reads at a time."""

COMBINED = 4
"""Chunks of a piece that are put together at a time."""

PIECES = 256, 1024
"""Pieces among which a program looks for its own: two numbers for all passes, for each is compiled by itself."""


class TritonOps:
    """`Ops` by Triton's kernels; `programs`, `keys`: see `PROGRAMS`, `KEYS`."""

    def __init__(self, programs: int = PROGRAMS, keys: int = KEYS) -> None:
        self._programs, self._keys = programs, keys

    def enter(self, plan: Plan, table: Tensor, size: int) -> None:
        launch(kernels.enter, (plan.num_tokens,), plan.numbers, table, plan.num_tokens, table.shape[1], BLOCK=size)

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> None:
        count, heads, dim = key.shape
        key, value = _dense_heads(key), _dense_heads(value)
        launch(kernels.store, (count, heads),
            key, value, keys, values, plan.numbers, plan.num_tokens, *key.stride()[:2], *value.stride()[:2],
            KV=heads, D=dim, DP=triton.next_power_of_2(dim), BLOCK=keys.shape[2], num_warps=1,
        )  # fmt: skip

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: Plan,
        table: Tensor,
        scale: float,
        window: int,
        softcap: float | None,
    ) -> Tensor:
        query = _dense_heads(query)
        count, heads, dim = query.shape
        kv, size = keys.shape[1], keys.shape[2]
        padded, tile = max(16, triton.next_power_of_2(dim)), plan.tile  # products have 16 rows and columns at least
        out = query.new_empty((count, heads, dim))
        part = query.new_empty((plan.items, kv, tile, padded), dtype=torch.float32)
        stats = query.new_empty((plan.items, kv, tile, 2), dtype=torch.float32)
        programs = max(count, -(-self._programs // kv))
        shape = {"HQ": heads, "G": heads // kv, "D": dim, "DP": padded, "M": tile}
        pieces = PIECES[0] if count <= PIECES[0] else max(PIECES[1], triton.next_power_of_2(count))
        launch(kernels.attend, (programs, kv),
            query, keys, values, out, part, stats, plan.numbers, table, count, programs, table.shape[1],
            scale, window, softcap or 0.0, *query.stride()[:2], **shape, BLOCK=size,
            N=min(self._keys, size), NP=pieces,
            WINDOW=window > 0, CAP=softcap is not None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=3,
        )  # fmt: skip
        launch(kernels.combine, (count, kv),
            part, stats, out, plan.numbers, count, **shape, AT_A_TIME=COMBINED, num_warps=4,
        )  # fmt: skip
        return out


def _dense_heads(tensor: Tensor) -> Tensor:
    """The kernels step through a head's numbers one by one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
