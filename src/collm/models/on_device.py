"""The device that a network's passes are launched on, and what is said when it is lost to the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from collm.errors import CollmError
from collm.models.devices import own_stream
from collm.models.paged.lost import is_lost


class OnDevice:
    """Where the passes of a model run: on the usual stream of a device, which others use too, or one of their own."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self._name = name
        self._stream: torch.cuda.Stream | None = None

    def __str__(self) -> str:
        return str(self.device) if self._stream is None else f"{self.device}, stream of {self._name}"

    def current(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device, whatever their tensors lie on."""
        if self._stream is not None:
            return torch.cuda.stream(self._stream)
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def overlap(self) -> None:
        """On a stream of their own from now on."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # weights may still be on their way, on another stream
            self._stream = own_stream(self, self.device)

    def raise_if_lost(self, error: Exception) -> None:
        """Called where a pass has failed.

        Raises:
            CollmError: the device is lost.
        """
        if is_lost(error):
            reason = str(error).partition("\n")[0]
            raise CollmError(f"{self._name}: {self.device} failed ({reason}); start the process anew") from error

    @contextmanager
    def loss_told(self) -> Iterator[None]:
        """The same of what is done inside. For each pass a context manager would cost too much."""
        try:
            yield
        except Exception as error:
            self.raise_if_lost(error)
            raise
