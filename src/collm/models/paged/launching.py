"""Kernels are launched, or compiled ahead of that, several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

_ahead: ContextVar[list[Any] | None] = ContextVar("ahead", default=None)
"""The kernels that are compiled instead of being launched."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    compiled = _ahead.get()
    if compiled is None:
        kernel[grid](*arguments, **constants)
    else:
        compiled.append(kernel.warmup(*arguments, grid=grid, **constants))


@contextmanager
def compiled_ahead(device: torch.device) -> Iterator[None]:
    """What would be launched meanwhile is compiled instead, all at the same time; at the end it is ready."""
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        compiled: list[Any] = []
        token = _ahead.set(compiled)
        try:
            with triton.AsyncCompileMode(pool):
                yield
        finally:
            _ahead.reset(token)
        # What launches a kernel is compiled, too, by a C compiler, when it is first asked for.
        list(pool.map(_make_ready, {id(each): each for each in compiled}.values()))


def _make_ready(kernel: Any) -> None:
    """Also one that was promised while it was being compiled."""
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    # Who launches one that needs more than the device has takes another.
    with suppress(OutOfResources):
        _ = kernel.run
