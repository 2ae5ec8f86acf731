"""Triton kernels between the products of a Llama's layer; their twins are in `dense.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from collm.models.paged import plan as lines

_HEAD = tl.constexpr(lines.HEAD)
_IDS = tl.constexpr(lines.IDS)
_POSITIONS = tl.constexpr(lines.POSITIONS)
_WHERE = tl.constexpr(lines.WHERE)


@triton.jit(do_not_specialize=["T"])
def embed(plan, table, out, T, H, B: tl.constexpr):
    """Program (token, block): the embedding of its id."""
    t = tl.program_id(0)
    i = tl.program_id(1) * B + tl.arange(0, B)
    row = tl.load(plan + _HEAD + _IDS * T + t).to(tl.int64)
    tl.store(out + t.to(tl.int64) * H + i, tl.load(table + row * H + i, mask=i < H, other=0.0), mask=i < H)


@triton.jit
def add_norm(x, delta, weight, out, factor, H, eps, ADD: tl.constexpr, B: tl.constexpr):
    """Program (token): x += factor * delta, in place; out = RMSNorm(x)."""
    at = tl.program_id(0).to(tl.int64) * H
    i = tl.arange(0, B)
    # All that is read is asked for at once: behind the sum, it would be waited for once more.
    scale = tl.load(weight + i, mask=i < H, other=0.0)
    row = tl.load(x + at + i, mask=i < H, other=0.0)
    if ADD:
        more = tl.load(delta + at + i, mask=i < H, other=0.0)
        row = (row.to(tl.float32) + factor * more.to(tl.float32)).to(row.dtype)
        tl.store(x + at + i, row, mask=i < H)
    wide = row.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    tl.store(out + at + i, normed.to(row.dtype) * scale, mask=i < H)


@triton.jit
def gated(gate_up, out, width, B: tl.constexpr):
    """Program (token, block): silu(gate) * up."""
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    gate = tl.load(gate_up + t * 2 * width + i, mask=i < width, other=0.0)
    up = tl.load(gate_up + t * 2 * width + width + i, mask=i < width, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out + t * width + i, (wide / (1 + tl.exp(-wide))).to(up.dtype) * up, mask=i < width)


@triton.jit(do_not_specialize=["T"])
def turn_and_store(
    qkv, query, keys, values, cos, sin, query_norm, key_norm, plan, T, eps,
    HQ: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Program (token, head): norm and turn a head of queries or keys; keys and values go to their places."""
    t = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, DP)
    position = tl.load(plan + _HEAD + _POSITIONS * T + t)
    where = tl.load(plan + _HEAD + _WHERE * T + t)
    # The number that each one is turned with: its like in the other half of those that are turned.
    other = tl.where(d < R // 2, d + R // 2, tl.where(d < R, d - R // 2, d))
    source = qkv + (t.to(tl.int64) * (HQ + 2 * KV) + h) * D
    x = tl.load(source + d, mask=d < D, other=0.0)
    y = tl.load(source + other, mask=d < D, other=0.0)
    turns = h < HQ + KV
    if NORM:
        wide = x.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
        weight = query_norm
        if h >= HQ:
            weight = key_norm
        normed_x = (wide * size).to(x.dtype) * tl.load(weight + d, mask=d < D, other=0.0)
        normed_y = (y.to(tl.float32) * size).to(y.dtype) * tl.load(weight + other, mask=d < D, other=0.0)
        x = tl.where(turns, normed_x, x)
        y = tl.where(turns, normed_y, y)
    turned = x.to(tl.float32)
    if R > 0:
        angle = position * (R // 2) + tl.where(d < R // 2, d, d - R // 2)
        known = (d < R) & turns
        c = tl.load(cos + angle, mask=known, other=1.0)
        s = tl.load(sin + angle, mask=known, other=0.0)
        turned = turned * c + y.to(tl.float32) * tl.where(d < R // 2, -s, s)
    block = (where // BLOCK).to(tl.int64) * KV
    inside = where % BLOCK
    if h < HQ:
        tl.store(query + (t * HQ + h) * D + d, turned, mask=d < D)
    elif h < HQ + KV:
        tl.store(keys + ((block + h - HQ) * BLOCK + inside) * D + d, turned, mask=d < D)
    else:
        tl.store(values + ((block + h - HQ - KV) * BLOCK + inside) * D + d, turned, mask=d < D)
