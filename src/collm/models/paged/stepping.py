"""Passes of a network as graphs, one for each number of tokens: one launch and one wait a pass."""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from collm.models.attention import Row
from collm.models.backbone import project
from collm.models.head import DeferralHead
from collm.models.laws import Asked
from collm.models.openings import Openings
from collm.models.paged import plan as planned
from collm.models.paged.capture import Capture
from collm.models.paged.graphs import BUCKETS, Bucket, Graphs, size_of
from collm.models.paged.lost import is_lost
from collm.models.paged.plan import CHUNK, CUT, DRAW, HEAD, IDS, LINES, OPENS, POSITIONS, START, WHERE, Plan
from collm.models.paged.pool import NARROW, PagedPool
from collm.models.paged.telling import WORD, OpenTelling, Telling, Told, columns
from collm.models.paged.ways import Ways
from collm.noise import key_of
from collm.values import Draw, made_of

_log = logging.getLogger(__name__)

MOVING = (POSITIONS, WHERE, START, DRAW + 3)
"""Lines of what moves with a token; the last one, its position in the completion."""


class Place(NamedTuple):
    """What a row of a pass reads, one token, and how it chooses the next one."""

    slot: int
    start: int
    token_id: int
    draw: Draw
    position: int
    """Of the token that is chosen, in the completion."""


@dataclass(slots=True)
class Counts:
    """What passes did, for tests and `collm bench`: by bucket how many, uploads, downloads; how many began before they
    were asked for, and how many of these were."""

    passes: dict[int, int] = field(default_factory=dict)
    foreseen: int = 0
    taken: int = 0
    launches: int = 0
    uploads: int = 0
    downloads: int = 0
    waits: int = 0


class Stepper:
    """The passes that decode: those of up to 512 tokens that ask for tokens, entropies and gates alone.

    A graph (`Graphs`) is captured when its bucket is first met, or by `warm_up`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        head: DeferralHead | None,
        vocab_size: int,
        pool: PagedPool,
        capture: Capture,
        telling: Telling,
        ways: Ways,
        name: str,
    ) -> None:
        self._lm, self._head, self._vocab_size = lm, head, vocab_size
        self._pool, self._capture, self._telling, self._name = pool, capture, telling, name
        self._graphs = Graphs(lm, pool, capture, ways, name)
        self._last: tuple[Bucket, NDArray[np.int32]] | None = None
        """Of the last pass, with the lines of its tokens."""
        self._steps: tuple[tuple[int, ...], tuple[Draw, ...], int] | None = None
        """Its rows, if each had one token, and the state of the blocks."""
        self._unit = math.gcd(pool.block, CHUNK)
        self._foreseen: list[Place] | None = None
        """The rows of a pass that runs, which nobody has asked for yet."""
        self._in_vain = False
        """A pass may still run whose numbers nobody will ask for."""
        self.counts = Counts()

    @property
    def block(self) -> int:
        """Positions of a block of the storage."""
        return self._pool.block

    @property
    def buckets(self) -> tuple[int, ...]:
        """Those that are captured."""
        return tuple(sorted(self._graphs.captured))

    @property
    def graph_bytes(self) -> int:
        """Memory that they take."""
        return self._capture.num_bytes

    def graph(self, size: int) -> Bucket | None:
        """That of a bucket, if it is captured."""
        return self._graphs.captured.get(size)

    def compile(self) -> None:
        """Compile the kernels of all passes, several at a time, rather than one by one when they are first needed."""
        compiling = self._capture.compiling()
        if compiling is None:
            return
        try:
            with compiling:
                # Passes that read have larger tiles, whose kernels are compiled for themselves.
                for size in (NARROW, NARROW + 1):
                    numbers = np.empty(planned.size(size), dtype=np.int32)
                    planned.fill_empty(numbers, self._pool.blocks)
                    uploaded = torch.from_numpy(numbers).to(self._capture.device)
                    self.work(Plan(uploaded, size, self._pool.tile(size), planned.num_items(size)))
        except Exception as error:
            if is_lost(error):
                raise
            _log.info("%s: kernels are compiled one by one", self._name, exc_info=error)

    def warm_up(self, largest: int = BUCKETS[-1]) -> float:
        """Capture all graphs of up to so many tokens, large ones first, whose memory the others then share; returns
        the seconds that it took."""
        began = perf_counter()
        self._graphs.warm_up(self, largest)
        return perf_counter() - began

    def measured(self, repeats: int = 3) -> list[tuple[int, float]]:
        """Seconds of a replay of each graph, over padding, for the fewest and the most tokens that it serves: the
        shortest of some. They do not fall with the tokens."""
        self.void()
        self._steps = None
        found: list[tuple[int, float]] = []
        for size, bucket in sorted(self._graphs.captured.items()):
            planned.fill_empty(bucket.into, self._pool.blocks)
            times = []
            for _ in range(repeats):
                began = perf_counter()
                bucket.replay()
                self._capture.wait()
                times.append(perf_counter() - began)
            fewest, before = (found[-1][0] + 1, found[-1][1]) if found else (1, 0.0)
            found += [(tokens, max(min(times), before)) for tokens in sorted({fewest, size})]
        return found

    def takes(self, num_tokens: int, asked: Asked) -> bool:
        """Whether it answers such a pass."""
        plain = asked.given is None and not asked.num_top and not asked.law
        return plain and num_tokens <= BUCKETS[-1] and (asked.cuts is None or self._shares_chunks)

    @property
    def columns(self) -> int:
        """Of what a pass tells of a token."""
        return columns(self._head) + self._shares_chunks

    @property
    def _shares_chunks(self) -> bool:
        return isinstance(self._telling, OpenTelling)

    def share_chunks(self, openings: Openings) -> None:
        """From now on it answers what is asked behind bytes (`Query.last_bytes`), too. Graphs are captured anew."""
        telling = self._telling.telling if isinstance(self._telling, OpenTelling) else self._telling
        self._telling = OpenTelling(telling, openings.to(self._capture.device))
        self._graphs.forget()

    def step(self, rows: Sequence[Row], token_ids: Sequence[int], wanted: Sequence[int], asked: Asked) -> Told:
        """What one pass tells of each of its tokens. See `start`."""
        return self.start(rows, token_ids, wanted, asked) or self.told()

    def start(self, rows: Sequence[Row], token_ids: Sequence[int], wanted: Sequence[int], asked: Asked) -> Told | None:
        """Start a pass, for which `told` waits; or what it tells, if it has run already. One that was foreseen and has
        not been taken is forgotten.

        Args:
            rows, token_ids: as `PagedPool.forward`.
            wanted: the tokens behind which something is asked.
        """
        self._free()
        self._steps = None
        count = len(token_ids)
        bucket = self._graphs.of(size_of(count), self)
        counts = self.counts
        size = count if bucket is None else bucket.size
        if bucket is None:
            host = self._capture.host(planned.size(size))
            numbers: NDArray[np.int32] = host.numpy()
        else:
            numbers = bucket.into
        tile = self._pool.tile(size)
        items = self._pool.fill(numbers, rows, token_ids, tile)
        lines = numbers[HEAD:].reshape(LINES, -1)
        if asked.draws.rows:
            _write_draws(lines, wanted, asked)
        if asked.cuts is not None:
            cuts = np.array(asked.cuts, dtype=np.int32).reshape(-1, 2)
            lines[CUT, wanted], lines[OPENS, wanted] = cuts[:, 0] + 1, cuts[:, 1]
        if bucket is not None:
            self._last = bucket, lines[:, :count]
            self._replay(bucket)
            return None
        self._last = None
        device = host.to(self._capture.device, non_blocking=True)
        out = self.work(Plan(device, size, tile, items)).cpu().numpy()
        counts.uploads += 1
        counts.downloads += 1
        counts.waits += 1
        return Told(out, self._head is not None, self._shares_chunks)

    def start_steps(
        self,
        slots: tuple[int, ...],
        starts: Sequence[int],
        token_ids: Sequence[int],
        draws: tuple[Draw, ...],
        positions: Sequence[int],
    ) -> Told | None:
        """`start` of a pass of one token of each row (`Place`). Where the last one was of the same rows, and each is in
        the same block and chunk as then, its numbers are changed and not written anew."""
        same = slots, draws, self._pool.blocks.changes
        if self._last is not None and self._steps == same:
            bucket, lines = self._last
            before, now = lines[POSITIONS], np.array(starts, dtype=np.int32)
            if bucket is self._graphs.of(bucket.size, self) and not (before // self._unit != now // self._unit).any():
                self._free()
                self._renumber(lines, token_ids, now - before)
                lines[DRAW + 3] = positions
                self._replay(bucket)
                return None
        rows, asked = made_of(Row, slots, starts, repeat(1)), Asked.drawn(draws, positions)
        told = self.start(rows, token_ids, range(len(rows)), asked)
        self._steps = slots, draws, self._pool.blocks.changes
        return told

    def _free(self) -> None:
        """The numbers of a pass may be written."""
        self.void()
        if self._in_vain:
            self._in_vain = False
            self._capture.wait()  # it may still be reading its numbers

    def foresee(self, places: Sequence[Place]) -> None:
        """Start a pass of one token of each row that will probably be asked for (`take`); not without a graph."""
        count = len(places)
        if count > BUCKETS[-1] or size_of(count) not in self._graphs.captured:
            return
        if self.start_steps(*zip(*places, strict=True)) is None:
            self._foreseen = list(places)
            self.counts.foreseen += 1

    def void(self) -> None:
        """What was foreseen is not asked for: texts have changed since."""
        self._in_vain |= self._foreseen is not None
        self._foreseen = None

    def take(self, places: list[Place]) -> tuple[list[Place], list[int]] | None:
        """The rows of the pass that was foreseen, and which of them these are; None if it is not theirs."""
        foreseen = self._foreseen
        if foreseen is None:
            return None
        at = {place.slot: n for n, place in enumerate(foreseen)}
        found = [at.get(place.slot, -1) for place in places]
        if -1 in found or [foreseen[n] for n in found] != places:
            return None
        self._foreseen = None
        self.counts.taken += 1
        return foreseen, found

    def move(self, moving: NDArray[np.int32], token_ids: NDArray[np.int32]) -> None:
        """Start the last pass, of one token of each row, once more over other tokens, those of some rows (`moving`, 1
        or 0) one position further. None of them comes into another block or chunk by that. `told` waits for it."""
        assert self._last is not None
        bucket, lines = self._last
        self._renumber(lines, token_ids, moving)
        self._replay(bucket)

    def _renumber(
        self, lines: NDArray[np.int32], token_ids: NDArray[np.int32] | Sequence[int], moved: NDArray[np.int32]
    ) -> None:
        lines[IDS] = token_ids
        for which in MOVING:  # one by one: numpy copies what is chosen by a list
            line = lines[which]
            line += moved

    def _replay(self, bucket: Bucket) -> None:
        bucket.replay()
        counts = self.counts
        counts.launches += 1
        counts.uploads += 1
        counts.passes[bucket.size] = counts.passes.get(bucket.size, 0) + 1

    def told(self) -> Told:
        """What the pass tells that was started last."""
        assert self._last is not None
        bucket, lines = self._last
        self._capture.wait()
        self.counts.waits += 1
        self.counts.downloads += 1
        return Told(bucket.out[: lines.shape[1]].copy(), self._head is not None, self._shares_chunks)

    def wait(self) -> None:
        """Until nothing runs any more."""
        self._capture.wait()

    def work(self, plan: Plan) -> Tensor:
        """What a pass tells of each of its tokens, `[T, columns]`; see `Telling.tell`."""
        hidden = self._pool.run(plan)
        logits = project(self._lm, hidden)
        return self._telling.tell(logits, hidden, self._head, plan, self._vocab_size)


def _write_draws(lines: NDArray[np.int32], wanted: Sequence[int], asked: Asked) -> None:
    for row in asked.draws.rows:
        token, (how, position) = wanted[row], asked.how[row]
        if how.temperature:
            low, high = key_of(how.seed)
            floats = struct.unpack("ii", struct.pack("ff", how.temperature, how.top_p))
            words = (low, high, how.sample & WORD, position & WORD)
            lines[DRAW : DRAW + 4, token] = np.array(words, dtype=np.uint32).view(np.int32)
            lines[DRAW + 4 :, token] = how.top_k, *floats
