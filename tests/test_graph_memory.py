"""The memory of graphs and of what they work on: given back with the model, and shared with its neighbours."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary, WeakSet

import pytest
import torch
from test_local import tiny
from transformers import PreTrainedTokenizerFast

from collm.models.local import LocalModel
from collm.models.memory import free_bytes
from collm.models.on_device import OnDevice
from collm.models.paged.capture import CudaCapture, FakeCapture, Work
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


@pytest.mark.parametrize("how", ["warmed up", "asked"])
def test_graphs_leave_what_other_networks_storage_will_take(
    how: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first network of a device captures before the storage of the second, nine times as large, is reserved."""
    monkeypatch.setattr("collm.models.paged.cache._alive", WeakSet())
    models: list[LocalModel] = []
    total = 1 << 21
    monkeypatch.setattr(
        "collm.models.paged.cache.free_bytes", lambda device: total - sum(model.cache_bytes for model in models)
    )
    for layers in (1, 9):
        network = tiny("llama", num_hidden_layers=layers, max_position_embeddings=4096)
        own = Machinery(TorchOps(), TorchTelling(), FakeCapture(), block=8)
        models.append(LocalModel(network, tiny_tokenizer, machinery=own))
    for model in models:
        if how == "asked":
            model.predict([Query.of([1, 2, 3])])
        else:
            model.warm_up()
    steppers = [model.graphs[0] for model in models]
    left = total - sum(model.cache_bytes for model in models)
    assert 0 < left < total / 2, "the storage takes most of it"
    assert [stepper._graphs.most for stepper in steppers if stepper is not None] == [left // 2] * 2


def test_what_torch_has_kept_for_nobody_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the driver it is taken. On a GPU of 24 GB that a training has used up, a cache of one block was left."""
    driver = {"free": 1 << 20, "kept": 22 << 30}

    def emptied() -> None:
        driver["free"], driver["kept"] = driver["free"] + driver["kept"], 0

    monkeypatch.setattr(torch.cuda, "empty_cache", emptied)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (driver["free"], 24 << 30))
    assert free_bytes(torch.device("cuda", 0)) == (22 << 30) + (1 << 20)


class Memory:
    """What torch tells of a device's memory, while another thread takes some of it in some runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, needed: int, others: list[int]) -> None:
        self.needed, self.others, self.peak, self.runs = needed, others, 0, 0
        for name, found in (
            ("memory_allocated", lambda: 100),
            ("max_memory_allocated", lambda: 100 + self.peak),
            ("reset_peak_memory_stats", lambda: setattr(self, "peak", 0)),
            ("current_stream", mock.MagicMock),
            ("Stream", lambda _: mock.MagicMock()),
            ("CUDAGraph", mock.MagicMock),
            ("stream", lambda _: nullcontext()),
            ("device", lambda _: nullcontext()),
            ("graph", lambda *_, **__: nullcontext()),
        ):
            monkeypatch.setattr(torch.cuda, name, found)

    def work(self) -> None:
        other = self.others[self.runs] if self.runs < len(self.others) else 0
        self.peak, self.runs = max(self.peak, self.needed + other), self.runs + 1


def test_what_another_thread_takes_is_not_what_a_graph_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts a device's memory, not a thread's: what is refused has needed too much in each of several runs."""
    capture = CudaCapture(torch.device("cuda", 0))
    quiet = Memory(monkeypatch, 50, [])
    capture.record(quiet.work, 60)
    assert quiet.runs == 3, "two before the capture, and the capture"
    busy = Memory(monkeypatch, 50, [900, 900, 70])
    capture.record(busy.work, 60)
    assert busy.runs == 5
    large = Memory(monkeypatch, 80, [0, 900, 900])
    with pytest.raises(torch.OutOfMemoryError):
        capture.record(large.work, 60)
    assert large.runs == 5


class Streams:
    """Those of a device, as torch hands them out: in turn. Which ones were recorded on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Memory(monkeypatch, 0, [])
        self.given, self.recorded_on = 0, list[int]()
        self.fails = False
        self.graphs = WeakSet[Any]()
        monkeypatch.setattr(torch.cuda, "Stream", self.of)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new_graph)
        monkeypatch.setattr("collm.models.devices._own", WeakKeyDictionary())

    def of(self, device: torch.device | None = None) -> Any:
        self.given += 1
        return Stream(self.given % 32)

    def new_graph(self) -> Any:
        graph = mock.MagicMock()
        self.graphs.add(graph)
        return graph

    def graph(self, _: Any, *, stream: Stream, **__: Any) -> Any:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded_on.append(stream.number)
        return nullcontext()


class Stream:
    """Equal to all that are the same one underneath, as torch's are."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...


def test_graphs_of_two_networks_share_no_place_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has 32 streams, and for each one a place that graphs know which were recorded on it: of two networks that
    overlap one wrote into the other's sums, and when one went, the other's graphs knew a place that was gone."""
    streams, cuda = Streams(monkeypatch), torch.device("cuda", 0)
    base, assistant = CudaCapture(cuda), CudaCapture(cuda)
    for capture in (base, assistant):
        streams.recorded_on.clear()
        for _ in range(17):  # one on trial, and sixteen
            capture.record(lambda: None)
        assert len(set(streams.recorded_on)) == 1
    on = OnDevice(cuda, "assistant")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    on.overlap()
    later = [CudaCapture(cuda) for _ in range(40)]
    own = {streams.recorded_on[0]}
    base.record(lambda: None)
    own |= {streams.recorded_on[-1], on._stream.number if on._stream else -1}
    assert len(own) == 3
    streams.recorded_on.clear()
    for capture in later[:29]:
        capture.record(lambda: None)
    assert len(set(streams.recorded_on)) == 29 and not own & set(streams.recorded_on)
    del later[0]
    later[30].record(lambda: None)
    assert streams.recorded_on[-1] == streams.recorded_on[0], "whose capture is gone"


def test_a_graph_that_cannot_be_recorded_takes_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a graph is destroyed, torch gives up what the products of its stream need, which others there know."""
    streams = Streams(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))
    streams.fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        capture.record(lambda: None)
    gc.collect()
    assert not streams.graphs, "there are no others, and what it took is given back"
    streams.fails = False
    replay = capture.record(lambda: None)
    streams.fails = True
    with pytest.raises(RuntimeError, match="not permitted"):
        capture.record(lambda: None)
    gc.collect()
    assert len(streams.graphs) == 2
    del replay, capture
    gc.collect()
    assert not streams.graphs
