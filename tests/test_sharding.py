"""FSDP2 on two processes over gloo: equal to one process, resumed after kill -9, saved whole."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from launching import on_two_processes
from safetensors.torch import load_file

from collm.models.checkpoint import load_base
from collm.models.info import load_info
from collm.models.loading import weights_fingerprint
from collm.training.recipe import parse_recipe
from collm.training.train import train

# accelerate shards on accelerators only, so it is told that these CPUs are such.
WORKER = """
import os, signal, sys
from accelerate import PartialState
from accelerate.utils import DistributedType
begin = PartialState.__init__
def init(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self.distributed_type is DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
PartialState.__init__ = init
from collm.training import trainer
from collm.training.recipe import load_recipe
from collm.training.train import train
step = trainer.CollmTrainer.training_step
def training_step(self, model, *args, **kwargs):
    if self.state.global_step + 1 == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    from torch.distributed.fsdp import FSDPModule
    assert isinstance(model, FSDPModule) and isinstance(model.head, FSDPModule)
    head = model.head.forward
    def forward(hidden):
        assert model.head.weight.dtype.itemsize == 4
        return head(hidden)
    model.head.forward = forward
    try:
        return step(self, model, *args, **kwargs)
    finally:
        model.head.forward = head
trainer.CollmTrainer.training_step = training_step
train(load_recipe(sys.argv[1]), progress=False)
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    tokenizer = make_tokenizer()
    for name, seed, tied in (("base", 0, False), ("tied", 0, True), ("assistant", 1, False)):
        model = make_model(seed=seed, vocab_size=len(tokenizer), tie_word_embeddings=tied)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"prompt": f"{a} + {b} =", "completion": f" {a + b} is it" * (a % 3 + 1)} for a in range(5) for b in range(8)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:32]))
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[32:]))
    return folder


def recipe(workplace: Path, out: str, base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    training = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "evaluations": 2, **changes.pop("training", {})}
    return {
        "out": str(workplace / out),
        "cache": str(workplace / "cache"),
        "base": {**base, "model": str(workplace / base["model"])},
        "assistants": [{"name": "other", "model": str(workplace / "assistant")}],
        "data": {"train": str(workplace / "train.jsonl"), "validation": str(workplace / "validation.jsonl")},
        "init": {"max_tokens": 100},
        "training": training,
        **changes,
    }


def train_sharded(workplace: Path, values: dict[str, Any], kind: str, killed_at: int = 0) -> None:
    path = workplace / "two.yaml"
    path.write_text(json.dumps(values))
    on_two_processes(
        [sys.executable, "-c", WORKER, str(path), str(killed_at)],
        timeout=600,
        code=-signal.SIGKILL if killed_at else 0,
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_STATE_DICT_TYPE=kind,
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )


def test_killed_and_resumed_equals_one_process(workplace: Path) -> None:
    """2 x 4 texts a step against 1 x 8: gradients are summed in another order, 1e-5."""
    base = {"model": "base"}
    one = train(parse_recipe(recipe(workplace, "one", base)), progress=False)
    values = recipe(workplace, "two", base, training={"batch_size": 4, "save_minutes": 1e-9})
    step = random.choice([2, 3, 4])
    train_sharded(workplace, values, "SHARDED_STATE_DICT", killed_at=step)
    out = workplace / "two"
    checkpoints = list((out / "checkpoints").iterdir())
    assert checkpoints, f"killed at {step}"
    for checkpoint in checkpoints:  # each is one of ours: whole, and decodes
        model, head, _, info = load_base(checkpoint)
        assert head is not None and info.base_fingerprint == weights_fingerprint(model)
    train_sharded(workplace, values, "SHARDED_STATE_DICT")
    for name in ("model.safetensors", "gate.safetensors"):
        left, right = load_file(one / name), load_file(out / name)
        assert left.keys() == right.keys()
        for key in left:
            torch.testing.assert_close(left[key], right[key], atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    alone, sharded = load_info(one), load_info(out)
    assert alone is not None and sharded is not None
    found = sharded.training["figures"]["after"]
    assert found["eval_nll"] == pytest.approx(alone.training["figures"]["after"]["eval_nll"], abs=1e-5)
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("base", [{"model": "tied", "dtype": "bfloat16"}], ids=["tied"])
def test_adapters_of_a_bfloat16_base(workplace: Path, base: dict[str, Any]) -> None:
    """Computing in bfloat16; adapters and gate stay in float32. Products are rounded by other groups: 1e-2."""
    settings = {"tune": "lora", "lora": {"r": 4, "dropout": 0.0}}
    one = train(parse_recipe(recipe(workplace, "lora1", base, training={"bf16": True}, **settings)), progress=False)
    values = recipe(workplace, "lora2", base, training={"bf16": True, "batch_size": 4}, **settings)
    train_sharded(workplace, values, "FULL_STATE_DICT")
    two = workplace / "lora2"
    for name in ("adapter_model.safetensors", "gate.safetensors"):
        left, right = load_file(one / name), load_file(two / name)
        assert left.keys() == right.keys() and {tensor.dtype for tensor in right.values()} == {torch.float32}
        for key in left:
            torch.testing.assert_close(left[key], right[key], atol=1e-2, rtol=0)
    assert load_base(two)[1] is not None
