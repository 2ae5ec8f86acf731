"""Texts in the slots of a KV pool: who sits where, what is copied instead of computed, and how much may be stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Protocol

from torch import Tensor

from collm.models.attention import Row
from collm.values import Query, Reply
from collm.views import View

PASS_TOKENS = 1024
"""Tokens of one forward pass at most; what is longer goes through piece by piece, so that memory stays bounded."""
GOES_ON = 0.9
"""Share of what an ended text left that a new one must begin with, to take over its slot instead of copying."""
UNSEATED = 64
"""Ended texts without a slot that are remembered."""
WORTH_SHARING = 16
"""Tokens of a common prefix that are worth a copy, or the wait until another text has computed them."""

_TOKEN = attrgetter("token_id")


@dataclass(slots=True, eq=False)
class Slot:
    """The first `held` tokens of `view`, as it was when it had been rewound `rewinds` times, are stored.

    `source`: a text that is read at the same time, and how much of its beginning is this one's, too. `reused`: tokens
    that were copied or taken over instead of computed. `ahead`: tokens stored behind the first so many, which the model
    wrote by itself; what of them the text takes over is held, too.
    """

    view: View | None = None
    held: int = 0
    rewinds: int = 0
    used: int = 0
    ended: bool = True
    source: tuple[View, int] | None = None
    reused: int = 0
    ahead: tuple[int, Sequence[int]] | None = None

    def valid(self, view: View) -> int:
        """Tokens of its text that are stored and still the text's own."""
        held = self.held
        if self.ahead is not None and self.ahead[0] == held:
            more = self.ahead[1]
            own = view.token_ids[held : held + len(more)]
            held += len(more) if own == more else _common(own, more, len(more))
        return held if self.rewinds == view.rewinds else min(held, view.valid_since(self.rewinds))

    def settle(self, view: View) -> None:
        """Hold what is valid, and share no more than that is still common."""
        if self.source is not None and self.rewinds != view.rewinds:
            other, shared = self.source
            self.source = other, min(shared, view.valid_since(self.rewinds))
        self.held, self.rewinds, self.ahead = self.valid(view), view.rewinds, None


@dataclass(slots=True, eq=False)
class Job:
    """One query on its way: the tokens from `done` on are still to be computed."""

    query: Query
    slot: int
    done: int
    replies: list[Reply] = field(default_factory=list)
    broken: bool = False

    @property
    def missing(self) -> int:
        return self.query.length - self.done

    @property
    def first(self) -> int:
        """Its last positions are computed even where their keys are there: their hidden states are not."""
        return self.query.length - self.query.num_last


class Pool(Protocol):
    """Where keys and values lie, by slot and position."""

    @property
    def num_bytes(self) -> int: ...

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of a slot, into another one."""
        ...

    def clear(self, slot: int) -> None:
        """Nothing of what a slot held can be read again."""
        ...

    def free(self) -> None:
        """Give all memory back."""
        ...

    def forward(self, rows: Sequence[Row], token_ids: Sequence[int], more: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Hidden states `[token, H]` of the tokens of all rows; `more` numbers that are needed on the device, too."""
        ...


class PrefixCache(ABC):
    """At most `num_slots` texts.

    A text has a slot from its first query on. What it shares with others is found then, once. When it has ended
    (`release`), its slot is given to others, the one used longest ago first, and a text that goes on where it ended
    takes it over. How much may be stored is the affair of those that know the storage: `SlotCache`, `PagedCache`.
    """

    def __init__(self, pool: Pool, num_slots: int) -> None:
        self.pool = pool
        self.num_slots = num_slots
        self.slots: list[Slot] = []
        self._places: dict[View, int] = {}
        self._ended: deque[View] = deque()
        self._clock = 0

    @property
    @abstractmethod
    def max_tokens(self) -> int | None:
        """What a text may have at most, alone."""

    @abstractmethod
    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether texts of so many tokens can be held at once."""

    def held(self, view: View) -> int:
        """Tokens of a text that are stored and still its own."""
        # Asked from another thread than the one that moves slots about.
        place, slots = self._places.get(view), self.slots
        if place is None or place >= len(slots):
            return 0
        slot = slots[place]
        return slot.valid(view) if slot.view is view else 0

    def reused(self, view: View) -> int:
        """Tokens of a text that were copied or taken over when it came. From any thread."""
        place, slots = self._places.get(view), self.slots
        if place is None or place >= len(slots) or slots[place].view is not view:
            return 0
        return slots[place].reused

    def release(self, view: View) -> None:
        """From any thread; it takes effect with the next pass."""
        # A text without a slot may be in the pass that runs now; few can be, and the others need not be remembered.
        if view in self._places or len(self._ended) < UNSEATED:
            self._ended.append(view)

    def batches(self, queries: Sequence[Query]) -> Iterator[list[Query]]:
        """`queries`, in order, as many at a time as fit. Each of them fits alone."""
        if len({id(query.view) for query in queries}) == len(queries) and self.fits([q.length for q in queries]):
            if queries:
                yield list(queries)
            return
        batch: list[Query] = []
        for query in queries:
            again = any(each.view is query.view for each in batch)
            if again or not self.fits([each.length for each in [*batch, query]]):
                yield batch
                batch = []
            batch.append(query)
        if batch:
            yield batch

    def forget(self) -> None:
        """Give up all texts and their memory."""
        self.pool.free()
        self.slots, self._places = [], {}

    def usual_jobs(self, queries: Sequence[Query], longest: int | None) -> list[Job] | None:
        """Jobs of a usual pass: each text has its slot, lacks little, and takes nothing from another one; None where
        it is not so simple. It finds what `batches`, `jobs` and `waves` would, in a fraction of the time.

        Args:
            longest: tokens that a text may have.
        """
        if self._ended and (late := self._settle_ended()):
            self._ended.extend(late)  # `jobs` knows what to do with them
            return None
        found: list[Job] = []
        places, slots, room = self._places, self.slots, PASS_TOKENS
        clock = self._clock = self._clock + 1
        for query in queries:
            view, length = query.view, query.length
            place = places.get(view)
            if place is None or (longest is not None and length > longest):
                return None
            slot = slots[place]
            if slot.source is not None or slot.used == clock:  # the same text twice
                return None
            if slot.rewinds != view.rewinds or slot.ahead is not None:
                slot.settle(view)
            slot.used, slot.ended = clock, False
            first = length - query.num_last
            done = slot.held if slot.held < first else first
            room -= length - done
            if room < 0 or done == length:
                return None
            found.append(Job(query, place, done))
        return found if self._has_room(found, PASS_TOKENS - room) else None

    def jobs(self, queries: Sequence[Query]) -> list[Job]:
        """A slot for each query, whose batch fits. No two queries of a batch are of one text."""
        late = self._settle_ended()
        self._clock += 1
        for query in queries:
            if query.view not in self._places:
                self._go_on(query.view)
        self._make_room(queries)
        found, known = [], self._places.keys() & {query.view for query in queries}
        busy = {self._places[view] for view in known}
        for query in queries:
            view = query.view
            if view not in known:
                busy.add(self._seat(view, busy))
            place = self._places[view]
            slot = self.slots[place]
            slot.settle(view)
            slot.used = self._clock
            slot.ended = view in late
            found.append(Job(query, place, min(slot.held, query.length - query.num_last)))
        return found

    def waves(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Jobs in the order in which they can copy from one another; what is there to copy has been copied."""
        waiting = list(jobs)
        while waiting:
            coming = {job.query.view for job in waiting if job.missing}
            ready = [job for job in waiting if not self._waits(job, coming)]
            if not ready:  # each waits for another: slots have changed hands since
                ready = waiting[:1]
                self.slots[ready[0].slot].source = None
            for job in ready:
                self._copy(job)
            yield ready
            chosen = set(map(id, ready))
            waiting = [job for job in waiting if id(job) not in chosen]

    def hold(self, job: Job, done: int) -> None:
        """The first `done` tokens of a job are stored now."""
        job.done = done
        slot = self.slots[job.slot]
        if slot.held < done:
            slot.held = done

    def hold_written(self, jobs: Sequence[Job]) -> None:
        """All of these jobs is stored now, and so are the tokens that the model wrote behind each, which are answered,
        but for the last one."""
        for job in jobs:
            length, replies = job.query.length, job.replies
            self.hold(job, length)
            if job.broken:
                self.clear(job)
            elif len(replies) > 1:
                self.slots[job.slot].ahead = length, list(map(_TOKEN, replies[job.query.num_last - 1 : -1]))

    def clear(self, job: Job) -> None:
        """Nothing of what a job has stored may be read again: NaN passes through attention masks."""
        self.slots[job.slot].held = 0
        self.pool.clear(job.slot)

    def _settle_ended(self) -> set[View]:
        """Mark the slots of ended texts. Returns those that have none: they may have ended while their pass waited."""
        without = set()
        while self._ended:
            view = self._ended.popleft()
            place = self._places.get(view)
            if place is None:
                without.add(view)
            else:
                self.slots[place].ended = True
        return without

    def _go_on(self, view: View) -> None:
        """A text that goes on where another one ended (a chat's next turn) takes over its slot."""
        ended = [(_shared(slot, view.token_ids), n) for n, slot in enumerate(self.slots) if slot.ended]
        shared, place = max(ended, default=(0, 0))
        if shared >= WORTH_SHARING and shared >= GOES_ON * self.slots[place].held:
            self._put(view, place, shared)

    def _seat(self, view: View, busy: set[int]) -> int:
        """Find a new text a slot, and whom it shares its beginning with."""
        shared, best = max(((_shared(slot, view.token_ids), n) for n, slot in enumerate(self.slots)), default=(0, -1))
        free = [n for n in range(len(self.slots)) if n not in busy]
        place = min(free, key=lambda n: (self.slots[n].view is not None, not self.slots[n].ended, self.slots[n].used))
        if place != best and shared >= WORTH_SHARING:
            self.pool.copy(best, place, shared)
        elif place != best:
            shared = 0
        slot = self._put(view, place, shared)
        for other in self.slots:
            # Another text that is being read now may come to hold more of it.
            if other.view is not None and not other.ended and other is not slot:
                more = _common(other.view.token_ids, view.token_ids, other.view.prompt_length)
                if more - slot.held >= WORTH_SHARING and more > (slot.source[1] if slot.source else 0):
                    slot.source = (other.view, more)
        return place

    def _put(self, view: View, place: int, held: int) -> Slot:
        old = self.slots[place].view
        if old is not None:
            del self._places[old]
        slot = self.slots[place] = Slot(view, held, view.rewinds, self._clock, ended=False, reused=held)
        self._places[view] = place
        return slot

    def _waits(self, job: Job, coming: set[View]) -> bool:
        source = self.slots[job.slot].source
        if source is None or source[0] not in coming or source[0] is job.query.view:
            return False
        return min(source[1], job.first) - job.done >= WORTH_SHARING and self.held(source[0]) < source[1]

    def _copy(self, job: Job) -> None:
        slot = self.slots[job.slot]
        if slot.source is None:
            return
        other, shared = slot.source
        there = min(self.held(other), shared)
        if other in self._places and min(there, job.first) - slot.held >= WORTH_SHARING:
            # A slot never claims more than it holds, whatever may interrupt this.
            self.pool.copy(self._places[other], job.slot, there)
            slot.held = slot.reused = there
            job.done = min(there, job.first)
        if other not in self._places or there >= shared:
            slot.source = None

    @abstractmethod
    def _has_room(self, jobs: Sequence[Job], tokens: int) -> bool:
        """Whether so many more tokens of some texts, which have their slots, fit without more ado."""

    @abstractmethod
    def _make_room(self, queries: Sequence[Query]) -> None:
        """Slots and positions for a batch."""


def _shared(slot: Slot, token_ids: Sequence[int]) -> int:
    """Tokens that a slot holds of the beginning of a new text."""
    if slot.view is None:
        return 0
    # Of a running text the prompt alone: its flow may be writing behind it at this moment.
    valid = slot.view.valid_since(slot.rewinds) if slot.ended else slot.view.prompt_length
    return _common(slot.view.token_ids, token_ids, min(slot.held, valid))


def _common(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """Length of the common beginning, at most `limit` (comparing slices is far quicker than tokens)."""
    high = min(limit, len(a), len(b))
    if a[:high] == b[:high]:
        return high
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def passes(jobs: Sequence[Job]) -> Iterator[list[tuple[Job, int]]]:
    """Pieces `(job, end)` for one forward pass after the other: the short ones first, in as few passes as there can be.

    The caller has computed a pass (`Job.done`) when it asks for the next.
    """
    waiting = sorted((job for job in jobs if job.missing), key=lambda job: job.missing)
    while waiting:
        pieces, room = [], PASS_TOKENS
        for job in waiting:
            width = min(job.missing, room)
            if width:
                pieces.append((job, job.done + width))
                room -= width
        yield pieces
        waiting = [job for job in waiting if job.missing]
