"""Texts in a `KVPool`, whose memory is a rectangle of slots and positions: when it grows, and for whom."""

from __future__ import annotations

from collections.abc import Sequence

from collm.models.kv_pool import KVPool
from collm.models.prefix_cache import Job, PrefixCache, Slot
from collm.values import Query

POSITION_STEP = 64
"""Positions by which the pool grows, at least; it also grows by a quarter."""


class SlotCache(PrefixCache):
    """Slots x positions at most `max_tokens`, if given; for the sake of ended texts the pool grows up to
    `spare_tokens`."""

    def __init__(self, pool: KVPool, num_slots: int, max_tokens: int | None, spare_tokens: int | None = None) -> None:
        super().__init__(pool, num_slots)
        self._pool, self._max_tokens, self._spare_tokens = pool, max_tokens, spare_tokens

    @property
    def max_tokens(self) -> int | None:
        return self._max_tokens

    def fits(self, lengths: Sequence[int]) -> bool:
        return self._fit(len(lengths), max(lengths, default=0))

    def _fit(self, num_texts: int, length: int) -> bool:
        return num_texts <= self.num_slots and (self._max_tokens is None or num_texts * length <= self._max_tokens)

    def _has_room(self, jobs: Sequence[Job], tokens: int) -> bool:
        return max([job.query.length for job in jobs]) <= self._pool.num_positions

    def _make_room(self, queries: Sequence[Query]) -> None:
        """Slots and positions for a batch."""
        length = max(query.length for query in queries)
        here = {self._places[query.view] for query in queries if query.view in self._places}
        others = [(n, slot) for n, slot in enumerate(self.slots) if n not in here]
        new = len(queries) - len(here)
        empty = sum(slot.view is None for _, slot in others)
        ended = sum(slot.ended for _, slot in others)
        more = len(self.slots) + new - empty
        full = more > self.num_slots or (self._spare_tokens is not None and more * length > self._spare_tokens)
        if length <= self._pool.num_positions and (new <= empty or (new <= ended and full)):
            return
        if length <= self._pool.num_positions and len(self.slots) >= self.num_slots:
            return  # texts that nobody has called ended make room
        keep, positions = sorted(here), length
        for n, slot in sorted(others, key=lambda other: (other[1].ended, -other[1].used)):
            longest = max(positions, slot.held)
            if slot.view is not None and self._fit(len(keep) + new + 1, longest):
                keep.append(n)
                positions = longest
        num_slots = len(keep) + new
        if num_slots > self._pool.num_slots or positions > self._pool.num_positions:
            self._resize(sorted(keep), *self._generous(num_slots, positions))

    def _generous(self, slots: int, positions: int) -> tuple[int, int]:
        """Slots and positions to allocate where so many are needed: growing one by one would copy all each time."""
        have_slots, have_positions = self._pool.num_slots, self._pool.num_positions
        more_slots = min(max(slots, 3 * have_slots // 2), self.num_slots) if slots > have_slots else have_slots
        more_positions = have_positions
        if positions > have_positions:
            more_positions = -(-max(positions, have_positions * 5 // 4) // POSITION_STEP) * POSITION_STEP
        if self._max_tokens is None or more_slots * more_positions <= self._max_tokens:
            return more_slots, more_positions
        return slots, min(more_positions, max(positions, self._max_tokens // slots))

    def _resize(self, keep: Sequence[int], num_slots: int, num_positions: int) -> None:
        try:
            self._pool.resize(keep, num_slots, num_positions)
        except BaseException:  # out of memory, or interrupted, between two layers
            self.forget()
            raise
        kept = [self.slots[n] for n in keep]
        for slot in kept:
            slot.held = min(slot.held, num_positions)
        self.slots = kept + [Slot() for _ in range(num_slots - len(kept))]
        self._places = {slot.view: n for n, slot in enumerate(self.slots) if slot.view is not None}
