"""CUDA graphs behind a seam: work is recorded once and replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from collm.models.devices import own_stream

Work = Callable[[], None]


class Capture(Protocol):
    """Where the passes of one network run."""

    @property
    def device(self) -> torch.device: ...

    def host(self, *shape: int) -> Tensor:
        """Int32 zeros on the host, from and to which copies need no waiting."""
        ...

    @property
    def num_bytes(self) -> int:
        """What all recordings that are alive take together: they share the memory of their intermediate results, and
        take of it what the largest needs. What the driver keeps of each is not in it."""
        ...

    def record(self, work: Work, most: int | None = None) -> Work:
        """What replays `work`, which reads and writes fixed addresses alone.

        Args:
            most: bytes that its intermediate results may take at a time.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice, or it takes more than that.
            Exception: the work cannot be recorded.
        """
        ...

    def wait(self) -> None:
        """Until all that was started is done."""
        ...

    def compiling(self) -> AbstractContextManager[None] | None:
        """While it holds, kernels are not launched but compiled; None where there are none to be compiled."""
        ...


class CudaCapture:
    """CUDA graphs of one network, which share their memory: no two of them run at the same time.

    They are recorded on one stream, which no other network's are. Products put what they need meanwhile (parts of
    sums, where few programs would compute a product) to a place that torch keeps for each stream, and graphs know
    it. With a stream for each recording the 33rd would have the place of the first: of another network, whose graphs
    may run at the same time (`LocalModel.overlap`), and with one of which newer versions of torch give the place up,
    when it is destroyed. And each stream's place takes 8 MB, on a Hopper GPU 32.

    What a recording needs is read from torch's peak of memory, which is that of the whole device: it is reset
    (`torch.cuda.reset_peak_memory_stats`), and what other threads take meanwhile is in it. So a recording is not
    refused before several runs have needed too much; the least of them counts.
    """

    WARM_UPS = 2
    """Runs before the capture: they compile kernels and make the handles of libraries."""
    RETRIES = 3
    """Runs that show whether it was another thread that took the memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self._memory: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._aside: torch.cuda.Stream | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []
        """For the same reason a graph that could not be recorded beside others lasts as long as they do."""

    @property
    def device(self) -> torch.device:
        return self._device

    def host(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

    @property
    def num_bytes(self) -> int:
        segments = [] if self._memory is None else torch.cuda.memory_snapshot()
        return sum(each["total_size"] for each in segments if tuple(each["segment_pool_id"]) == tuple(self._memory))

    def record(self, work: Work, most: int | None = None) -> Work:
        with torch.cuda.device(self._device):
            aside = self._aside = self._aside or own_stream(self, self._device)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(self.WARM_UPS - 1):
                    work()
                needed = self._peak(work)
                for _ in range(self.RETRIES):
                    if most is None or needed <= most:
                        break
                    needed = min(needed, self._peak(work))
            aside.synchronize()
            _require(needed, most)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads use the device, too: what they do is no fault of this capture.
                with torch.cuda.graph(graph, pool=self._memory, stream=aside, capture_error_mode="thread_local"):
                    work()
            except Exception:
                if self._memory is not None:
                    self._failed.append(graph)
                raise
            self._memory = self._memory or graph.pool()
            return graph.replay

    def _peak(self, work: Work) -> int:
        """Bytes that the device's memory grew by at most while it ran."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before

    def wait(self) -> None:
        # To ask for the current stream costs some ten microseconds; it seldom is another one.
        raw = torch._C._cuda_getCurrentRawStream(self._device.index)
        if self._stream is None or self._stream.cuda_stream != raw:
            self._stream = torch.cuda.current_stream(self._device)
        self._stream.synchronize()

    def compiling(self) -> AbstractContextManager[None]:
        from collm.models.paged.launching import compiled_ahead

        return compiled_ahead(self._device)


def _require(needed: int, most: int | None) -> None:
    if most is not None and needed > most:
        raise torch.OutOfMemoryError(f"{needed / 1e9:.1f} GB of intermediate results are more than {most / 1e9:.1f}")


class FakeCapture:
    """Replays by doing the work again, where tensors lie: the plain twin, which counts.

    `fails`: is asked before a recording is made, and may raise; `takes`: says the bytes that some work takes.
    """

    def __init__(
        self,
        device: str = "cpu",
        fails: Callable[[], None] | None = None,
        takes: Callable[[Work], int] | None = None,
    ) -> None:
        self._device, self._fails, self._takes = torch.device(device), fails, takes
        self.recorded = self.replayed = self.waits = self.num_bytes = 0

    @property
    def device(self) -> torch.device:
        return self._device

    def host(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def record(self, work: Work, most: int | None = None) -> Work:
        if self._fails is not None:
            self._fails()
        taken = 0 if self._takes is None else self._takes(work)
        _require(taken, most)
        work()
        self.num_bytes = max(self.num_bytes, taken)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def wait(self) -> None:
        self.waits += 1

    def compiling(self) -> None:
        return None
