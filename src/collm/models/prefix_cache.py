"""Texts in the slots of a KV pool: who sits where, what is copied instead of computed, and how much may be stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from collm.models.kv_pool import KVPool
from collm.models.slots import WORTH_SHARING, SlotTable, common_prefix
from collm.types import Answer, Query

PASS_TOKENS = 1024
"""Tokens of one forward pass at most; what is longer goes through piece by piece, so that memory stays bounded."""
POSITION_STEP = 64
"""Positions by which the pool grows, at least; it also grows by a quarter."""


@dataclass(slots=True, eq=False)
class Job:
    """One query on its way: `done` of its tokens are stored in `slot`. `after`: a job that shares more with it."""

    query: Query
    slot: int
    done: int = 0
    new: bool = True
    after: Job | None = None
    answers: list[Answer] = field(default_factory=list)
    broken: bool = False

    @property
    def missing(self) -> int:
        return len(self.query.token_ids) - self.done

    @property
    def reusable(self) -> int:
        """The last positions are computed even where their keys are there: their hidden states are not."""
        return len(self.query.token_ids) - self.query.num_last


class PrefixCache:
    """At most `num_slots` texts; slots x positions at most `max_tokens`, if given."""

    def __init__(self, pool: KVPool, num_slots: int, max_tokens: int | None) -> None:
        self.pool = pool
        self.table = SlotTable()
        self.num_slots, self.max_tokens = num_slots, max_tokens

    def fits(self, num_texts: int, length: int) -> bool:
        """Whether so many texts of at most so many tokens can be held at once."""
        return num_texts <= self.num_slots and (self.max_tokens is None or num_texts * length <= self.max_tokens)

    def batches(self, queries: Sequence[Query]) -> Iterator[list[Query]]:
        """`queries`, in order, as many at a time as fit. Each of them fits alone."""
        batch: list[Query] = []
        for query in queries:
            if not self.fits(len(batch) + 1, max(len(each.token_ids) for each in [*batch, query])):
                yield batch
                batch = []
            batch.append(query)
        if batch:
            yield batch

    def forget(self) -> None:
        """Give up all texts and their memory."""
        self.pool.free()
        self.table = SlotTable()

    def jobs(self, queries: Sequence[Query]) -> list[Job]:
        """A slot of its own for each query, whose batch fits. Jobs that are not new begin where their slot ends."""
        texts = [query.token_ids for query in queries]
        matched = self._make_room(self.table.match(texts), len(texts), max(map(len, texts)))
        jobs, taken = [], set(matched.values())
        for i, query in enumerate(queries):
            if i in matched:
                jobs.append(Job(query, matched[i], new=False))
                self._keep_own(jobs[i])
            else:
                slot = self.table.open(len(query.token_ids) - query.num_last + 1, taken)
                taken.add(slot)
                jobs.append(Job(query, slot))
        self.table.touch(taken)
        new = [job for job in jobs if job.new]
        for i, job in enumerate(new):
            _, stored = self.table.longest_prefix(job.query.token_ids)
            shared = [common_prefix(other.query.token_ids, job.query.token_ids) for other in new[:i]]
            best = max(shared, default=0)
            if min(best, job.reusable) - stored >= WORTH_SHARING:
                job.after = new[shared.index(best)]
        return jobs

    def share(self, job: Job) -> None:
        """Give a new job what any slot holds of its beginning, by a copy."""
        token_ids = job.query.token_ids
        self._keep_own(job)
        source, shared = self.table.longest_prefix(token_ids)
        shared = min(shared, job.reusable)
        if shared - job.done >= WORTH_SHARING:
            # A slot never claims more than it holds, whatever may interrupt this.
            self.pool.copy(source, job.slot, shared)
            self.hold(job, shared)

    def hold(self, job: Job, done: int) -> None:
        """The first `done` tokens of a job are stored now."""
        job.done = done
        self.table.slots[job.slot].held = job.query.token_ids[:done]

    def disown(self, job: Job) -> None:
        """No other text may begin with what a job has stored."""
        self.table.slots[job.slot].held = ()

    def clear(self, job: Job) -> None:
        self.disown(job)
        self.pool.clear(job.slot)

    def _keep_own(self, job: Job) -> None:
        slot = self.table.slots[job.slot]
        job.done = min(common_prefix(slot.held, job.query.token_ids), job.reusable)
        if job.done < len(slot.held):
            slot.held = slot.held[: job.done]

    def _make_room(self, matched: dict[int, int], num_texts: int, length: int) -> dict[int, int]:
        """Slots and positions for a batch. Returns `matched` as the slots are numbered now."""
        table, pool = self.table, self.pool
        new = num_texts - len(matched)
        empty = sum(not slot.held for slot in table.slots)
        if length <= pool.num_positions and (new <= empty or len(table.slots) == self.num_slots):
            return matched
        keep = list(matched.values())
        positions = length
        for number in table.by_use():
            longest = max(positions, len(table.slots[number].held))
            if number not in keep and self.fits(len(keep) + new + 1, longest):
                keep.append(number)
                positions = longest
        slots = len(keep) + new
        if slots > pool.num_slots or positions > pool.num_positions:
            keep.sort()
            self._resize(keep, *self._generous(slots, positions))
            return {i: keep.index(number) for i, number in matched.items()}
        return matched

    def _generous(self, slots: int, positions: int) -> tuple[int, int]:
        """Slots and positions to allocate where so many are needed: growing one by one would copy all each time."""
        have_slots, have_positions = self.pool.num_slots, self.pool.num_positions
        more_slots = min(max(slots, 3 * have_slots // 2), self.num_slots) if slots > have_slots else have_slots
        more_positions = have_positions
        if positions > have_positions:
            more_positions = -(-max(positions, have_positions * 5 // 4) // POSITION_STEP) * POSITION_STEP
        if self.max_tokens is None or more_slots * more_positions <= self.max_tokens:
            return more_slots, more_positions
        return slots, min(more_positions, max(positions, self.max_tokens // slots))

    def _resize(self, keep: Sequence[int], num_slots: int, num_positions: int) -> None:
        try:
            self.pool.resize(keep, num_slots, num_positions)
        except BaseException:  # out of memory, or interrupted, between two layers
            self.forget()
            raise
        self.table.resize(keep, num_slots, num_positions)


def waves(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in the order in which they can copy from one another."""
    done: set[int] = set()
    waiting = list(jobs)
    while waiting:
        ready = [job for job in waiting if job.after is None or id(job.after) in done]
        yield ready
        done.update(map(id, ready))
        waiting = [job for job in waiting if id(job) not in done]


def passes(jobs: Sequence[Job]) -> Iterator[list[tuple[Job, int]]]:
    """Pieces `(job, end)` for one forward pass after the other: the short ones first, in as few passes as there can be.

    The caller has computed a pass (`Job.done`) when it asks for the next.
    """
    waiting = sorted(jobs, key=lambda job: job.missing)
    while waiting:
        pieces, room = [], PASS_TOKENS
        for job in waiting:
            width = min(job.missing, room)
            if width:
                pieces.append((job, job.done + width))
                room -= width
        yield pieces
        waiting = [job for job in waiting if job.missing]
