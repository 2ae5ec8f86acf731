"""Which token sequences the slots of a KV pool hold, and which slot serves a query best."""

from __future__ import annotations

from collections.abc import Sequence

TokenIds = tuple[int, ...]


class SlotTable:
    """At most `num_slots` sequences. New slots are opened before an old sequence is given up."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.held: list[TokenIds] = []
        """What each slot holds."""
        self._used: list[int] = []
        self._clock = 0

    def hold(self, slot: int, token_ids: TokenIds) -> None:
        self.held[slot] = token_ids

    def swap(self, a: int, b: int) -> None:
        self.held[a], self.held[b] = self.held[b], self.held[a]
        self._used[a], self._used[b] = self._used[b], self._used[a]

    def common_prefix(self, slot: int, token_ids: TokenIds) -> int:
        """Length of the longest common prefix (a binary search: comparing slices is far quicker than tokens)."""
        held = self.held[slot]
        low, high = 0, min(len(held), len(token_ids))
        while low < high:
            middle = (low + high + 1) // 2
            if held[low:middle] == token_ids[low:middle]:
                low = middle
            else:
                high = middle - 1
        return low

    def assign(self, sequences: Sequence[TokenIds]) -> list[int]:
        """A slot of its own for each sequence.

        First the longest one that it merely extends; then one that shares at least half of it (a rollback, or the
        same conversation); else a new slot, or the one that was used longest ago.
        """
        assert len(sequences) <= self.num_slots
        self._clock += 1
        chosen: dict[int, int] = {}
        free = set(range(len(self.held)))
        for i, token_ids in enumerate(sequences):
            extended = [
                slot for slot in free if self.held[slot] and token_ids[: len(self.held[slot])] == self.held[slot]
            ]
            if extended:
                chosen[i] = max(extended, key=lambda slot: len(self.held[slot]))
                free.discard(chosen[i])
        for i, token_ids in enumerate(sequences):
            if i in chosen:
                continue
            shared = {slot: self.common_prefix(slot, token_ids) for slot in free}
            best = max(shared, key=lambda slot: (shared[slot], -self._used[slot]), default=None)
            if best is None or 2 * shared[best] < len(token_ids):
                best = self._oldest(free)
            chosen[i] = best
            free.discard(best)
        for slot in chosen.values():
            self._used[slot] = self._clock
        return [chosen[i] for i in range(len(sequences))]

    def _oldest(self, free: set[int]) -> int:
        if len(self.held) < self.num_slots:
            self.held.append(())
            self._used.append(0)
            return len(self.held) - 1
        return min(free, key=lambda slot: self._used[slot])
