"""Which token sequences the slots of a KV pool hold, and which slot serves a query best."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

TokenIds = tuple[int, ...]

REWIND = 64
"""Tokens by which a text may be rolled back in its slot; drafts are shorter."""
WORTH_SHARING = 16
"""Tokens of a common prefix that are worth a copy, or the wait until another text has computed them."""


@dataclass(slots=True)
class Slot:
    """`held` has its keys stored. A text's prompt, `root` tokens, never changes, so that it tells texts apart."""

    held: TokenIds = ()
    root: int = 0
    used: int = 0


class SlotTable:
    """What the slots hold; it follows the pool's storage and never runs ahead of it."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self._clock = 0

    def resize(self, keep: Sequence[int], num_slots: int, num_positions: int) -> None:
        """As `KVPool.resize`."""
        kept = [self.slots[slot] for slot in keep]
        for slot in kept:
            slot.held = slot.held[:num_positions]
        self.slots = kept + [Slot() for _ in range(num_slots - len(kept))]

    def by_use(self) -> list[int]:
        """The slots that hold something, last used first."""
        filled = [number for number, slot in enumerate(self.slots) if slot.held]
        return sorted(filled, key=lambda number: -self.slots[number].used)

    def touch(self, numbers: Collection[int]) -> None:
        self._clock += 1
        for number in numbers:
            self.slots[number].used = self._clock

    def match(self, sequences: Sequence[TokenIds]) -> dict[int, int]:
        """The slots that hold these texts already: index of the sequence -> slot.

        First the longest one that a sequence extends; then one whose prompt it shares and whose end it takes back.
        """
        found: dict[int, int] = {}
        free = [number for number, slot in enumerate(self.slots) if slot.held]
        for test in (_extends, _rewinds):
            for i, token_ids in enumerate(sequences):
                if i not in found:
                    same = [number for number in free if test(token_ids, self.slots[number])]
                    if same:
                        found[i] = max(same, key=lambda number: len(self.slots[number].held))
                        free.remove(found[i])
        return found

    def open(self, root: int, taken: Collection[int]) -> int:
        """An empty slot, else the one used longest ago, for a new text; `taken` are not given away.

        What it holds stays: it may be the beginning of the new text.
        """
        free = [number for number in range(len(self.slots)) if number not in taken]
        chosen = min(free, key=lambda number: (bool(self.slots[number].held), self.slots[number].used))
        self.slots[chosen].root = root
        return chosen

    def longest_prefix(self, token_ids: TokenIds) -> tuple[int, int]:
        """The slot that shares most with a sequence, and how many tokens."""
        shared = [common_prefix(slot.held, token_ids) for slot in self.slots]
        return max(enumerate(shared), key=lambda pair: pair[1])


def common_prefix(held: TokenIds, token_ids: TokenIds) -> int:
    """Length of the longest common prefix (comparing slices is far quicker than tokens)."""
    high = min(len(held), len(token_ids))
    if held[:high] == token_ids[:high]:
        return high
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if held[low:middle] == token_ids[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _extends(token_ids: TokenIds, slot: Slot) -> bool:
    held = slot.held
    # The last token tells almost all others at once.
    return len(held) <= len(token_ids) and held[-1] == token_ids[len(held) - 1] and held == token_ids[: len(held)]


def _rewinds(token_ids: TokenIds, slot: Slot) -> bool:
    least = max(slot.root, len(slot.held) - REWIND, 1)
    return (
        len(token_ids) >= least
        and len(slot.held) >= least
        and slot.held[least - 1] == token_ids[least - 1]
        and slot.held[:least] == token_ids[:least]
    )
