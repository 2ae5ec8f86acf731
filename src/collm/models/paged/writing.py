"""Texts that write on by themselves: passes one after the other in which little changes, each taking the tokens that
the one before chose. What the host does for a token is a fraction of what it takes to be asked for one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import attrgetter
from time import perf_counter

import numpy as np

from collm.decoding.policies import Policy, defers
from collm.models.paged.cache import PagedCache
from collm.models.paged.graphs import BUCKETS
from collm.models.paged.plan import CHUNK
from collm.models.paged.stepping import Place, Stepper
from collm.models.paged.telling import Told
from collm.models.prefix_cache import Job
from collm.types import ForwardPass
from collm.values import Answer, Chosen, Fault, Foreseen, KeepOn, Tell, made_of
from collm.views import View

LONGEST = 64
"""Tokens that a text writes on by itself in one call at most."""


def are_steps(jobs: Sequence[Job]) -> bool:
    """Whether these are texts of each of which the next token is asked for, and nothing else."""
    if len(jobs) > BUCKETS[-1]:
        return False
    for job in jobs:
        query = job.query
        if query.num_last != 1 or query.length - job.done != 1 or query.given is not None:
            return False
        if query.num_top or query.law or query.last_bytes:
            return False
    return True


def foresee(stepper: Stepper, cache: PagedCache, coming: Sequence[Foreseen], longest: int | None) -> None:
    """Start a pass that goes on as texts probably will (`LanguageModel.foresee`), if all of them can.

    Args:
        longest: tokens that a text may have.
    """
    if slots := cache.cut_back(coming, longest):
        views, lengths, token_ids, draws = zip(*coming, strict=True)
        positions = [length + 1 - _before(view) for view, length in zip(views, lengths, strict=True)]
        # In the order of their slots, as often before.
        stepper.foresee(sorted(made_of(Place, slots, lengths, token_ids, draws, positions)))


def _before(view: View) -> int:
    """What comes before the positions of the completion."""
    return view.prompt_length - view.shift


def write(
    stepper: Stepper,
    cache: PagedCache,
    jobs: Sequence[Job],
    keep_on: KeepOn | None,
    tell: Tell | None,
    chosen: Chosen | None,
    ends: frozenset[int],
    fault: Callable[[int], Fault],
    passed: Callable[[ForwardPass], None] | None,
) -> None:
    """Answer jobs that `are_steps`, and let their texts write on as far as each may; see `LanguageModel.write_on`.

    Args:
        keep_on, tell, chosen: None: none may; nobody wants to be told.
        ends: tokens that end a text.
        fault: replied in place of an answer that is not a number, behind the token at this position.
        passed: is told of each pass.
    """
    going = [_Writer(at, job) for at, job in enumerate(jobs)]
    any_defers = any(writer.until is not None for writer in going)
    if keep_on is not None and not cache.room_ahead(jobs, [writer.left for writer in going]):
        keep_on = None
    try:
        passes = _Passes.begun(stepper, going)
        while going:
            began = perf_counter()
            told = passes.told()
            if chosen is not None:
                chosen([(writer.job.query, [int(told.tokens[writer.row])]) for writer in going])
            rows = [writer.row for writer in going]
            answers: Sequence[Answer | None] | None = None
            if keep_on is None:
                on = []
            elif not (any_defers and any(writer.may_defer for writer in going)) and told.all_numbers:
                # Nobody stops but at the end of his text, so that the next pass can start before this one is looked at.
                on = [writer for writer in going if writer.left]
            else:
                answers = told.answers(rows)
                on = [writer for writer, answer in zip(going, answers, strict=True) if writer.goes_on(answer, ends)]
            runs = keep_on is not None and keep_on(len(on), len(jobs) - len(on))
            if runs:
                passes.go_on(told, on)
                for writer in on:
                    writer.left -= 1
            looked_at = answers is not None
            if answers is None:
                answers = told.answers(rows)
            for writer, answer in zip(going, answers, strict=True):
                if answer is None:
                    writer.job.broken = True
                    writer.replies.append(fault(writer.length))
                else:
                    writer.replies.append(answer)
            if passed is not None:
                longest = max([writer.length for writer in going])
                passed(ForwardPass(len(going), 1, len(going), longest, perf_counter() - began))
            if not runs:
                break
            if tell is not None:
                tell([(writer.at, writer.replies[-1:]) for writer in going])
            going = on if looked_at else [writer for writer in on if not writer.has_ended(ends)]
        if not going:
            stepper.wait()  # a pass that runs in vain
    except BaseException:
        with suppress(Exception):  # a device that is lost says so again; what failed first is told
            stepper.wait()
        for job in jobs:
            cache.clear(job)
        raise
    cache.hold_written(jobs)


class _Writer:
    """One text, and what it may still do. `at`, `row`: its place among the queries, and in the passes; `position`: in
    the completion, of the token that its first pass chooses."""

    __slots__ = ("at", "draw", "job", "left", "passing", "position", "replies", "row", "until")

    def __init__(self, at: int, job: Job) -> None:
        query = job.query
        self.at, self.row, self.job, self.replies, self.draw = at, at, job, job.replies, query.draw
        self.position = job.done + 1 - _before(query.view)
        self.left, self.passing = 0, 0
        self.until: Policy | None = None
        leave = query.write_on
        if leave is not None:
            self.left, self.passing, self.until = min(leave.max_tokens, LONGEST), leave.passing, leave.until

    @property
    def may_defer(self) -> bool:
        return self.until is not None and self.passing < self.left

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self.job.done + len(self.replies)

    @property
    def place(self) -> Place:
        """Of its first pass."""
        job = self.job
        return Place(job.slot, job.done, job.query.view.token_ids[job.done], self.draw, self.position)

    def goes_on(self, answer: Answer | None, ends: frozenset[int]) -> bool:
        """Whether it is to write another token behind the one that is chosen here, which is asked once."""
        if answer is None or not self.left or answer.token_id in ends:
            return False
        until = self.until
        if until is not None and self.passing < self.left:
            self.passing -= defers(until, answer, self.draw, self.position + len(self.replies))
        return self.passing >= 0

    def has_ended(self, ends: frozenset[int]) -> bool:
        reply = self.replies[-1]
        return not isinstance(reply, Answer) or reply.token_id in ends


class _Passes:
    """The numbers of these passes. A text that has stopped stays where it is and is read there again, so that the
    others need not move."""

    def __init__(self, stepper: Stepper, places: Sequence[Place]) -> None:
        self._stepper = stepper
        self._slots, starts, token_ids, self._draws, positions = zip(*places, strict=True)
        self._starts = np.array(starts, dtype=np.int32)
        """Of the tokens that are read next."""
        self._tokens = np.array(token_ids, dtype=np.int32)
        self._moving, self._num_moving = np.ones(len(places), dtype=np.int32), len(places)
        self._ahead = np.array(positions) - self._starts
        """What is added to find the positions, in the completion, of the tokens that are chosen."""
        self._told: Told | None = None
        """Of a pass that has run at once, without a graph."""
        self._alike = 0
        """Passes whose numbers are those of the last one, moved on."""
        self._unit = math.gcd(stepper.block, CHUNK)

    @classmethod
    def begun(cls, stepper: Stepper, writers: list[_Writer]) -> _Passes:
        """The first one is on its way; it may have been foreseen. Writers stand in its order."""
        places = [writer.place for writer in writers]
        taken = stepper.take(places)
        if taken is None:
            passes = cls(stepper, places)
            passes.start()
            return passes
        places, rows = taken
        for writer, row in zip(writers, rows, strict=True):
            writer.row = row
        writers.sort(key=attrgetter("row"))
        passes = cls(stepper, places)
        passes.only(writers)
        passes.runs_alike()
        return passes

    def start(self) -> None:
        if self._alike:
            self._alike -= 1
            self._stepper.move(self._moving, self._tokens)
            return
        starts, positions = self._starts.tolist(), (self._starts + self._ahead).tolist()
        self._told = self._stepper.start_steps(self._slots, starts, self._tokens.tolist(), self._draws, positions)
        if self._told is None:
            self.runs_alike()

    def runs_alike(self) -> None:
        """How many passes may follow before a text comes into another block or chunk."""
        self._alike = int((self._unit - 1 - self._starts % self._unit)[self._moving > 0].min())

    def only(self, writers: Sequence[_Writer]) -> None:
        """These go on, nobody else."""
        if len(writers) < self._num_moving:
            self._num_moving = len(writers)
            self._moving[:] = 0
            self._moving[[writer.row for writer in writers]] = 1

    def told(self) -> Told:
        return self._told or self._stepper.told()

    def go_on(self, told: Told, writers: Sequence[_Writer]) -> None:
        """Another pass, in which the tokens are read that were chosen, of these texts."""
        self.only(writers)
        if self._num_moving == len(self._tokens):
            self._tokens[:] = told.tokens
        else:
            np.copyto(self._tokens, told.tokens, where=self._moving > 0)
        self._starts += self._moving
        self.start()
