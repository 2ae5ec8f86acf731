"""Which block of the storage holds which positions of which slot: bookkeeping on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collm.models.attention import Row

BLOCK = 256
"""Positions of a block. Large enough for a loop of its own in the attention kernel: with the block's number read in the
same loop, Triton fetches no keys ahead."""


class OutOfBlocks(RuntimeError):
    """Whoever counts the blocks (`PagedCache`) has miscounted."""


class Blocks:
    """Slots take blocks as their texts grow. Slots with a common beginning share its blocks until one writes there.

    `table` `[slot, block of positions]` names the blocks.
    """

    def __init__(self, num_blocks: int, num_slots: int, width: int, size: int = BLOCK) -> None:
        self.num_blocks, self.num_slots, self.size = num_blocks, num_slots, size
        self.table: NDArray[np.int32] = np.zeros((num_slots, width), dtype=np.int32)
        self.of_slot: list[list[int]] = [[] for _ in range(num_slots)]
        """The same as lists, which Python reads in a tenth of the time."""
        self.changes = 0
        """How often a slot's blocks have changed, or whose they are."""
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def needed(self, length: int) -> int:
        """Blocks of so many positions."""
        return -(-length // self.size)

    def takes(self, slot: int, start: int, end: int) -> int:
        """Free blocks that `write` would take."""
        blocks = self.of_slot[slot]
        first, last = start // self.size, self.needed(end)
        return max(0, last - len(blocks)) + sum(self._owners[block] > 1 for block in blocks[first:last])

    def write(self, slot: int, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions `start` to `end` of a slot its own. Returns the blocks `(from, to)` that have to be copied
        first: shared ones that are not written as a whole. What stands before `start` stays, and so does what stands
        from `end` on: a text is asked about a place, too, behind which more of it is stored.

        What the table says of blocks that are no longer the slot's own is told the device by the tokens that are
        written there.
        """
        blocks = self.of_slot[slot]
        first, last = start // self.size, self.needed(end)
        copies: list[tuple[int, int]] = []
        for place in range(first, min(last, len(blocks))):
            block = blocks[place]
            if self._owners[block] > 1:
                new = self._take()
                if start > place * self.size or end < (place + 1) * self.size:
                    copies.append((block, new))
                self._owners[block] -= 1
                blocks[place] = self.table[slot, place] = new
        for place in range(len(blocks), last):
            new = self._take()
            blocks.append(new)
            self.table[slot, place] = new
        return copies

    def write_rows(self, rows: Sequence[Row]) -> list[tuple[int, int]]:
        """`write` for the tokens of a pass, most of which go where their texts have room."""
        size, owners, copies = self.size, self._owners, list[tuple[int, int]]()
        for slot, start, width in rows:
            blocks, first, end = self.of_slot[slot], start // size, start + width
            last = (end - 1) // size
            if first < last or last >= len(blocks) or owners[blocks[first]] > 1:
                copies += self.write(slot, start, end)
        return copies

    def share(self, source: int, target: int, length: int) -> int:
        """Let a slot begin with the first `length` positions of another one; returns how many blocks that are."""
        count = self.needed(length)
        assert source != target and count <= len(self.of_slot[source])
        shared = self.of_slot[source][:count]
        for block in shared:
            self._owners[block] += 1
        self.clear(target)
        self.table[target, :count] = shared
        self.of_slot[target] = shared
        return count

    def clear(self, slot: int) -> None:
        self.changes += 1
        for block in self.of_slot[slot]:
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
        self.of_slot[slot] = []

    def _take(self) -> int:
        if not self._free:
            raise OutOfBlocks("no block is free")
        block = self._free.pop()
        self._owners[block] = 1
        self.changes += 1
        return block
