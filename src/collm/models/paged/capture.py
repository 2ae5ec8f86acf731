"""CUDA graphs behind a seam: work is recorded once and replayed by one launch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Capture(Protocol):
    """Where the passes of one network run."""

    @property
    def device(self) -> torch.device: ...

    def host(self, *shape: int) -> Tensor:
        """Int32 zeros on the host, from and to which copies need no waiting."""
        ...

    def record(self, work: Work) -> Work:
        """What replays `work`, which reads and writes fixed addresses alone.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice.
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
    """CUDA graphs of one device, which share their memory: no two of them run at the same time."""

    WARM_UPS = 2
    """Runs before the capture: they compile kernels and make the handles of libraries."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device.type, torch.cuda.current_device() if device.index is None else device.index)
        self._memory: Any = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def device(self) -> torch.device:
        return self._device

    def host(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, pin_memory=True)

    def record(self, work: Work) -> Work:
        with torch.cuda.device(self._device):
            now, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):
                for _ in range(self.WARM_UPS):
                    work()
            aside.synchronize()
            graph = torch.cuda.CUDAGraph()
            # Other threads use the device, too: what they do is no fault of this capture.
            with torch.cuda.graph(graph, pool=self._memory, stream=aside, capture_error_mode="thread_local"):
                work()
            self._memory = self._memory or graph.pool()
            return graph.replay

    def wait(self) -> None:
        # To ask for the current stream costs some ten microseconds; it seldom is another one.
        raw = torch._C._cuda_getCurrentRawStream(self._device.index)
        if self._stream is None or self._stream.cuda_stream != raw:
            self._stream = torch.cuda.current_stream(self._device)
        self._stream.synchronize()

    def compiling(self) -> AbstractContextManager[None]:
        from collm.models.paged.launching import compiled_ahead

        return compiled_ahead(self._device)


class FakeCapture:
    """Replays by doing the work again, where tensors lie: the plain twin, which counts.

    `fails`: is asked before a recording is made, and may raise.
    """

    def __init__(self, device: str = "cpu", fails: Callable[[], None] | None = None) -> None:
        self._device, self._fails = torch.device(device), fails
        self.recorded = self.replayed = self.waits = 0

    @property
    def device(self) -> torch.device:
        return self._device

    def host(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def record(self, work: Work) -> Work:
        if self._fails is not None:
            self._fails()
        work()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def wait(self) -> None:
        self.waits += 1

    def compiling(self) -> None:
        return None
