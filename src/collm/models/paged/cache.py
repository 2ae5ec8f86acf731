"""Texts in a `PagedPool`: they take blocks as they grow, and what ended texts left makes room."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from weakref import WeakSet

import torch

from collm.models.memory import free_bytes, tell_room
from collm.models.paged.pool import PagedPool
from collm.models.prefix_cache import Job, PrefixCache, Slot
from collm.values import Foreseen, Query

SHARE = 0.75
"""Of the free memory of a device: for the caches of all its networks together, unless a setting says otherwise. What
is left is for graphs and for reading prompts."""
MORE_SLOTS = 64
"""Slots beyond those asked for that a reservation has room for."""
_alive: WeakSet[PagedCache] = WeakSet()
_lock = Lock()


class PagedCache(PrefixCache):
    """The storage is reserved when it is first needed, once all networks are loaded: those of a device divide what is
    free, so that each can hold the same number of tokens.

    Args:
        max_tokens: to reserve; a share below 1 is one of the free memory, None the share `SHARE`. Never more than
            `num_slots` texts of `context_length`.
    """

    def __init__(
        self, pool: PagedPool, num_slots: int, max_tokens: int | float | None, context_length: int, name: str
    ) -> None:
        super().__init__(pool, num_slots)
        self._pool, self._asked, self._context_length, self.name = pool, max_tokens, context_length, name
        self._num_blocks = 0
        with _lock:
            _alive.add(self)

    @property
    def max_tokens(self) -> int:
        return self.num_blocks * self._pool.block

    @property
    def num_blocks(self) -> int:
        if self._num_blocks:
            return self._num_blocks
        with _lock:
            if not self._num_blocks:
                _divide([each for each in _on(self._pool.device) if not each._num_blocks])
            return self._num_blocks

    def fits(self, lengths: Sequence[int]) -> bool:
        if len(lengths) == 1:
            return lengths[0] <= self.max_tokens
        # A block more for each text: a shared one that it writes to is copied.
        size = self._pool.block
        needed = sum([-(-length // size) for length in lengths]) + len(lengths)
        return len(lengths) <= self.num_slots and needed <= self.num_blocks

    def forget(self) -> None:
        super().forget()
        self._num_blocks = 0

    @property
    def paged(self) -> PagedPool:
        return self._pool

    def clear_all(self) -> None:
        """Nothing is held any more; the storage stays where it is, and graphs with it."""
        self.slots, self._places = [], {}
        self._ended.clear()
        for slot in range(self._pool.blocks.num_slots):
            self._pool.blocks.clear(slot)

    def open(self) -> None:
        """Reserve the storage, if it is not."""
        blocks = self._pool.blocks
        if not blocks.num_blocks or blocks.num_slots < self.num_slots:
            self.slots, self._places = [], {}
            self._pool.reserve(self.num_slots + MORE_SLOTS, self.num_blocks, self._longest)

    @property
    def _longest(self) -> int:
        return min(self._context_length, self.max_tokens)

    def wanted(self) -> int:
        """Blocks that could be used at all."""
        return self.num_slots * (-(-self._context_length // self._pool.block) + 1)

    def _has_room(self, jobs: Sequence[Job], tokens: int) -> bool:
        return self._has_blocks(len(jobs), tokens)

    def _has_blocks(self, texts: int, tokens: int) -> bool:
        # A text takes at most a block for what it begins and one for a shared one, besides those that it fills.
        return self._pool.blocks.num_free >= 2 * texts + tokens // self._pool.block

    def cut_back(self, coming: Sequence[Foreseen], longest: int | None) -> list[int] | None:
        """The slots of texts that go on like this, which hold no more than what comes before any longer. None if one of
        them does not hold as much, or there is not room for all.

        Args:
            longest: tokens that a text may have.
        """
        if not self._has_blocks(len(coming), len(coming)):
            return None
        found = []
        for view, length, _, _ in coming:
            place = self._places.get(view)
            if place is None or (longest is not None and length >= longest):
                return None
            slot = self.slots[place]
            if slot.rewinds != view.rewinds or slot.ahead is not None:
                slot.settle(view)
            if slot.source is not None or slot.held < length:
                return None
            found.append(place)
        for place, each in zip(found, coming, strict=True):
            self.slots[place].held = each.length
        return found

    def room_ahead(self, jobs: Sequence[Job], tokens: Sequence[int]) -> bool:
        """Whether texts may grow by so many tokens each beyond what is asked of them."""
        blocks = self._pool.blocks
        if self._has_room(jobs, sum(tokens)):
            return True
        needed = [
            blocks.takes(job.slot, job.done, job.query.length + more) for job, more in zip(jobs, tokens, strict=True)
        ]
        return blocks.num_free >= sum(needed)

    def _make_room(self, queries: Sequence[Query]) -> None:
        self.open()
        while len(self.slots) < self.num_slots:
            self.slots.append(Slot())
        blocks = self._pool.blocks
        here = {self._places[query.view] for query in queries if query.view in self._places}
        needed = 0
        for query in queries:
            place = self._places.get(query.view)
            if place is None:  # what a new text shares saves it at least as many blocks as it has to copy
                needed += blocks.needed(query.length)
            else:
                slot = self.slots[place]
                held = min(slot.held, query.view.valid_since(slot.rewinds))
                needed += blocks.takes(place, min(held, query.length - query.num_last), query.length)
        if blocks.num_free >= needed:
            return
        others = [n for n, slot in enumerate(self.slots) if n not in here and slot.view is not None]
        # Ended texts first, the one used longest ago first of all.
        for n in sorted(others, key=lambda n: (not self.slots[n].ended, self.slots[n].used)):
            if blocks.num_free >= needed:
                return
            self._drop(n)
        for n in sorted(here, key=lambda n: self.slots[n].used):
            # What they share and what they held before a rollback: rather read again than not at all.
            if blocks.num_free >= needed:
                return
            needed += len(blocks.of_slot[n])
            self._pool.clear(n)
            self.slots[n].held = 0

    def _drop(self, n: int) -> None:
        view = self.slots[n].view
        if view is not None:
            del self._places[view]
        self.slots[n] = Slot()
        self._pool.clear(n)


def left_bytes(device: torch.device) -> int:
    """Memory of a device that is free and that no cache has been promised: all have their part before the first of them
    takes it."""
    with _lock:
        return max(0, free_bytes(device) - _promised(device))


def _promised(device: torch.device) -> int:
    """Bytes that caches will take when they are first used."""
    return sum(
        (each._num_blocks + 1) * each._pool.block_bytes  # one more, as `PagedPool.reserve`
        for each in _on(device)
        if each._num_blocks and not each._pool.blocks.num_blocks
    )


def _on(device: torch.device) -> list[PagedCache]:
    return [each for each in _alive if each._pool.device == device]


def _divide(caches: Sequence[PagedCache]) -> None:
    """Give each of the caches of a device its number of blocks."""
    promised = _promised(caches[0]._pool.device)
    open_ended = [each for each in caches if each._asked is None or each._asked < 1]
    for each in caches:
        if each not in open_ended:
            assert each._asked is not None
            each._num_blocks = max(1, int(each._asked) // each._pool.block)
    taken = sum(each._num_blocks * each._pool.block_bytes for each in caches)
    if open_ended:
        free = max(0, free_bytes(open_ended[0]._pool.device) - promised - taken)
        together = sum(each._pool.block_bytes for each in open_ended)
        for each in open_ended:
            share = SHARE if each._asked is None else float(each._asked)
            each._num_blocks = max(1, min(int(share * free / together), each.wanted()))
    for each in caches:
        pool, blocks = each._pool, each._num_blocks
        tell_room(pool.device, each.name, blocks * pool.block, blocks * pool.block_bytes)
