"""Mixtures of experts under graphs: no way that asks the host, and the answers of the eager one."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_graphs import assert_same
from test_local import tiny, traffic
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from watching import HOST_READS, WatchedCapture, watched

from collm.bench.card import bytes_read
from collm.models.local import LocalModel
from collm.models.paged import experts
from collm.models.paged.compiled import LARGEST
from collm.models.paged.graphs import BUCKETS
from collm.models.paged.machinery import Machinery
from collm.models.paged.pool import Pass

KINDS = "granitemoe mixtral olmoe qwen2_moe qwen3_moe".split()
FEW = {
    "mixtral": {"num_local_experts": 6},
    "granitemoe": {"num_local_experts": 6},
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {"num_experts": 6, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24},
}
OPERATORS = {experts.GROUPED: "_grouped_mm", experts.BATCHED: "bmm"}


def mixture(kind: str) -> PreTrainedModel:
    model = tiny(kind, num_experts_per_tok=2, **FEW[kind])
    model.set_experts_implementation("eager")
    return model


def made(
    network: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, machinery: Machinery
) -> tuple[LocalModel, WatchedCapture]:
    model = LocalModel(network, tokenizer, num_slots=4, max_cache_tokens=640, machinery=machinery)
    assert isinstance(machinery.capture, WatchedCapture)
    return model, machinery.capture


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [experts.GROUPED, experts.BATCHED])
def test_mixtures_are_recorded_without_the_host(
    kind: str, way: str, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own eager experts, which answer outside of graphs, read the host and are the reference."""
    if way == experts.BATCHED:
        monkeypatch.setattr(experts, "_has_grouped", lambda *_: False)
    network = mixture(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, capture = made(network, tiny_tokenizer, watched())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    for queries in traffic(model, random.Random(2), rounds=5):
        for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
    assert capture.replayed > 3 and capture.watches
    for watch in capture.watches:
        # Two products of each of two layers.
        assert watch.operators[OPERATORS[way]] == 4
        assert not watch.operators.keys() & {"nonzero", *OPERATORS.values()} - {OPERATORS[way]}
    assert network.config._experts_implementation == "eager", "elsewhere it is what it was"


def test_where_one_way_cannot_be_recorded_the_next_one_is_taken(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = mixture("qwen3_moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, capture = made(network, tiny_tokenizer, watched(forbidden=HOST_READS | {"_grouped_mm"}))
        model.warm_up()
    assert capture.watches and all(watch.operators["bmm"] == 4 for watch in capture.watches)
    told = r"passes of a qwen3_moe model cannot be captured .*: bmm\); they run"
    with pytest.warns(UserWarning, match=told) as warned:
        model, _ = made(mixture("qwen3_moe"), tiny_tokenizer, watched(forbidden=HOST_READS | {"_grouped_mm", "bmm"}))
        model.warm_up()
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("forbidden", "broken", "told"),
    [
        ("_grouped_mm", False, None),
        ("", True, "the modules of a qwen3_moe model cannot be compiled .*no such operator"),
        ("_grouped_mm", True, "the modules of a qwen3_moe model cannot be compiled .*no such operator"),
        ("_grouped_mm bmm", False, r"passes of a qwen3_moe model cannot be captured .*: bmm\); they run"),
    ],
)
def test_compiling_is_not_blamed_for_experts(
    forbidden: str,
    broken: bool,
    told: str | None,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another way to compute experts comes before modules as they are; what is said is the fault, and said once."""
    compiled: list[int] = []

    def compiling(body: Callable[[Pass], torch.Tensor], **how: Any) -> Callable[[Pass], torch.Tensor]:
        def run(issued: Pass) -> torch.Tensor:
            if broken:
                raise NotImplementedError("no such operator")
            compiled.append(issued.plan.num_tokens)
            return body(issued)

        return run

    monkeypatch.setattr(torch, "compile", compiling)
    own = watched(forbidden=HOST_READS | set(forbidden.split()))
    network = mixture("qwen3_moe")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model = LocalModel(network, tiny_tokenizer, max_cache_tokens=640, machinery=own, compiled=True)
        compiled.clear()
        model.warm_up()
    assert [bool(re.search(told or "$^", str(each.message))) for each in found] == [True] * (told is not None)
    assert model._stepper is not None and isinstance(own.capture, WatchedCapture)
    captured = told is None or "captured" not in told
    assert model._stepper.buckets == (BUCKETS if captured else ())
    assert set(compiled) == ({size for size in BUCKETS if size <= LARGEST} if told is None else set())
    if captured:
        used = OPERATORS[experts.BATCHED if forbidden else experts.GROUPED]
        assert all(watch.operators[used] == 4 for watch in own.capture.watches)


def test_experts_that_transformers_computes_in_one_way_alone_are_told(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = mixture("olmoe")
    monkeypatch.setattr(type(network), "_can_set_experts_implementation", classmethod(lambda cls: False))
    told = "base: passes of a olmoe model cannot be captured .*nonzero.*has no way to compute its experts"
    with pytest.warns(UserWarning, match=told) as warned:
        model, capture = made(network, tiny_tokenizer, watched())
    assert len(warned) == 1
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for queries in traffic(model, random.Random(2), rounds=3):
            for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
                for pair in zip(found, expected, strict=True):
                    assert_same(*pair)
    assert not capture.replayed


def test_which_experts_a_card_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped products without the host are a kernel for bfloat16 of Hopper and of Blackwell in servers."""
    single, half = mixture("mixtral"), mixture("mixtral").to(torch.bfloat16)
    card = torch.device("cuda", 0)
    for capability, expected in (((9, 0), True), ((10, 0), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert experts.ways(half, card)[0] == (experts.GROUPED if expected else experts.BATCHED)
        assert experts.ways(half, card)[-1] == experts.BATCHED
        assert experts.ways(single, card) == (experts.BATCHED,)
    for name in ("grouped_mm", "_grouped_mm"):
        monkeypatch.delattr(torch.nn.functional if name == "grouped_mm" else torch, name, raising=False)
    assert experts.ways(half, torch.device("cuda", 0)) == (experts.BATCHED,)
    assert experts.ways(tiny("llama"), card) == ()


def test_a_pass_reads_the_experts_that_it_uses() -> None:
    """Of six experts, two for a token: 1/3 for one token, 1 - (2/3)^T for T of them."""
    network = mixture("qwen2_moe")
    routed = 2 * 6 * 3 * 32 * 24 * 4
    weights = sum(parameter.nbytes for parameter in network.parameters())
    embedding = 330 * 32 * 4
    shares = {1: 1 / 3, 2: 5 / 9, 16: 1 - (2 / 3) ** 16}
    for tokens, share in shares.items():
        assert experts.share_used(network, tokens) == pytest.approx(share)
        # The head is the embedding, of which a pass reads all; of an embedding alone it reads a few rows.
        tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
        rest = weights - routed - (0 if tied else embedding)
        assert bytes_read(network, tokens=tokens) == pytest.approx(rest + share * routed, abs=1)
    dense = tiny("llama", tie_word_embeddings=True)
    assert bytes_read(dense) == bytes_read(dense, tokens=64) == sum(each.nbytes for each in dense.parameters())
    drawn = torch.rand(20000, 6, generator=torch.Generator().manual_seed(0)).topk(2).indices.view(-1, 4 * 2)
    used = sum(len(set(row)) for row in drawn.tolist()) / len(drawn) / 6
    assert used == pytest.approx(experts.share_used(network, 4), abs=0.01)
