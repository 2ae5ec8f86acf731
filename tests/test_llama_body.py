"""The forward pass of our own for Llama's kin: against transformers' modules, and its kernels against their twins."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from test_graphs import assert_same
from test_local import tiny, traffic
from transformers import PreTrainedTokenizerFast

from collm.models.adapters import ModelStore
from collm.models.attention import Row
from collm.models.head import DeferralHead
from collm.models.loading import load_model, weights_fingerprint
from collm.models.local import LocalModel
from collm.models.paged import plan as planned
from collm.models.paged.blocks import Blocks
from collm.models.paged.cache import PagedCache
from collm.models.paged.capture import FakeCapture
from collm.models.paged.dense import Dense, Heads, TorchDense, Turns
from collm.models.paged.llama import FAMILY, LlamaBody
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.plan import Plan, fill
from collm.models.paged.pool import Modules
from collm.models.paged.telling import TorchTelling
from collm.values import Draw, Query
from collm.views import Text

pytest.importorskip("triton", reason="Triton is for Linux")
from collm.models.paged.triton_dense import TritonDense
from collm.models.paged.triton_ops import TritonOps
from collm.models.paged.triton_telling import TritonTelling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(FAMILY)),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}),
]


def machinery() -> Machinery:
    return Machinery(TorchOps(), TorchTelling(), FakeCapture(), TorchDense(), block=8)


def body(model: LocalModel) -> object:
    assert isinstance(model._cache, PagedCache)
    return model._cache._pool.body


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=[f"{n}-{kind}" for n, (kind, _) in enumerate(KINDS)])
def test_answers_are_those_of_the_modules(
    kind: str, settings: dict[str, Any], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    network, rng = tiny(kind, **settings), random.Random(1)
    with torch.no_grad():  # norms that are not 1, biases that are not 0
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight, std=0.1)
    plain = LocalModel(network, tiny_tokenizer, head, cache=False)
    before, size = weights_fingerprint(network), sum(p.nbytes for p in network.parameters())
    own = LocalModel(network, tiny_tokenizer, head, num_slots=5, max_cache_tokens=640, machinery=machinery())
    assert isinstance(body(own), LlamaBody)
    for queries in traffic(own, rng, rounds=6):
        for found, expected in zip(own.predict(queries), plain.predict(queries), strict=True):
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
    # The weights have moved, once: they are what they were, and there is no second copy.
    assert weights_fingerprint(network) == before
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    assert sum(storages.values()) == size
    moved = {name: p.data_ptr() for name, p in network.named_parameters()}
    LocalModel(network, tiny_tokenizer, max_cache_tokens=640, machinery=machinery())
    assert {name: p.data_ptr() for name, p in network.named_parameters()} == moved


def test_all_kernels_together(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A network by Triton alone, but for its products."""
    # A short context, for the trial at load fills it.
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 24}
    network = tiny("qwen3", **shape)
    ops = TritonOps(programs=2), TritonTelling(), FakeCapture(DEVICE), TritonDense()
    plain = LocalModel(network.to(DEVICE), tiny_tokenizer, cache=False)
    own = LocalModel(network, tiny_tokenizer, max_cache_tokens=640, machinery=Machinery(*ops, block=32))
    assert isinstance(body(own), LlamaBody)
    texts = [Text([list(range(3, 6))]), Text([list(range(20, 25))])]
    for n in range(2):
        queries = [Query(0, t.views[0], len(t.views[0]), 1, Draw(n, 0, 1.0)) for t in texts]
        for found, expected in zip(own.predict(queries), plain.predict(queries), strict=True):
            assert_same(found[0], expected[0])
        for text in texts:
            text.append(7 + n)


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "cohere2"])
def test_others_run_by_their_modules(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny(kind), tiny_tokenizer, max_cache_tokens=640, machinery=machinery())
    assert isinstance(body(model), Modules)


def test_adapters_are_switched(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Three variants of one set of weights, each with graphs of its own; one adapter comes when graphs are there."""
    make_model("llama").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    for n, modules in enumerate((["q_proj", "v_proj", "down_proj"], ["k_proj", "gate_proj", "o_proj"])):
        torch.manual_seed(n)
        config = LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
        get_peft_model(load_model(str(tmp_path / "base")), config).save_pretrained(tmp_path / str(n))
    store, models, plain = ModelStore(), [], []
    for name in ("base", "0", "1"):
        variant = store.load(str(tmp_path / name))
        own = {"max_cache_tokens": 640, "activate": variant.activate}
        models.append(LocalModel(variant.model, tiny_tokenizer, machinery=machinery(), **own))  # type: ignore[arg-type]
        plain.append(LocalModel(variant.model, tiny_tokenizer, cache=False, activate=variant.activate))
        assert isinstance(body(models[-1]), LlamaBody)
    query, told = Query.of(list(range(3, 20)), 2), set()
    for _ in range(2):
        for mine, other in zip(models, plain, strict=True):
            [found], [expected] = mine.predict([query]), other.predict([query])
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
            told.add(round(found[-1].entropy, 4))  # type: ignore[union-attr]
    assert len(told) == 3


@pytest.mark.parametrize("add", [False, True])
def test_norm(add: bool) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(3, 40, device=DEVICE), torch.randn(3, 40, device=DEVICE), torch.randn(40).to(DEVICE)
    found = []
    for dense in (TorchDense(), TritonDense()):
        own = x.clone()
        found.append([dense.add_norm(own, delta if add else None, 0.3, weight, 1e-5), own])
    torch.testing.assert_close(found[1], found[0])


def test_gated() -> None:
    both = torch.randn(3, 2 * 1500, device=DEVICE)
    torch.testing.assert_close(TritonDense().gated(both), TorchDense().gated(both))


@pytest.mark.parametrize(
    ("heads", "normed"),
    [
        (Heads(4, 2, 16, 16, 1e-5), False),
        (Heads(4, 2, 16, 8, 1e-5), True),
        (Heads(2, 1, 24, 24, 1e-6), True),
        (Heads(2, 2, 16, 0, 1e-6), False),
    ],
)
def test_turned_and_stored(heads: Heads, normed: bool) -> None:
    torch.manual_seed(0)
    blocks = Blocks(6, 2, 4, 16)
    rows = [Row(1, 14, 4), Row(0, 3, 2)]
    for row in rows:
        blocks.write(row.slot, 0, row.end)
    numbers = np.zeros(planned.size(7), dtype=np.int32)
    items = fill(numbers, rows, [0] * 6, blocks, 4)
    plan = Plan(torch.from_numpy(numbers).to(DEVICE), 7, 16, items)
    angles = torch.rand(32, max(1, heads.rotated // 2), device=DEVICE)
    turns = Turns(angles.cos(), angles.sin())
    norms = (torch.randn(heads.dim).to(DEVICE), torch.randn(heads.dim).to(DEVICE)) if normed else None
    qkv = torch.randn(7, (heads.queries + 2 * heads.keys) * heads.dim, device=DEVICE)

    def run(dense: Dense) -> list[torch.Tensor]:
        keys = torch.zeros(7, heads.keys, 16, heads.dim, device=DEVICE)
        values = torch.zeros_like(keys)
        query = dense.turn_and_store(qkv, heads, turns, norms, keys, values, plan)
        return [query, keys, values]

    found, expected = run(TritonDense()), run(TorchDense())
    assert all(bool(each.any()) for each in expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
