"""Triton kernels of the output side: top token, entropy, gate, and a choice by the same noise as everywhere."""

from __future__ import annotations

import triton
import triton.language as tl

from collm.models.paged import plan as lines
from collm.models.paged import telling
from collm.noise import PURPOSES

_HEAD = tl.constexpr(lines.HEAD)
_DRAW = tl.constexpr(lines.DRAW)
_GATE = tl.constexpr(telling.GATE)
_TOKEN = tl.constexpr(PURPOSES["token"])
_FAR = tl.constexpr(0x7F800000)
"""The bits of infinity: how far a token of no probability is from the top one."""


@triton.jit
def look(logits, parts, stride, V, SHARE: tl.constexpr, BV: tl.constexpr, S: tl.constexpr):
    """Program (token, share of the vocabulary): largest logit m, which one, `sum e^(x - m)`, that times `x - m`, NaN.

    `parts` float32 `[T, 5, S]`; token ids below 2**24 are exact.
    """
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    best = -float("inf")
    which = 0
    total = 0.0
    weighted = 0.0
    bad = 0
    first = s * SHARE
    for v0 in range(first, tl.minimum(first + SHARE, V), BV):
        v = v0 + tl.arange(0, BV)
        x = tl.load(logits + t * stride + v, mask=v < V, other=-float("inf")).to(tl.float32)
        bad = tl.maximum(bad, tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0))
        x = tl.where(x != x, -float("inf"), x)
        top = tl.max(x, 0)
        index = tl.min(tl.where(x == top, v, 0x7FFFFFFF), 0)
        old = tl.maximum(best, -1e30)
        new = tl.maximum(old, top)
        fade = tl.exp(old - new)
        weight = tl.exp(x - new)
        weighted = fade * (weighted + total * (old - new)) + tl.sum(tl.where(weight > 0, weight * (x - new), 0.0), 0)
        total = fade * total + tl.sum(weight, 0)
        which = tl.where(top > best, index, which)
        best = tl.maximum(best, top)
    at = parts + t * 5 * S + s
    tl.store(at, best)
    tl.store(at + S, which.to(tl.float32))
    tl.store(at + 2 * S, total)
    tl.store(at + 3 * S, weighted)
    tl.store(at + 4 * S, bad.to(tl.float32))


@triton.jit
def tell(
    parts, hidden, weight, bias, out, stride, H,
    S: tl.constexpr, SP: tl.constexpr, BH: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Program (token): the shares put together, and the gate of K assistants (0: none); `out` int32 `[T, C]`."""
    t = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    at = parts + t * 5 * S + s
    bests = tl.load(at, mask=s < S, other=-float("inf"))
    best = tl.max(bests, 0)
    which = tl.min(tl.where(bests == best, tl.load(at + S, mask=s < S, other=3e38), 3e38), 0)
    safe = tl.maximum(best, -1e30)
    off = tl.maximum(bests, -1e30) - safe
    fade = tl.exp(off)
    totals = tl.load(at + 2 * S, mask=s < S, other=0.0)
    total = tl.sum(totals * fade, 0)
    weighted = tl.sum(fade * (tl.load(at + 3 * S, mask=s < S, other=0.0) + totals * off), 0)
    bad = tl.max(tl.load(at + 4 * S, mask=s < S, other=0.0), 0) > 0
    # Of no number at all nothing is told.
    bad = bad | (best == -float("inf")) | (total != total)
    norm = tl.log(total)
    entropy = norm - weighted / total
    row = out + t * C
    if K > 0:
        i = tl.arange(0, BH)
        state = tl.load(hidden + t * stride + i, mask=i < H, other=0.0).to(tl.float32)
        k = tl.arange(0, KP)
        scores = tl.where(k == 0, 0.0, -float("inf"))
        for each in tl.static_range(K):
            score = tl.sum(state * tl.load(weight + each * H + i, mask=i < H, other=0.0).to(tl.float32), 0)
            scores = tl.where(k == each + 1, score + tl.load(bias + each).to(tl.float32), scores)
        bad = bad | (tl.max((scores != scores).to(tl.int32), 0) > 0)
        high = tl.max(scores, 0)
        gates = scores - high - tl.log(tl.sum(tl.exp(scores - high), 0))
        tl.store(row + _GATE + k, gates.to(tl.int32, bitcast=True), mask=k <= K)
    told = (-norm).to(tl.int32, bitcast=True)
    tl.store(row, which.to(tl.int32))
    tl.store(row + 1, told)
    tl.store(row + 2, entropy.to(tl.int32, bitcast=True))
    tl.store(row + 3, bad.to(tl.int32))
    # The choice, unless it is drawn.
    tl.store(row + 4, which.to(tl.int32))
    tl.store(row + 5, told)


@triton.jit
def _far(logits, v, V, best, temperature):
    """How far below the top one tokens are, over the temperature, as bits: integers in the order of the floats."""
    x = tl.load(logits + v, mask=v < V, other=-float("inf")).to(tl.float32)
    return tl.abs((x - best) / temperature).to(tl.int32, bitcast=True)


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; see `collm.noise`. All are uint32."""
    for _ in range(10):
        p0 = c0
        p2 = c2
        c0 = tl.umulhi(p2, tl.full(p2.shape, 0xCD9E8D57, tl.uint32)) ^ c1 ^ k0
        c2 = tl.umulhi(p0, tl.full(p0.shape, 0xD2511F53, tl.uint32)) ^ c3 ^ k1
        c1 = p2 * tl.full(p2.shape, 0xCD9E8D57, tl.uint32)
        c3 = p0 * tl.full(p0.shape, 0xD2511F53, tl.uint32)
        k0 = k0 + tl.full(k0.shape, 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full(k1.shape, 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _late(word):
    """The logarithm of exponential noise, `log(-log(u))`, `u = (word + 0.5) / 2**32`, without rounding u to 1."""
    # int64 first: a word is unsigned, and its complement must be exact.
    exact = word.to(tl.int64)
    rest = ((4294967295 - exact).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = (exact.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    small = rest * (1 + rest * (0.5 + rest * (0.3333333333 + rest * 0.25)))
    return tl.log(tl.where(rest < 0.01, small, -tl.log(tl.minimum(u, 0.9999999))))


@triton.jit(do_not_specialize=["T"])
def choose(logits, out, plan, T, stride, V, C: tl.constexpr, BV: tl.constexpr):
    """Program (token): draw the token, where it is drawn, as `decoding.choosing` does: temperature, top-k, top-p, race.

    Tokens are kept by how far they are from the top one: those nearer than a bound, and the first few at it (of equally
    probable ones the lower id comes first). The bound is found by bisection over the values that there are.
    """
    t = tl.program_id(0)
    at = plan + _HEAD + _DRAW * T + t
    temperature = tl.load(at + 5 * T).to(tl.float32, bitcast=True)
    if temperature > 0:
        logits += t.to(tl.int64) * stride
        row = out + t.to(tl.int64) * C
        top_k = tl.load(at + 4 * T)
        top_p = tl.load(at + 6 * T).to(tl.float32, bitcast=True)
        best = tl.load(logits + tl.load(row)).to(tl.float32)
        norm = -tl.load(row + 1).to(tl.float32, bitcast=True)
        block = tl.arange(0, BV)
        bound = _FAR - 1  # tokens of no probability are never kept
        ties = V
        if (top_k > 0) & (top_k < V):
            low = 0
            high = _FAR - 1
            while low < high:
                middle = low + (high - low) // 2
                count = 0
                below = 0
                above = _FAR - 1
                for v0 in range(0, V, BV):
                    v = v0 + block
                    far = _far(logits, v, V, best, temperature)
                    near = (far <= middle) & (v < V)
                    count += tl.sum(near.to(tl.int32), 0)
                    below = tl.maximum(below, tl.max(tl.where(near, far, 0), 0))
                    above = tl.minimum(above, tl.min(tl.where(near, _FAR - 1, tl.minimum(far, _FAR - 1)), 0))
                if count >= top_k:
                    high = below
                else:
                    low = above
            nearer = 0
            for v0 in range(0, V, BV):
                far = _far(logits, v0 + block, V, best, temperature)
                nearer += tl.sum(((far < low) & (v0 + block < V)).to(tl.int32), 0)
            bound = low
            ties = top_k - nearer
        if top_p < 1:
            mass = 0.0
            at_bound = 0
            for v0 in range(0, V, BV):
                v = v0 + block
                far = _far(logits, v, V, best, temperature)
                near = (far < bound) & (v < V)
                mass += tl.sum(tl.where(near, tl.exp(-far.to(tl.float32, bitcast=True)), 0.0), 0)
                at_bound += tl.sum(((far == bound) & (v < V)).to(tl.int32), 0)
            own = tl.exp(-(bound + 0 * t).to(tl.float32, bitcast=True))
            target = top_p * (mass + tl.minimum(at_bound, ties) * own)
            low = 0
            high = bound + 0 * t
            while low < high:
                middle = low + (high - low) // 2
                mass = 0.0
                below = 0
                above = bound + 0 * t
                for v0 in range(0, V, BV):
                    v = v0 + block
                    far = _far(logits, v, V, best, temperature)
                    near = (far <= middle) & (v < V)
                    mass += tl.sum(tl.where(near, tl.exp(-far.to(tl.float32, bitcast=True)), 0.0), 0)
                    below = tl.maximum(below, tl.max(tl.where(near, far, 0), 0))
                    above = tl.minimum(above, tl.min(tl.where(near, bound, tl.minimum(far, bound)), 0))
                if mass >= target:
                    high = below
                else:
                    low = above
            mass = 0.0
            for v0 in range(0, V, BV):
                v = v0 + block
                far = _far(logits, v, V, best, temperature)
                near = (far < low) & (v < V)
                mass += tl.sum(tl.where(near, tl.exp(-far.to(tl.float32, bitcast=True)), 0.0), 0)
            own = tl.exp(-(low + 0 * t).to(tl.float32, bitcast=True))
            wanted = tl.maximum(tl.ceil((target - mass) / own).to(tl.int32), 1)
            ties = tl.where(low == bound, tl.minimum(ties, wanted), wanted)
            bound = low
        key0 = tl.full([BV // 4], 0, tl.uint32) + tl.load(at).to(tl.uint32, bitcast=True)
        key1 = tl.full([BV // 4], 0, tl.uint32) + tl.load(at + T).to(tl.uint32, bitcast=True)
        sample = tl.full([BV // 4], 0, tl.uint32) + tl.load(at + 2 * T).to(tl.uint32, bitcast=True)
        position = tl.full([BV // 4], 0, tl.uint32) + tl.load(at + 3 * T).to(tl.uint32, bitcast=True)
        purpose = tl.full([BV // 4], _TOKEN, tl.uint32)
        first = float("inf")
        chosen = tl.load(row)
        passed = 0
        quarter = tl.arange(0, BV // 4)
        for v0 in range(0, V, BV):
            # A tie is kept by its number among ties, which goes by the token, so they are counted in order.
            v = v0 + block
            tied = ((_far(logits, v, V, best, temperature) == bound) & (v < V)).to(tl.int32)
            number = passed + tl.cumsum(tied, 0) - tied
            last = tl.max(tl.where((tied > 0) & (number < ties), v, -1), 0)
            passed += tl.sum(tied, 0)
            w0, w1, w2, w3 = _philox((v0 // 4 + quarter).to(tl.uint32), position, sample, purpose, key0, key1)
            for n in range(4):  # unrolled, it would take a second more to compile
                word = tl.where(n == 0, w0, tl.where(n == 1, w1, tl.where(n == 2, w2, w3)))
                v4 = v0 + 4 * quarter + n
                far = _far(logits, v4, V, best, temperature)
                kept = ((far < bound) | ((far == bound) & (v4 <= last))) & (v4 < V)
                arrival = tl.where(kept, _late(word) + far.to(tl.float32, bitcast=True), float("inf"))
                soonest = tl.min(arrival, 0)
                which = tl.min(tl.where((arrival == soonest) & kept, v4, 0x7FFFFFFF), 0)
                chosen = tl.where(soonest < first, which, chosen)
                first = tl.minimum(first, soonest)
        log_prob = tl.load(logits + chosen).to(tl.float32) - best - norm
        tl.store(row + 4, chosen)
        tl.store(row + 5, log_prob.to(tl.int32, bitcast=True))
