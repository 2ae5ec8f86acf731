"""Which block of the storage holds which positions of which slot: bookkeeping on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK = 256
"""Positions of a block. Large enough for a loop of its own in the attention kernel: with the block's number read in the
same loop, Triton fetches no keys ahead."""


class OutOfBlocks(RuntimeError):
    """Whoever counts the blocks (`PagedCache`) has miscounted."""


class Blocks:
    """Slots take blocks as their texts grow. Slots with a common beginning share its blocks until one writes there.

    `table` `[slot, block of positions]` names the blocks; `lengths[slot]` of them are the slot's.
    """

    def __init__(self, num_blocks: int, num_slots: int, width: int, size: int = BLOCK) -> None:
        self.num_blocks, self.num_slots, self.size = num_blocks, num_slots, size
        self.table: NDArray[np.int32] = np.zeros((num_slots, width), dtype=np.int32)
        self.lengths = [0] * num_slots
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def needed(self, length: int) -> int:
        """Blocks of so many positions."""
        return -(-length // self.size)

    def own(self, slot: int) -> int:
        """Blocks that would be free if this slot were empty."""
        return sum(self._owners[block] == 1 for block in self.table[slot, : self.lengths[slot]].tolist())

    def write(self, slot: int, start: int, end: int) -> list[tuple[int, int]]:
        """Make positions `start` to `end` of a slot its own. Returns the blocks `(from, to)` that have to be copied
        first: shared ones of which positions before `start` stay.

        What the table says of blocks that are no longer the slot's own is told the device by the tokens that are
        written there.
        """
        copies: list[tuple[int, int]] = []
        first, last = start // self.size, self.needed(end)
        row = self.table[slot]
        for place in range(first, min(last, self.lengths[slot])):
            block = int(row[place])
            if self._owners[block] > 1:
                new = self._take()
                if place == first and start % self.size:
                    copies.append((block, new))
                self._owners[block] -= 1
                row[place] = new
        for place in range(self.lengths[slot], last):
            row[place] = self._take()
            self.lengths[slot] = place + 1
        return copies

    def share(self, source: int, target: int, length: int) -> int:
        """Let a slot begin with the first `length` positions of another one; returns how many blocks that are."""
        count = self.needed(length)
        assert source != target and count <= self.lengths[source]
        shared: Sequence[int] = self.table[source, :count].tolist()
        for block in shared:
            self._owners[block] += 1
        self.clear(target)
        self.table[target, :count] = shared
        self.lengths[target] = count
        return count

    def clear(self, slot: int) -> None:
        for block in self.table[slot, : self.lengths[slot]].tolist():
            self._owners[block] -= 1
            if not self._owners[block]:
                self._free.append(block)
        self.lengths[slot] = 0

    def _take(self) -> int:
        if not self._free:
            raise OutOfBlocks("no block is free")
        block = self._free.pop()
        self._owners[block] = 1
        return block
