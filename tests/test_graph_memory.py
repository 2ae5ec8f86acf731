"""The memory of graphs and of what they work on: given back with the model, and shared with its neighbours."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_local import tiny
from transformers import PreTrainedTokenizerFast

from collm.models.local import LocalModel
from collm.models.paged.capture import FakeCapture, Work
from collm.models.paged.dense import TorchDense
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.telling import TorchTelling
from collm.values import Query


class Light(FakeCapture):
    """As CUDA's: what replays a graph holds nothing of the work that was recorded. The work lies apart."""

    def __init__(self) -> None:
        super().__init__()
        self.apart: list[Work] = []

    def record(self, work: Work, most: int | None = None) -> Work:
        super().record(work, most)
        apart, n = self.apart, len(self.apart)
        apart.append(work)
        return lambda: apart[n]()


@pytest.fixture
def counted() -> Iterator[None]:
    """Memory is freed when nothing holds it, by counting alone."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["own pass", "modules", "compiled"])
def test_a_dropped_model_leaves_nothing(
    kind: str, counted: None, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for a while: the storage may be most of a GPU's memory, which the next model needs."""

    def compiling(body: Callable[..., Any], **how: Any) -> Callable[..., Any]:
        return lambda *issued: body(*issued)

    monkeypatch.setattr(torch, "compile", compiling)
    capture, dense = Light(), TorchDense() if kind == "own pass" else None
    own = Machinery(TorchOps(), TorchTelling(), capture, dense, block=8)
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=400, machinery=own, compiled=kind == "compiled")
    model.warm_up()
    model.predict([Query.of([1, 2, 3, 4, 5])])
    stepper, cache = model.graphs
    assert stepper is not None and cache is not None and stepper.buckets
    held = [weakref.ref(each) for each in (stepper, stepper._graphs, cache, cache.paged, cache.paged.stored(0)[0])]
    held += [weakref.ref(each) for each in (cache.paged.body, cache.paged.recorded) if each is not None]
    assert len(held) == (7 if kind == "compiled" else 6)
    del stepper, cache, model
    capture.apart.clear()
    assert [each() for each in held] == [None] * len(held)
