"""Linear layers for a handful of tokens on processors whose BLAS does them badly.

MKL, torch's BLAS in float32, serves AMD's processors with kernels that take two to four times as long for 2 to 4 rows
as for one, and one row is slower than reading the weights. The same product the other way round, `W x^T`, is not: one
token of a 135M-parameter model takes 0.78 of the time, two 0.48, four 0.77 (EPYC, one thread; docs/log.md). That is
what decoding and the checking of drafts live on.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from threading import local

import torch
from torch import Tensor, nn

WIDEST = 5
"""Rows from which on the usual product is as quick."""


class _Inside(local):
    """Whether this thread is inside `narrow_products`, and how deep; other threads may use the same model otherwise."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


_inside = _Inside()


class NarrowLinear(nn.Linear):
    """An `nn.Linear`, by its other product inside `narrow_products`; outside it is what it was."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // input.shape[-1]
        if not _inside.depth or not 1 <= rows <= WIDEST or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        columns = input.reshape(rows, -1)
        if rows == 1:  # a matrix-vector product is slower than one with two columns
            columns = columns.repeat(2, 1)
        columns, bias = columns.t(), self.bias
        product = self.weight @ columns if bias is None else torch.addmm(bias[:, None], self.weight, columns)
        return product.t()[:rows].reshape(*input.shape[:-1], -1).contiguous()


@cache
def pays() -> bool:
    """Whether this is such a processor."""
    info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and info.is_file() and "AuthenticAMD" in info.read_text()


def prepare(model: nn.Module) -> None:
    """Make a model's linear layers capable of both products, where that pays. Its parameters stay as they are."""
    if pays():
        for module in model.modules():
            # A quantised weight is a tensor of another type, with products of its own.
            if type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.weight.device.type == "cpu":
                module.__class__ = NarrowLinear


def narrow_products() -> AbstractContextManager[None]:
    return _inside
