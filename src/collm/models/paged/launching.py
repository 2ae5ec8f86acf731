"""Kernels are launched, or compiled ahead of that, several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

_ahead: ContextVar[bool] = ContextVar("ahead", default=False)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if _ahead.get():
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """What would be launched meanwhile is compiled instead, all at the same time; at the end it is ready."""
    pool = ThreadPoolExecutor(os.cpu_count())
    token = _ahead.set(True)
    try:
        with pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        _ahead.reset(token)
