"""The kernels of `kernels.py`, launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from collm.models.paged import kernels
from collm.models.paged.launching import launch
from collm.models.paged.plan import Plan
from collm.models.paged.pool import TILE

PROGRAMS = 264
"""Programs of the attention kernel at least, over all heads: two for each multiprocessor of a Hopper GPU."""

READS = (64, 3), (64, 2), (32, 2), (16, 1)
"""How many positions the attention kernel reads at a time, and how many such reads it has under way: the first for
which a GPU has the shared memory. Heads of 256 numbers, or float32, need more of it than many GPUs have."""

WIDE = 128
"""A chunk of at most so many positions is read at once, where tiles are small and a head's numbers are `WIDE_BYTES` at
most: what is read at once lies in registers."""
WIDE_BYTES = 256

COMBINED = 64
"""Rows of chunks that are put together at a time."""

PIECES = 256, 1024
"""Pieces among which a program looks for its own: two numbers for all passes, for each is compiled by itself."""


class TritonOps:
    """`Ops` by Triton's kernels; `programs`, `reads`, `wide`: see `PROGRAMS`, `READS`, `WIDE`."""

    def __init__(self, programs: int = PROGRAMS, reads: Sequence[tuple[int, int]] = READS, wide: int = WIDE) -> None:
        self._programs, self._reads, self._wide = programs, reads, wide
        self._fitting: dict[tuple[torch.device, torch.dtype, int, int], list[tuple[int, int]]] = {}
        """The reads that may fit, by device, type, numbers of a head and rows of a tile: the first one is taken."""

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
        small = tile == TILE and self._wide <= size and padded * query.element_size() <= WIDE_BYTES
        reads = self._fitting.setdefault((query.device, query.dtype, padded, tile), list(self._reads))
        while True:
            at_a_time, stages = reads[0]
            try:
                launch(kernels.attend, (programs, kv),
                    query, keys, values, out, part, stats, plan.numbers, table, count, programs, table.shape[1],
                    scale, window, softcap or 0.0, *query.stride()[:2], **shape, BLOCK=size,
                    N=min(at_a_time, size), WIDE=self._wide if small else 0, NP=pieces,
                    WINDOW=window > 0, CAP=softcap is not None,
                    PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=4, num_stages=stages,
                )  # fmt: skip
                break
            except OutOfResources:
                if len(reads) == 1:
                    raise
                del reads[0]
        group = triton.next_power_of_2(heads // kv)
        launch(kernels.combine, (count, kv),
            part, stats, out, plan.numbers, count, **shape, GP=group, CHUNKS=max(1, COMBINED // group), num_warps=4,
        )  # fmt: skip
        return out


def _dense_heads(tensor: Tensor) -> Tensor:
    """The kernels step through a head's numbers one by one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
