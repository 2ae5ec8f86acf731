"""A ragged pass as one array of numbers: everything that changes from pass to pass, so that shapes need not.

The tokens of all rows stand one after another. For attention they are cut into *pieces* of neighbouring tokens of one
slot, as many as fill a tile together with the query heads that share a key head; the keys that a piece sees are cut
into chunks. A piece and a chunk are an *item* of work. So one long text beside short ones is many items, and no item is
long.
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
"""Numbers before the lines: items, positions of a chunk."""
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
MORE_ITEMS = 256
"""Items beyond one for each token that a pass may have: it bounds the memory of partial results."""
NO_ITEM = 2**31 - 1
FEW_TEXTS, FEW_TOKENS = 64, 96
"""Texts and tokens of a pass, at most, that is written down one by one."""


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
    """Items of a pass over so many tokens at most."""
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
        How many items it has, `num_items(T)` at most.
    """
    fill_empty(numbers, blocks)
    lines = numbers[HEAD:].reshape(LINES, -1)
    count = len(token_ids)
    if len(rows) <= FEW_TEXTS and count <= FEW_TOKENS:
        items = _few(numbers, lines, rows, token_ids, blocks, per_piece)
        if items:
            return items
    shape = np.array([(row.slot, row.start, row.width) for row in rows], dtype=np.int32)
    slots, starts, widths = shape.T
    number = np.repeat(np.arange(len(rows)), widths)
    first = np.cumsum(widths) - widths
    positions = starts[number] + np.arange(count) - first[number]
    lines[IDS, :count] = token_ids
    lines[POSITIONS, :count] = positions
    lines[SLOTS, :count] = slots[number]
    block = blocks.table[slots[number], positions // blocks.size]
    lines[WHERE, :count] = block * blocks.size + positions % blocks.size
    return _pieces(numbers, lines, slots, starts, widths, first, per_piece)


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


def _few(
    numbers: NDArray[np.int32],
    lines: NDArray[np.int32],
    rows: Sequence[Row],
    token_ids: Sequence[int],
    blocks: Blocks,
    per_piece: int,
) -> int:
    """The usual pass, a few tokens of each of some texts: Python is quicker here than dozens of calls of numpy. 0 where
    there would be too many items."""
    size, token, item = blocks.size, 0, 0
    positions: list[int] = []
    where: list[int] = []
    slots: list[int] = []
    pieces: list[tuple[int, int, int, int, int]] = []
    for slot, start, width in rows:
        own = blocks.of_slot[slot]
        if width == 1:
            positions.append(start)
            where.append(own[start // size] * size + start % size)
            slots.append(slot)
            pieces.append((token, 1, slot, start, item))
            item += start // CHUNK + 1
            token += 1
            continue
        end = start + width
        positions += range(start, end)
        slots += [slot] * width
        for place in range(start // size, (end - 1) // size + 1):
            first = place * size
            moved = own[place] * size - first
            where += range(max(start, first) + moved, min(end, first + size) + moved)
        for done in range(0, width, per_piece):
            wide = min(per_piece, width - done)
            pieces.append((token + done, wide, slot, start + done, item))
            item += (start + done + wide - 1) // CHUNK + 1
        token += width
    if item > num_items(lines.shape[1]):
        return 0
    lines[: SLOTS + 1, :token] = (token_ids, positions, where, slots)
    lines[TOKEN : ITEM + 1, : len(pieces)] = np.array(pieces, dtype=np.int32).T
    numbers[0] = item
    return item


def _pieces(
    numbers: NDArray[np.int32],
    lines: NDArray[np.int32],
    slots: NDArray[np.int32],
    starts: NDArray[np.int32],
    widths: NDArray[np.int32],
    first: NDArray[np.int64],
    per_piece: int,
) -> int:
    counts = -(-widths // per_piece)
    number = np.repeat(np.arange(len(widths)), counts)
    done = (np.arange(len(number)) - (np.cumsum(counts) - counts)[number]) * per_piece
    count, room = len(number), num_items(lines.shape[1])
    width = np.minimum(per_piece, widths[number] - done)
    start = starts[number] + done
    chunk = CHUNK
    while (items := -(-(start + width) // chunk)).sum() > room:
        chunk *= 2
    lines[TOKEN : ITEM + 1, :count] = first[number] + done, width, slots[number], start, np.cumsum(items) - items
    numbers[:2] = items.sum(), chunk
    return int(items.sum())
