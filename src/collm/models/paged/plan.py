"""A ragged pass as one array of numbers: everything that changes from pass to pass, so that shapes need not.

The tokens of all rows stand one after another. For attention they are cut into *pieces* of neighbouring tokens of one
slot in one block, as many as fill a tile together with the query heads that share a key head; the keys that a piece
sees are cut into chunks. A piece and a chunk are an *item* of work. So one long text beside short ones is many items,
and no item is long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm.models.attention import Row
from collm.models.paged.blocks import Blocks

HEAD = 4
"""Numbers before the lines: items, positions of a chunk, pieces."""
LINES = 18
"""An even number: a pass may be uploaded as int64, beside other numbers."""
IDS, POSITIONS, WHERE, SLOTS = 0, 1, 2, 3
"""Lines of a token: its id, its position in its text, its place in the storage (block x size + offset), its slot."""
TOKEN, WIDTH, SLOT, START, ITEM = 4, 5, 6, 7, 8
"""Lines of a piece: its first token in the pass, its tokens (0: no piece), its slot, its first position, its first
item."""
CUT, OPENS = 9, 10
"""Lines of a token, where models share chunks: 1 + the byte behind which something is asked (0: nothing of chunks), and
whether the choice has to open a chunk."""
DRAW = 11
"""Seven lines of a token: seed (low, high), sample, position in the completion, top-k, temperature and top-p (float32).
Temperature 0 is greedy."""
CHUNK = 256
"""Positions of a chunk at least. It doubles where a pass would have too many items."""
MORE_ITEMS = 128
"""Items beyond one for each piece that a pass may have, about as many as a GPU has multiprocessors. It bounds the
memory of partial results, which are as large as a tile for each item and key head. A pass that reads has few pieces of
many tokens, and needs no item for each token. Twice as many cost 2 % with sixteen long texts (docs/log.md)."""
NO_ITEM = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Plan:
    """The numbers on a device: int32, `HEAD` and then `LINES` lines of `num_tokens`.

    `tile`: rows of a piece's tile. `items`: there are at most so many.
    """

    numbers: Tensor
    num_tokens: int
    tile: int
    items: int

    def line(self, which: int) -> Tensor:
        start = HEAD + which * self.num_tokens
        return self.numbers[start : start + self.num_tokens]

    def to(self, device: torch.device) -> Plan:
        return Plan(self.numbers.to(device, non_blocking=True), self.num_tokens, self.tile, self.items)


def num_items(num_tokens: int) -> int:
    """Items of a pass over so many tokens at most, each of which may be a piece."""
    return num_tokens + MORE_ITEMS


def size(num_tokens: int) -> int:
    return HEAD + LINES * num_tokens


def fill(
    numbers: NDArray[np.int32],
    rows: Sequence[Row],
    token_ids: Sequence[int],
    blocks: Blocks,
    per_piece: int,
) -> int:
    """Write a pass into `numbers` (`size(T)` of them, T at least the number of tokens). What is left over is padding:
    tokens of a slot and a block that are no text's, `num_slots` and `num_blocks`, and pieces of no width.

    Args:
        rows: whose positions the slots have (`Blocks.write`).
        per_piece: tokens of a piece at most.

    Returns:
        How many items it has, `MORE_ITEMS` beyond its pieces at most, and so `num_items(T)`.
    """
    fill_empty(numbers, blocks)
    lines = numbers[HEAD:].reshape(LINES, -1)
    size, token, item = blocks.size, 0, 0
    found: list[tuple[int, ...]] = []
    for slot, start, width in rows:
        own, end = blocks.of_slot[slot], start + width
        while start < end:
            place = start // size
            until = end if width == 1 else min(start + per_piece, end, (place + 1) * size)
            # What is added to a token's number in the pass to find its position, and its place in the storage.
            ahead = start - token
            stored = ahead + (own[place] - place) * size
            found.append((ahead, stored, slot, token, until - start, slot, start, item))
            item += (until - 1) // CHUNK + 1
            token += until - start
            start = until
    pieces = np.array(found, dtype=np.int32)
    of_tokens, of_pieces = lines[: SLOTS + 1, :token], lines[TOKEN : ITEM + 1, : len(found)]
    of_pieces[:] = pieces[:, 3:].T
    each = pieces[:, :3] if len(found) == token else pieces[:, :3].repeat(pieces[:, 4], axis=0)
    of_tokens[IDS], of_tokens[POSITIONS:] = token_ids, each.T
    of_tokens[POSITIONS : WHERE + 1] += np.arange(token, dtype=np.int32)
    chunk, room = CHUNK, len(found) + MORE_ITEMS
    while item > room:
        chunk *= 2
        items = -(-(pieces[:, 4] + pieces[:, 6]) // chunk)
        item = int(items.sum())
        of_pieces[-1] = np.cumsum(items) - items
    numbers[:3] = item, chunk, len(found)
    return item


def fill_empty(numbers: NDArray[np.int32], blocks: Blocks) -> None:
    """A pass of nothing but padding."""
    numbers[:] = _empty(numbers.size, blocks.num_slots, blocks.num_blocks * blocks.size)


@lru_cache(maxsize=64)
def _empty(size: int, slot: int, where: int) -> NDArray[np.int32]:
    numbers = np.zeros(size, dtype=np.int32)
    lines = numbers[HEAD:].reshape(LINES, -1)
    lines[SLOTS], lines[WHERE], lines[ITEM] = slot, where, NO_ITEM
    numbers[1] = CHUNK
    return numbers
