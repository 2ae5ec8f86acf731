"""Modules compiled for graphs: asked for, told, and left where that fails. By a backend that compiles nothing."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphs import assert_same, growing
from test_local import tiny, traffic
from transformers import PreTrainedTokenizerFast

from collm.models.local import LocalModel
from collm.models.paged.capture import FakeCapture
from collm.models.paged.compiled import LARGEST
from collm.models.paged.dense import TorchDense
from collm.models.paged.graphs import BUCKETS
from collm.models.paged.llama import LlamaBody
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.pool import Pass
from collm.models.paged.telling import TorchTelling
from collm.values import Query


class Apart(TorchOps):
    """As kernels are, which torch does not look into."""

    attend = torch.compiler.disable(TorchOps.attend)


def machinery(compiler: str | Callable[..., Any] = "eager", **more: Any) -> Machinery:
    return Machinery(Apart(), TorchTelling(), FakeCapture(), block=8, compiler=compiler, **more)


def assert_right(model: LocalModel, plain: LocalModel, rounds: int) -> None:
    for queries in traffic(model, random.Random(2), rounds=rounds):
        for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)


def test_compiled_modules_answer_as_the_plain_twin(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Really traced, for two numbers of tokens; what runs without graphs is not."""
    for module in ("stepping", "graphs", "writing"):
        monkeypatch.setattr(f"collm.models.paged.{module}.BUCKETS", (1, 16))
    # Products that processors of one maker have otherwise, inside a call alone, would be traced for themselves.
    monkeypatch.setattr("collm.models.narrow.pays", lambda: False)
    traced: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        traced.append(len(graph.graph.nodes))
        return graph.forward

    network = tiny("glm4", num_hidden_layers=1)
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(compiler), compiled=True)
    assert traced, "the trial at load compiles"
    with caplog.at_level("INFO", "collm.models.paged.graphs"):
        model.warm_up()
    assert "for passes of up to 16 tokens" in caplog.text and "made of compiled modules in" in caplog.text
    compiled = len(traced)
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    assert_right(model, plain, rounds=6)
    text, query = growing()
    for token_id in (7, 9):
        assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])
        text.append(token_id)
        query = query._replace(length=query.length + 1)
    model.predict([Query.of([n % 300 for n in range(length)]) for length in (40, 50)])
    assert len(traced) == compiled, "nothing is compiled anew"
    assert model._stepper is not None and model._stepper.counts.passes.keys() == {1, 16}


def test_passes_up_to_a_size_are_compiled_and_only_in_graphs(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Counter[int]()

    def compiling(body: Callable[[Pass], torch.Tensor], dynamic: bool, backend: str) -> Callable[[Pass], torch.Tensor]:
        assert (dynamic, backend) == (False, "inductor")

        def counted(issued: Pass) -> torch.Tensor:
            sizes[issued.plan.num_tokens] += 1
            return body(issued)

        return counted

    monkeypatch.setattr(torch, "compile", compiling)
    network = tiny("glm4")
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery("inductor"), compiled=True)
    model.warm_up()
    assert sizes.keys() == {size for size in BUCKETS if size <= LARGEST}
    LocalModel(tiny("glm4"), tiny_tokenizer, max_cache_tokens=4000, machinery=machinery("inductor")).warm_up()
    sizes.clear()
    model.predict([Query.of([n % 300 for n in range(200)])])
    assert not sizes


def test_what_cannot_be_compiled_is_captured_as_it_is(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls.append(len(inputs))
        raise NotImplementedError("no such operator")

    calls: list[int] = []
    network = tiny("glm4", num_hidden_layers=1)
    told = "base: the modules of a glm4 model cannot be compiled .*'broken' raised.*; its graphs are made of them as"
    with pytest.warns(UserWarning, match=told) as found:
        model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(broken), compiled=True)
    assert len(found) == 1
    tried = list(calls)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.warm_up()
        assert_right(model, LocalModel(network, tiny_tokenizer, cache=False), rounds=3)
    assert model._stepper is not None and model._stepper.buckets == BUCKETS
    assert calls == tried, "what cannot be compiled is tried once"


def test_a_pass_of_our_own_is_not_compiled(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiling(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "compile", compiling)
    own = machinery(dense=TorchDense())
    model = LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=400, machinery=own, compiled=True)
    assert model._cache is not None and isinstance(model._cache.pool.body, LlamaBody)  # type: ignore[union-attr]
