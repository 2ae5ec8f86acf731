"""Triton kernels of a ragged pass. All that changes from pass to pass is read from the plan, on the device.

Each has a twin in torch (`ops.py`, `telling.py`). Numbers of tokens and the width of the table are not specialised for:
every bucket, and every size of the storage, would compile anew.
"""

from __future__ import annotations

import triton
import triton.language as tl

from collm.models.paged import plan as lines

_HEAD = tl.constexpr(lines.HEAD)
_POSITIONS = tl.constexpr(lines.POSITIONS)
_WHERE = tl.constexpr(lines.WHERE)
_SLOTS = tl.constexpr(lines.SLOTS)
_TOKEN = tl.constexpr(lines.TOKEN)
_WIDTH = tl.constexpr(lines.WIDTH)
_SLOT = tl.constexpr(lines.SLOT)
_START = tl.constexpr(lines.START)
_ITEM = tl.constexpr(lines.ITEM)
_NO_ITEM = tl.constexpr(lines.NO_ITEM)


@triton.jit(do_not_specialize=["T", "table_width"])
def enter(plan, table, T, table_width, BLOCK: tl.constexpr):
    """Program (token): the block that it is written to, into the table."""
    at = plan + _HEAD + tl.program_id(0)
    slot = tl.load(at + _SLOTS * T).to(tl.int64)
    place = tl.load(at + _POSITIONS * T) // BLOCK
    tl.store(table + slot * table_width + place, tl.load(at + _WHERE * T) // BLOCK)


@triton.jit(do_not_specialize=["T"])
def store(
    key, value, keys, values, plan, T, key_token, key_head, value_token, value_head,
    KV: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (token, kv head)."""
    t = tl.program_id(0)
    h = tl.program_id(1)
    d = tl.arange(0, DP)
    where = tl.load(plan + _HEAD + _WHERE * T + t)
    place = (((where // BLOCK).to(tl.int64) * KV + h) * BLOCK + where % BLOCK) * D + d
    tl.store(keys + place, tl.load(key + t * key_token + h * key_head + d, mask=d < D), mask=d < D)
    tl.store(values + place, tl.load(value + t * value_token + h * value_head + d, mask=d < D), mask=d < D)


@triton.jit
def _of_piece(plan, T, p):
    """Its first token in the pass, its tokens, its slot, its first position, its first item."""
    at = plan + _HEAD + p
    known = p < T
    token = tl.load(at + _TOKEN * T, mask=known, other=0)
    width = tl.load(at + _WIDTH * T, mask=known, other=0)
    slot = tl.load(at + _SLOT * T, mask=known, other=0)
    start = tl.load(at + _START * T, mask=known, other=0)
    first = tl.load(at + _ITEM * T, mask=known, other=0)
    return token, width, slot, start, first


@triton.jit
def _weigh(
    q, key, value, where, position, stop, top, total, acc, scale, window, cap,
    WINDOW: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some keys and values more: the largest score, the sum of weights `[M]` and of weighted values `[M, DP]`."""
    scores = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale
    if CAP:
        scores = cap * (2 * tl.sigmoid(2 * scores / cap) - 1)
    scores = scores.to(tl.float32)  # compilers hand numbers over as float64
    seen = (where[None, :] <= position) & (where < stop)[None, :]
    if WINDOW:
        seen = seen & (where[None, :] > position - window)
    scores = tl.where(seen, scores, -1e30)
    new = tl.maximum(top, tl.max(scores, 1))
    weights = tl.where(seen, tl.exp(scores - new[:, None]), 0.0)
    fade = tl.exp(top - new)
    acc = acc * fade[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
    return new, total * fade + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["T", "programs", "table_width"])
def attend(
    query, keys, values, out, part, stats, plan, table, T, programs, table_width, scale, window, cap,
    query_token, query_head,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, WIDE: tl.constexpr, NP: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (n, kv head): the n-th item, and every `programs`-th after it: one piece's queries, one chunk of keys.

    A piece with a single chunk is done then; of others the parts go to `part` `[item, kv head, M, DP]` and the largest
    score and the sum of weights to `stats` `[item, kv head, M, 2]`, float32.
    """
    h = tl.program_id(1)
    KV: tl.constexpr = HQ // G
    PER: tl.constexpr = M // G
    items = tl.load(plan)
    chunk = tl.load(plan + 1)
    pieces = tl.load(plan + 2)
    p = tl.program_id(0)
    # The piece, if each is one item, as most are: fetched before it is known whether it is so.
    token, width, slot, start, first = _of_piece(plan, T, p)
    m = tl.arange(0, M)
    d = tl.arange(0, DP)
    n = tl.arange(0, N)
    mine = m // G  # which of the piece's tokens a row of the tile is
    for item in range(tl.program_id(0), items, programs):
        if (items > pieces) | (item >= programs):
            each = tl.arange(0, NP)
            firsts = tl.load(plan + _HEAD + _ITEM * T + each, mask=each < T, other=_NO_ITEM)
            p = tl.sum((firsts <= item).to(tl.int32), 0) - 1
            token, width, slot, start, first = _of_piece(plan, T, p)
        end = start + width
        low = (item - first) * chunk
        high = tl.minimum(end, low + chunk)
        if WINDOW:
            low = tl.maximum(low, tl.maximum(start + 1 - window, 0) // N * N)
        valid = (mine < width) & (m < PER * G)
        row = token + mine
        head = h * G + m % G
        seen_row = valid[:, None] & (d < D)[None, :]
        whose = query + row[:, None] * query_token + head[:, None] * query_head
        q = tl.load(whose + d[None, :], mask=seen_row, other=0.0)
        position = (start + mine)[:, None]
        top = tl.full([M], -1e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DP], tl.float32)
        blocks = table + slot.to(tl.int64) * table_width
        if (WIDE > 0) and ((high - low <= WIDE) & (low % BLOCK + WIDE <= BLOCK)):
            # All keys at once: a short text waits for the memory, and for its products, a single time.
            where = low + tl.arange(0, max(WIDE, 16))
            base = (tl.load(blocks + low // BLOCK).to(tl.int64) * KV + h) * BLOCK * D
            place = base + (where % BLOCK)[:, None] * D + d[None, :]
            known = (where < high)[:, None] & (d < D)[None, :]
            key = tl.load(keys + place, mask=known, other=0.0)
            value = tl.load(values + place, mask=known, other=0.0)
            top, total, acc = _weigh(
                q, key, value, where, position, high, top, total, acc, scale, window, cap, WINDOW, CAP, PRECISION
            )
        else:
            # A loop inside a block, where addresses are affine, so that its loads are fetched ahead.
            for b0 in range(low // BLOCK * BLOCK, high, BLOCK):
                base = (tl.load(blocks + b0 // BLOCK).to(tl.int64) * KV + h) * BLOCK * D
                stop = tl.minimum(high, b0 + BLOCK)
                for n0 in range(tl.maximum(low, b0), stop, N):
                    where = n0 + n
                    place = base + (where - b0)[:, None] * D + d[None, :]
                    known = (where < stop)[:, None] & (d < D)[None, :]
                    key = tl.load(keys + place, mask=known, other=0.0)
                    value = tl.load(values + place, mask=known, other=0.0)
                    top, total, acc = _weigh(
                        q,
                        key,
                        value,
                        where,
                        position,
                        stop,
                        top,
                        total,
                        acc,
                        scale,
                        window,
                        cap,
                        WINDOW,
                        CAP,
                        PRECISION,
                    )
        if end <= chunk:
            there = (row * HQ + head)[:, None] * D + d[None, :]
            tl.store(out + there, acc / tl.where(total > 0, total, 1.0)[:, None], mask=seen_row)
        else:
            at_part = (item * KV + h) * M + m
            tl.store(part + at_part[:, None] * DP + d[None, :], acc)
            tl.store(stats + at_part * 2, top)
            tl.store(stats + at_part * 2 + 1, total)


@triton.jit
def _together(
    part, stats, out, first, chunks, token, width, h,
    HQ: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The chunks of a piece put together, `CHUNKS` at a time: one after the other, each would wait for the memory."""
    KV: tl.constexpr = HQ // G
    c = tl.arange(0, CHUNKS)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    for t in tl.range(0, width, num_stages=1):
        top = tl.full([GP], -1e30, tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, DP], tl.float32)
        for n in tl.range(0, chunks, CHUNKS, num_stages=1):
            known = (n + c < chunks)[:, None] & (g < G)[None, :]
            at_part = ((first + n + c) * KV + h)[:, None] * M + t * G + g[None, :]
            tops = tl.load(stats + at_part * 2, mask=known, other=-1e30)
            totals = tl.load(stats + at_part * 2 + 1, mask=known, other=0.0)
            parts = tl.load(part + at_part[:, :, None] * DP + d[None, None, :], mask=known[:, :, None], other=0.0)
            new = tl.maximum(top, tl.max(tops, 0))
            fade = tl.exp(top - new)
            weights = tl.exp(tops - new[None, :])
            total = total * fade + tl.sum(totals * weights, 0)
            acc = acc * fade[:, None] + tl.sum(parts * weights[:, :, None], 0)
            top = new
        there = ((token + t) * HQ + h * G + g)[:, None] * D + d[None, :]
        mask = (g < G)[:, None] & (d < D)[None, :]
        tl.store(out + there, acc / tl.where(total > 0, total, 1.0)[:, None], mask=mask)


@triton.jit(do_not_specialize=["T"])
def combine(
    part, stats, out, plan, T,
    HQ: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """Program (piece, kv head): the chunks of a piece put together, if there are several."""
    p = tl.program_id(0)
    h = tl.program_id(1)
    chunk = tl.load(plan + 1)
    token, width, slot, start, first = _of_piece(plan, T, p)
    end = start + width
    if (width > 0) & (end > chunk):
        _together(part, stats, out, first, tl.cdiv(end, chunk), token, width, h, HQ, G, GP, D, DP, M, CHUNKS)
