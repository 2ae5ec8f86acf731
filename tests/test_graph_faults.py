"""What a GPU may lack, and what becomes of texts when it fails: the slower path with one warning, or an error each."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from test_crop_cache import network as crop_network
from test_graphs import Counted, assert_same, growing
from test_local import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from watching import WatchedCapture, WatchedOps, WatchedTelling

from collm.decoding.collaborative import collaborative, single
from collm.decoding.policies import ByEntropy
from collm.engine import Engine, Finished
from collm.errors import CollmError
from collm.models import caching
from collm.models.devices import places
from collm.models.head import DeferralHead
from collm.models.local import LocalModel
from collm.models.paged import machinery as machines
from collm.models.paged.capture import FakeCapture
from collm.models.paged.machinery import Machinery, machinery_for
from collm.models.paged.ops import TorchOps
from collm.models.paged.plan import Plan
from collm.models.paged.pool import TILE
from collm.models.paged.telling import TorchTelling
from collm.sampling_params import SamplingParams
from collm.types import BASE
from collm.values import GREEDY, Foreseen, Query, WriteOn
from collm.views import Text

CARD = torch.device("cuda", 0)
ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that has all it needs, and on which all networks are said to lie."""
    for module in (machines, caching):
        monkeypatch.setattr(module, "places", lambda lm: [CARD])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Card 9")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return monkeypatch


def assert_eager(network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, told: str) -> None:
    """It runs without graphs, says why once, and answers as the plain twin."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = LocalModel(network, tokenizer, name="m", max_cache_tokens=640)
        text, query = growing()
        answers = [model.predict([query])[0][0]]
        text.append(7)
        answers.append(model.predict([Query(0, text.views[0], 21)])[0][0])
        model.warm_up()
    [warning] = [str(each.message) for each in found if issubclass(each.category, UserWarning)]
    assert warning == f"m: {told}; passes run without graphs, which is right but slow"
    assert not model.writes_on
    plain = LocalModel(network, tokenizer, cache=False)
    for length, answer in zip((20, 21), answers, strict=True):
        assert_same(answer, plain.predict([Query(0, text.views[0], length)])[0][0])


def test_a_card_with_all_it_needs_gets_graphs(card: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = machinery_for(tiny("llama"), "m")
    assert found is not None and found.dense is not None and found.capture.device == CARD


def test_without_triton(card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    spec = importlib.util.find_spec
    card.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "triton" else spec(name, *more))
    assert_eager(tiny("llama"), tiny_tokenizer, "the package triton is not installed")


def test_on_a_card_older_than_ampere(card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert_eager(tiny("llama"), tiny_tokenizer, "Card 9 is older than Ampere")


def test_with_a_driver_older_than_torch(card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def old(*_: object) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    card.setattr(torch.cuda, "get_device_capability", old)
    told = "cuda:0 does not start (The NVIDIA driver on your system is too old (found version 11040).)"
    assert_eager(tiny("llama"), tiny_tokenizer, told)


@pytest.mark.parametrize("module", ["triton_ops", "triton_dense", "triton_telling"])
def test_where_kernels_cannot_be_imported(
    module: str, card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    card.setitem(sys.modules, f"collm.models.paged.{module}", None)
    told = f"import of collm.models.paged.{module} halted; None in sys.modules"
    assert_eager(tiny("llama"), tiny_tokenizer, f"Triton does not start (ModuleNotFoundError: {told})")


def test_where_a_kernel_does_not_compile(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As with a driver older than what Triton compiles for: found out by the trial at load."""

    class Broken(TorchOps):
        def store(self, *args: Any) -> None:
            raise RuntimeError("PTX was compiled with an unsupported toolchain\nmore")

    own = Machinery(Broken(), TorchTelling(), FakeCapture(), block=8)
    network = tiny("llama")
    with pytest.warns(UserWarning, match="m: keys and values in blocks do not .*unsupported toolchain.*without graphs"):
        model = LocalModel(network, tiny_tokenizer, name="m", max_cache_tokens=640, machinery=own)
    query = Query.of([4, 5, 6])
    assert not model.writes_on
    assert_same(model.predict([query])[0][0], LocalModel(network, tiny_tokenizer, cache=False).predict([query])[0][0])


def test_where_long_passes_need_more_than_the_card_has(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Their tiles are larger: heads of 512 numbers in float32 need 160 KiB of shared memory, and an L4 has 99. Each
    prompt of more than 256 tokens failed."""

    class Small(TorchOps):
        def attend(self, query: Any, keys: Any, values: Any, plan: Plan, *more: Any) -> Any:
            if plan.tile > TILE:
                raise RuntimeError("out of resource: shared memory, Required: 163840, Hardware limit: 101376")
            return super().attend(query, keys, values, plan, *more)

    own = Machinery(Small(), TorchTelling(), FakeCapture(), block=64)
    network = tiny("llama", max_position_embeddings=512)
    with pytest.warns(UserWarning, match="m: keys and values in blocks do not serve.*shared memory.*without graphs"):
        model = LocalModel(network, tiny_tokenizer, name="m", max_cache_tokens=2048, machinery=own)
    query = Query.of([n % 50 for n in range(400)])
    assert_same(model.predict([query])[0][0], LocalModel(network, tiny_tokenizer, cache=False).predict([query])[0][0])


def test_a_network_on_several_devices(card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    for other in (torch.device("cuda", 1), torch.device("cpu")):
        for module in (machines, caching):
            card.setattr(module, "places", lambda lm, other=other: [other, CARD])
        told = f"its parts lie on {other}, cuda:0, and graphs are of one device"
        assert_eager(tiny("llama"), tiny_tokenizer, told)


def test_one_card_has_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's hooks say `cuda`, or a number."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    network: Any = tiny("llama")
    hook = AlignDevicesHook(execution_device="cuda")
    for module in (network.get_input_embeddings(), network.model.layers[0]):
        module._hf_hook = hook
    for module in (network.model.layers[1], network.get_output_embeddings()):
        module._hf_hook = AlignDevicesHook(execution_device=1)
    assert places(network) == [torch.device("cuda", 1)]


def test_a_network_that_is_offloaded(card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    card.setattr(machines, "is_offloaded", lambda lm: True)
    told = "some of its weights are fetched when they are needed, and graphs need them in place"
    assert_eager(tiny("llama"), tiny_tokenizer, told)


@pytest.mark.parametrize("kind", ["stablelm", "bloom", "longrope"])
def test_a_network_with_caches_of_its_own(
    kind: str, card: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    network = crop_network(kind)
    told = f"a {network.config.model_type} model keeps its texts in transformers' own caches"
    assert_eager(network, tiny_tokenizer, told)


def test_on_a_cpu_nothing_is_lacking(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert places(tiny("llama")) == [torch.device("cpu")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not LocalModel(tiny("llama"), tiny_tokenizer).writes_on
        LocalModel(crop_network("bloom"), tiny_tokenizer)


class Card:
    """A device that is lost after so many passes: from then on everything that is asked of it fails, waiting too."""

    def __init__(self, passes: float = float("inf")) -> None:
        self.left = passes

    def used(self) -> None:
        self.left -= 1
        self.check()

    def check(self) -> None:
        if self.left < 0:
            raise RuntimeError(ILLEGAL)

    def machinery(self) -> Machinery:
        card = self

        class Capture(WatchedCapture):
            def record(self, work: Callable[[], None], most: int | None = None) -> Callable[[], None]:
                card.check()
                replay = super().record(work, most)

                def used() -> None:
                    card.used()
                    replay()

                return used

            def wait(self) -> None:
                card.check()
                super().wait()

        class Ops(WatchedOps):
            def store(self, *args: Any) -> None:
                card.check()
                super().store(*args)

        capture = Capture()
        return Machinery(Ops(capture), WatchedTelling(capture), capture, block=8)


def lossy(card: Card, tokenizer: PreTrainedTokenizerFast, name: str = "base", layers: int = 2) -> LocalModel:
    network = tiny("llama", num_hidden_layers=layers)
    head = DeferralHead(32, 1) if name == "base" else None
    return LocalModel(
        network, tokenizer, head, name=name, num_slots=8, max_cache_tokens=1600, machinery=card.machinery()
    )


@pytest.mark.parametrize("passes", [0, 1, 7, 30])
@pytest.mark.parametrize("how", ["single", "pair"])
def test_every_text_ends_when_the_device_is_lost(
    how: str, passes: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Eight texts, some of which wait for a place: each ends once, with an error that says what to do."""
    card = Card()
    models = [lossy(card, tiny_tokenizer), lossy(card, tiny_tokenizer, "assistant", 3)]
    for model in models:
        model.warm_up()
    card.left = passes
    engine, ended, eos = Engine(models, max_num_seqs=5), dict[int, list[Finished]](), [frozenset[int]()] * 2

    def started(n: int) -> None:
        text, params = Text([[n + 3, 7, 11, 20 * n]] * 2), SamplingParams(max_tokens=60)
        policy = ByEntropy(3.5, 1)
        flow = single(BASE, text, params, eos) if how == "single" else collaborative(text, params, policy, eos)
        found = ended[n] = []
        engine.submit(flow, text, 60, lambda event: found.append(event) if isinstance(event, Finished) else None)

    for n in range(8):
        started(n)
    until = time.monotonic() + 60
    while not all(ended.values()) and time.monotonic() < until:
        time.sleep(0.01)
    started(8)  # nor does a later one wait for ever
    while not ended[8] and time.monotonic() < until:
        time.sleep(0.01)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 2
    for found in ended.values():
        [finished] = found
        assert finished.finish_reason == "error"
        assert finished.error is not None
        assert "cpu failed (CUDA error: an illegal memory access was encountered); start the process anew" in (
            finished.error
        )


def test_a_lost_device_is_told_wherever_it_shows(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    told = r"^base: cpu failed \(CUDA error: an illegal memory access was encountered\); start the process anew$"
    card = Card()
    model = lossy(card, tiny_tokenizer)
    card.left = -1
    for used in (model.warm_up, lambda: model.predict([growing()[1]]), lambda: lossy(card, tiny_tokenizer)):
        with pytest.raises(CollmError, match=told):
            used()
    card.left = float("inf")
    text, query = growing(13)
    model.predict([query])
    text.append(7)
    model.predict([Query(0, text.views[0], 14)])
    card.left = 0
    with pytest.raises(CollmError, match=told):  # whoever calls is another model, most often
        model.foresee([Foreseen(text.views[0], 14, 9, GREEDY)])
    card.left = 3  # while it is measured
    with pytest.raises(CollmError, match=told):
        model.warm_up()
    assert not model.pass_curve


def test_texts_that_a_lost_device_wrote_hold_nothing(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """What its caches hold is not what the texts say, and waiting for it fails as well."""
    card = Card()
    model = lossy(card, tiny_tokenizer)
    texts = [Text([list(range(3 + n, 23))]) for n in range(3)]
    queries = [Query(0, text.views[0], len(text.views[0]), write_on=WriteOn(20)) for text in texts]
    model.predict([query._replace(length=query.length - 1, write_on=None) for query in queries])
    assert [model.missing(query) for query in queries] == [1, 1, 1]
    card.left = 4
    with pytest.raises(CollmError, match="illegal memory access"):
        model.write_on(queries, Counted())
    assert [model.missing(query) for query in queries] == [20, 19, 18]
