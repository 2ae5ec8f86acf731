"""The small steps between a layer's products: an interface, and its plain twin in torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.models.paged.plan import IDS, POSITIONS, WHERE, Plan


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of a layer's attention; `rotated` of the `dim` numbers of a head are turned (0: none)."""

    queries: int
    keys: int
    dim: int
    rotated: int
    eps: float


@dataclass(frozen=True, slots=True)
class Turns:
    """Cosines and sines `[position, rotated / 2]`, float32."""

    cos: Tensor
    sin: Tensor


class Dense(Protocol):
    def embed(self, plan: Plan, table: Tensor) -> Tensor:
        """The rows of `table` `[V, H]` that the ids of a pass name, `[T, H]`."""
        ...

    def add_norm(self, x: Tensor, delta: Tensor | None, factor: float, weight: Tensor, eps: float) -> Tensor:
        """`x += factor * delta` in place; the RMSNorm of x, `[T, H]`."""
        ...

    def gated(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of `[T, 2 I]`."""
        ...

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
        """Queries `[T, head, dim]` of `[T, (queries + 2 keys) dim]`, normed (if there are `norms` of queries and keys)
        and turned; keys as well, which go to their places in the storage with the values."""
        ...


class TorchDense:
    """The plain twin of `TritonDense`."""

    def embed(self, plan: Plan, table: Tensor) -> Tensor:
        return F.embedding(plan.line(IDS), table)

    def add_norm(self, x: Tensor, delta: Tensor | None, factor: float, weight: Tensor, eps: float) -> Tensor:
        if delta is not None:
            x += delta if factor == 1.0 else delta * factor
        return _norm(x, weight, eps)

    def gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        found: Tensor = F.silu(gate) * up
        return found

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
        query: Tensor
        key: Tensor
        query, key, value = qkv.view(len(qkv), -1, heads.dim).split([heads.queries, heads.keys, heads.keys], dim=1)
        if norms is not None:
            query, key = _norm(query, norms[0], heads.eps), _norm(key, norms[1], heads.eps)
        if heads.rotated:
            positions = plan.line(POSITIONS).long()
            cos, sin = (table[positions][:, None].to(qkv.dtype) for table in (turns.cos, turns.sin))
            query, key = _turned(query, cos, sin, heads.rotated), _turned(key, cos, sin, heads.rotated)
        where = plan.line(WHERE).long()
        block, offset = where // keys.shape[2], where % keys.shape[2]
        keys[block, :, offset] = key
        values[block, :, offset] = value
        return query


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed: Tensor = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rotated: int) -> Tensor:
    first, second = x[..., :rotated].chunk(2, dim=-1)
    parts: list[Tensor] = [first * cos - second * sin, second * cos + first * sin, x[..., rotated:]]
    return torch.cat(parts, dim=-1)
