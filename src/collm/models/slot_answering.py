"""Answers by passes over the slots of a pool: what they hold is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from collm.models.attention import Row
from collm.models.bounds import Bounds
from collm.models.laws import Asked, Laws
from collm.models.openings import Openings
from collm.models.paged.cache import PagedCache
from collm.models.paged.stepping import Stepper
from collm.models.paged.writing import are_steps, write
from collm.models.prefix_cache import Job, PrefixCache, passes
from collm.types import ForwardPass
from collm.values import Chosen, Fault, KeepOn, Query, Replies, Reply, Tell


class SlotAnswering:
    """The answers of a network whose texts have slots. Whoever calls has the network.

    Args:
        stepper: what runs passes as graphs, where there are any.
        ends: tokens that end a text.
        on_pass: called after every forward pass.
    """

    def __init__(
        self,
        laws: Laws,
        bounds: Bounds,
        cache: PrefixCache,
        stepper: Stepper | None,
        ends: frozenset[int],
        on_pass: Callable[[ForwardPass], None] | None,
    ) -> None:
        self.laws = laws
        self.on_pass = on_pass
        self._bounds, self._cache, self._stepper, self._ends = bounds, cache, stepper, ends

    def share_chunks(self, openings: Openings) -> None:
        """See `LanguageModel.share_chunks`."""
        self.laws = replace(self.laws, openings=openings)
        if self._stepper is not None:
            self._stepper.share_chunks(openings)

    def answers(
        self,
        queries: Sequence[Query],
        keep_on: KeepOn | None = None,
        tell: Tell | None = None,
        chosen: Chosen | None = None,
    ) -> Replies:
        """See `LanguageModel.write_on`."""
        try:
            jobs = self._cache.usual_jobs(queries, self._bounds.longest) if queries else None
            known = self._bounds.known_tokens
            if jobs and max([max(job.query.view.token_ids[job.done : job.query.length]) for job in jobs]) >= known:
                jobs = None
            if jobs is not None:
                if self._stepper is not None and isinstance(self._cache, PagedCache) and are_steps(jobs):
                    fault = self._bounds.no_numbers
                    write(self._stepper, self._cache, jobs, keep_on, tell, chosen, self._ends, fault, self.on_pass)
                elif self._pass([(job, job.query.length) for job in jobs], chosen):
                    return [self._bounds.unspoilt(job.query, job.replies, self._read) for job in jobs]
                return [job.replies for job in jobs]
        finally:
            if self._stepper is not None:
                self._stepper.void()
        return self._bounds.answered(queries, self._served)

    def _served(self, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        """Any queries, each of which fits alone."""
        for query, replies in zip(queries, self._read(queries), strict=True):
            yield self._bounds.unspoilt(query, replies, self._read)

    def _read(self, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        for batch in self._cache.batches(queries):
            jobs = self._cache.jobs(batch)
            for wave in self._cache.waves(jobs):
                for job in wave:
                    # What is stored has been looked at before.
                    unknown = self._bounds.unknown(job.query, job.done)
                    if unknown:
                        job.replies, job.done = unknown, job.query.length
                for pieces in passes(wave):
                    self._pass(pieces)
            yield from (job.replies for job in jobs)

    def _pass(self, pieces: Sequence[tuple[Job, int]], chosen: Chosen | None = None) -> bool:
        """One forward pass for the tokens of each job from `done` to `end`; `chosen` as in `LanguageModel.write_on`.
        Whether some are not numbers."""
        began = perf_counter()
        if self._stepper is None and len(pieces) > 1:  # blocks are read one by one, in any order
            pieces = sorted(pieces, key=lambda piece: (piece[1] - piece[0].done, piece[0].slot))
        rows: list[Row] = []
        token_ids: list[int] = []
        wanted: list[int] = []
        prefixes: list[tuple[Query, int, int]] = []
        for job, end in pieces:
            query, done = job.query, job.done
            rows.append(Row(job.slot, done, end - done))
            opening = query.length - query.num_last
            first = max(opening, done)
            if first < end:
                start = len(token_ids) + first - done
                wanted += range(start, start + end - first)
                prefixes.append((query, first - opening, end - opening))
            token_ids += query.view.token_ids[done:end]
        asked = Asked.of(prefixes)
        try:
            if self._stepper is not None and self._stepper.takes(len(token_ids), asked):
                told = self._stepper.step(rows, token_ids, wanted, asked)
                if chosen is not None:
                    tokens = iter(told.tokens[wanted].tolist())
                    chosen([(query, list(islice(tokens, j - i))) for query, i, j in prefixes])
                found = self._bounds.checked(told.answers(wanted), prefixes)
                bad = None if told.all_numbers else told.bad
            else:
                found, bad = self._eager(rows, token_ids, wanted, prefixes, asked)
        except BaseException:
            for job, _ in pieces:
                self._cache.clear(job)
            raise
        replies = list(found)
        broken = Fault in map(type, replies)
        at, start, spoilt = 0, 0, False
        for (job, end), row in zip(pieces, rows, strict=True):
            number = end - max(job.first, job.done)
            self._cache.hold(job, end)
            if number > 0:
                new = replies[at : at + number]
                at += number
                job.replies += new
                job.broken |= broken and Fault in map(type, new)
            if bad is not None:
                # Also behind what nobody asks about: others would share it, and masks let it through.
                job.broken |= bool(bad[start : start + row.width].any())
            start += row.width
            if job.broken:
                spoilt = True
                self._cache.clear(job)
                # What is still to be read of it would be read behind nothing.
                job.replies += [self._bounds.no_numbers(end - 1)] * (max(1, job.query.num_last) - len(job.replies))
                job.done = job.query.length
        if self.on_pass is not None:
            longest, widest = max([row.end for row in rows]), max([row.width for row in rows])
            self.on_pass(ForwardPass(len(rows), widest, len(token_ids), longest, perf_counter() - began))
        return spoilt

    def _eager(
        self,
        rows: Sequence[Row],
        token_ids: Sequence[int],
        wanted: Sequence[int],
        prefixes: Sequence[tuple[Query, int, int]],
        asked: Asked,
    ) -> tuple[Iterator[Reply], NDArray[np.bool_] | None]:
        """The answers behind the `wanted` tokens of a pass, and which of all its tokens are no numbers, if some others
        are none."""
        numbers = asked.numbers
        hidden, packed = self._cache.pool.forward(rows, token_ids, [*numbers, *wanted])
        packed, at = packed.split([len(numbers), len(wanted)])
        all_asked = len(wanted) == len(token_ids)
        read = hidden if all_asked else hidden[at.to(hidden.device)]
        found = self._bounds.checked(self.laws.answers(read, asked, packed), prefixes) if wanted else iter(())
        if all_asked:
            return found, None
        bad = hidden.isnan().any(dim=-1)
        return found, bad.cpu().numpy() if bad.any() else None
