"""A capture that watches, operator by operator, what a graph would record: what CUDA's would refuse fails here, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from collm.models.paged.capture import FakeCapture, Work
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.telling import TorchTelling

HOST_READS = frozenset(
    "_local_scalar_dense nonzero nonzero_static masked_select unique_consecutive _unique2 unique_dim bincount "
    "grouped_mm_fallback equal is_nonzero".split()
)
"""Operators for which the host waits: they read a value, or their results have a size that values decide."""


class HostRead(RuntimeError):
    """What CUDA says of it: operation not permitted when stream is capturing."""


class Watch(TorchDispatchMode):
    """Counts operators by name, and copies from and to the buffers of the host. The twins of kernels, each of which is
    one launch, are counted as that (`aside`); they may read what they like."""

    def __init__(self, buffers: list[Tensor], forbidden: frozenset[str]) -> None:
        super().__init__()
        self.operators = Counter[str]()
        self.uploads = self.downloads = 0
        self._buffers, self._forbidden, self._aside = buffers, forbidden, False

    @contextmanager
    def aside(self, kernel: str) -> Iterator[None]:
        self.operators[kernel] += 1
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._aside:
            name = func.overloadpacket.__name__
            if name in self._forbidden:
                raise HostRead(f"operation not permitted when stream is capturing: {name}")
            self.operators[name] += 1
            if name == "copy_":
                into, source = (any(each is buffer for buffer in self._buffers) for each in args[:2])
                # On a CPU the buffer is the copy on the device, too.
                self.uploads += source
                self.downloads += into and not source
        return func(*args, **(kwargs or {}))


class OutputBytes(TorchDispatchMode):
    """The largest tensor that some work makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and not any(_storage(found) == _storage(each) for each in args):
            self.largest = max(self.largest, found.nbytes)
        return found


def _storage(value: Any) -> int | None:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


class WatchedCapture(FakeCapture):
    """`watches`: what each recording saw; replays are not watched, which takes time."""

    def __init__(
        self, fails: Callable[[], None] | None = None, forbidden: frozenset[str] = HOST_READS, **more: Any
    ) -> None:
        super().__init__(fails=fails, **more)
        self.watches: list[Watch] = []
        self._forbidden = forbidden
        self._buffers: list[Tensor] = []
        self._watch: Watch | None = None
        self.outer: Watch | None = None
        """Watches what is done besides."""

    @contextmanager
    def besides(self) -> Iterator[Watch]:
        """What operators there are but for those of replays, each of which counts as one."""
        self.outer = Watch(self._buffers, frozenset())
        try:
            with self.outer:
                yield self.outer
        finally:
            self.outer = None

    def host(self, *shape: int) -> Tensor:
        self._buffers.append(super().host(*shape))
        return self._buffers[-1]

    def record(self, work: Work, most: int | None = None) -> Work:
        unwatched = True

        def watched() -> None:
            nonlocal unwatched
            if not unwatched or (self.outer is None and torch._C._len_torch_dispatch_stack()):
                work()
                return
            unwatched, self._watch = False, Watch(self._buffers, self._forbidden)
            try:
                with self._watch:
                    work()
                self.watches.append(self._watch)
            finally:
                self._watch = None

        replay = super().record(watched, most)

        def launched() -> None:
            with nullcontext() if self.outer is None else self.outer.aside("replay"):
                replay()

        return launched

    def kernel(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._watch is None else self._watch.aside(name)


class WatchedOps(TorchOps):
    def __init__(self, capture: WatchedCapture) -> None:
        self._capture = capture

    def enter(self, *args: Any) -> None:
        with self._capture.kernel("enter"):
            super().enter(*args)

    def store(self, *args: Any) -> None:
        with self._capture.kernel("store"):
            super().store(*args)

    def attend(self, *args: Any) -> Tensor:
        with self._capture.kernel("attend"):
            return super().attend(*args)


class WatchedTelling(TorchTelling):
    def __init__(self, capture: WatchedCapture) -> None:
        self._capture = capture

    def tell(self, *args: Any) -> Tensor:
        with self._capture.kernel("tell"):
            return super().tell(*args)


def watched(
    fails: Callable[[], None] | None = None, forbidden: frozenset[str] = HOST_READS, block: int = 8, **more: Any
) -> Machinery:
    """Twins of the kernels, behind a capture that watches."""
    capture = WatchedCapture(fails, forbidden, **more)
    return Machinery(WatchedOps(capture), WatchedTelling(capture), capture, block=block)
