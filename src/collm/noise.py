"""Random numbers that are a pure function of (seed, sample, position, purpose, index).

So a text does not depend on its batch-mates, on how the models were scheduled, or on the device, and two decoders that
meet the same law at the same position of the same seed draw the same token.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a counter-based generator. Written
with `* >> & ^` alone, so that Python's integers, numpy's int64 arrays and torch's int64 tensors on any device give the
same integers, bit for bit; they are also those of Triton's `tl.philox`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np

Purpose = Literal["author", "token", "deferral"]
PURPOSES: dict[Purpose, int] = {"author": 0, "token": 1, "deferral": 2}
Words = Any
"""An int, or an array of int64; each holds 32-bit words."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def key_of(seed: int) -> tuple[int, int]:
    """A seed of 64 bits (negative ones in two's complement) as two words, the low one first."""
    return seed & _MASK, (seed >> 32) & _MASK


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words], rounds: int = 10
) -> tuple[Words, Words, Words, Words]:
    """Four random words of 32 bits for each counter. All arguments broadcast against one another."""
    # int64 products wrap around; the bits that are read, of an unsigned product, are the same.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for _ in range(rounds):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK
        c2, c3 = ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(seed: int, sample: int, position: int, purpose: Purpose, count: int = 1) -> tuple[float, ...]:
    """Independent uniform numbers in (0, 1), for decisions on the host."""
    return _uniforms(seed, sample, position // POSITIONS, purpose, count)[position % POSITIONS]


POSITIONS = 64
"""Positions whose numbers are made together: ten rounds over an array cost little more than over a single number."""


@lru_cache(maxsize=1024)
def _uniforms(seed: int, sample: int, block: int, purpose: Purpose, count: int) -> list[tuple[float, ...]]:
    """Those of all positions of a block."""
    positions = np.arange(block * POSITIONS, (block + 1) * POSITIONS, dtype=np.int64)
    words: list[Words] = []
    for number in range(-(-count // 4)):
        words += philox((number, positions, sample, PURPOSES[purpose]), key_of(seed))
    return list(zip(*[to_uniform(np.broadcast_to(word, POSITIONS)).tolist() for word in words[:count]], strict=True))


def to_uniform(word: Words) -> Words:
    """The middle of one of the `2**32` equal parts of (0, 1)."""
    return (word + 0.5) * 2.0**-32
