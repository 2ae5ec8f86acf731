"""Kernels are compiled together before they are launched; a stand-in for Triton's, since no GPU is at hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from collm.models.paged import launching


class Promised:
    """What stands for a kernel that is being compiled; in some versions of Triton it has nothing but this."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def result(self) -> Kernel:
        return self._kernel


class Kernel:
    def __init__(self) -> None:
        self.launched: list[Any] = []
        self.compiled: list[Any] = []
        self.readied = 0
        self.promised = Promised(self)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.launched.append((grid, arguments, constants))

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **constants: Any) -> Promised:
        self.compiled.append((grid, arguments, constants))
        return self.promised

    @property
    def run(self) -> None:
        self.readied += 1


def test_kernels_are_compiled_instead_of_launched_and_made_ready_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    kernel = Kernel()
    with launching.compiled_ahead(torch.device("cpu")):
        launching.launch(kernel, (2, 3), 5, M=16)
        launching.launch(kernel, (4,), 6, M=16)
        assert not kernel.launched and not kernel.readied
    assert kernel.compiled == [((2, 3), (5,), {"M": 16}), ((4,), (6,), {"M": 16})] and kernel.readied == 1
    launching.launch(kernel, (2,), 7, M=16)
    assert kernel.launched == [((2,), (7,), {"M": 16})] and len(kernel.compiled) == 2


def test_a_kernel_that_cannot_be_compiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no")

    kernel = Kernel()
    kernel.warmup = fails  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="no"), launching.compiled_ahead(torch.device("cpu")):
        launching.launch(kernel, (1,))
    launching.launch(kernel, (1,))
    assert len(kernel.launched) == 1
