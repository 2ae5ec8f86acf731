"""The graphs of a network's passes: one for each of some numbers of tokens, captured when it is first met."""

from __future__ import annotations

import gc
import logging
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from collm.models.paged import plan as planned
from collm.models.paged.cache import left_bytes
from collm.models.paged.capture import Capture, Work
from collm.models.paged.experts import computed_by
from collm.models.paged.lost import is_lost
from collm.models.paged.plan import Plan
from collm.models.paged.pool import NARROW, PagedPool
from collm.models.paged.ways import Way, Ways

_log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, NARROW, 320, 384, 512)
"""Numbers of tokens for which there are graphs; a pass takes the next larger one."""
SHARE = 0.5
"""Of the memory that is left when a network's first graph is captured, by its storage and by that of the device's other
networks, reserved or not: what its graphs may take. The rest is for reading prompts and for other networks' graphs."""


@dataclass(slots=True)
class Bucket:
    """The fixed buffers of passes of up to `size` tokens, and what replays them. A graph knows addresses and holds
    nothing: `plan`, which it uploads `into`, must live as long as it does."""

    size: int
    into: NDArray[np.int32]
    out: NDArray[np.int32]
    replay: Work
    plan: Plan


class Recorded(Protocol):
    """Whose passes are captured. It owns the graphs, which must not hold it: memory that hangs in a circle is not freed
    when its model is dropped, but when Python happens to look for circles, which may be much later."""

    @property
    def columns(self) -> int:
        """Of what a pass tells of a token, as it is now."""
        ...

    def work(self, plan: Plan) -> Tensor:
        """What a pass does with a plan, and what it tells, `[size, columns]`."""
        ...


class Graphs:
    """Where memory does not suffice, or a network cannot be captured, passes run without: slower, never otherwise."""

    def __init__(self, lm: PreTrainedModel, pool: PagedPool, capture: Capture, ways: Ways, name: str) -> None:
        self._pool, self._capture, self._ways = pool, capture, ways
        self._name, self._config = name, lm.config
        self._refused: set[int] = set()
        self._lacking: list[int] = []
        """Sizes for which there was no memory, which nobody has been told yet."""
        self._most: int | None = None
        self._moves = pool.moves
        self.captured: dict[int, Bucket] = {}

    def forget(self) -> None:
        """Graphs know addresses: those that are captured are void."""
        self.captured, self._refused, self._most, self._moves = {}, set(), None, self._pool.moves

    @property
    def most(self) -> int:
        """Bytes that they may take together."""
        if self._most is None:
            self._most = int(SHARE * left_bytes(self._capture.device))
        return self._most

    def of(self, size: int, passes: Recorded) -> Bucket | None:
        """That of one of `BUCKETS`; None where passes of this size run without.

        Warns:
            UserWarning: it cannot be captured. Of a network that is said once, whatever its graphs; of lacking memory,
                once for some sizes, and then logged.
        """
        if self._moves != self._pool.moves:
            self.forget()
        bucket = self.captured.get(size)
        if bucket is None and size not in self._refused:
            bucket = self._tried(size, passes)
            self._tell_lacking()
        return bucket

    def warm_up(self, passes: Recorded, largest: int) -> None:
        """Capture all of up to so many tokens, large ones first, whose memory the others then share, and tell what
        they take."""
        if self._moves != self._pool.moves:
            self.forget()
        began = perf_counter()
        for size in reversed(BUCKETS):
            if size <= largest and size not in self.captured and size not in self._refused:
                self._tried(size, passes)
        self._tell_lacking()
        way = self._ways.best
        if self.captured and way is not None:
            _log.info(
                "%s: graphs of %s for passes of up to %d tokens take %.2f GB of at most %.1f; made%s in %.1f s",
                self._capture.device, self._name, max(self.captured), self._capture.num_bytes / 1e9, self.most / 1e9,
                " of compiled modules" if way.compiled else "", perf_counter() - began,
            )  # fmt: skip

    def _tell_lacking(self) -> None:
        if not self._lacking:
            return
        sizes = ", ".join(map(str, sorted(self._lacking)))
        self._lacking.clear()
        told = f"{self._name}: no memory for graphs of passes over {sizes} tokens"
        if self._ways.on_trial or self._ways.is_lack_told:
            _log.info("%s", told)
            return
        self._ways.is_lack_told = True
        warnings.warn(
            f"{told}; they run without, which is slower. A smaller max_cache_tokens leaves more", stacklevel=3
        )

    def _tried(self, size: int, passes: Recorded) -> Bucket | None:
        ways = self._ways
        while (way := ways.best) is not None:
            try:
                bucket = self._made(size, passes, way)
            except torch.OutOfMemoryError:
                self._refused.add(size)
                self._lacking.append(size)
                _make_room()
                return None
            except Exception as error:
                if is_lost(error):
                    raise
                _log.info("%s: capture failed by %s", self._name, way, exc_info=error)
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                ways.give_up(reason)
                if ways.best is None:
                    self._tell_refused(reason)
            else:
                self.captured[size] = bucket
                self._tell_uncompiled()
                return bucket
        self._refused.update(BUCKETS)
        self.captured.clear()
        return None

    def _tell_uncompiled(self) -> None:
        reason, self._ways.not_compiled = self._ways.not_compiled, None
        if reason is not None:
            warnings.warn(
                f"{self._name}: the modules of a {self._config.model_type} model cannot be compiled ({reason}); its "
                "graphs are made of them as they are",
                stacklevel=4,
            )

    def _tell_refused(self, reason: str) -> None:
        if self._ways.are_experts_fixed:
            reason += "; transformers has no way to compute its experts that can be"
        warnings.warn(
            f"{self._name}: passes of a {self._config.model_type} model cannot be captured as CUDA graphs ({reason}); "
            "they run without, which is slower",
            stacklevel=4,
        )

    def _made(self, size: int, passes: Recorded, way: Way) -> Bucket:
        began = perf_counter()
        into = self._capture.host(planned.size(size))
        out = self._capture.host(size, passes.columns)
        # Padding alone: no text is touched.
        planned.fill_empty(into.numpy(), self._pool.blocks)
        device = into.to(self._capture.device)
        plan = Plan(device, size, self._pool.tile(size), planned.num_items(size))

        def work() -> None:
            device.copy_(into, non_blocking=True)
            body = self._pool.recording() if way.compiled else nullcontext()
            with computed_by(self._config, way.experts), body:
                out.copy_(passes.work(plan), non_blocking=True)

        replay = self._capture.record(work, self.most)
        _log.debug("%s: graph of %d tokens captured in %.2f s", self._name, size, perf_counter() - began)
        return Bucket(size, into.numpy(), out.numpy(), replay, plan)


def size_of(num_tokens: int) -> int:
    """The size of the bucket of so many tokens."""
    return next(size for size in BUCKETS if size >= num_tokens)


def _make_room() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
