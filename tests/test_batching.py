"""Batches of models whose RoPE depends on the longest text of a batch: no text sees another one's factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.data.collate import IGNORED, Collator, Row
from collm.data.examples import Example, load_examples
from collm.data.formatting import Formatter
from collm.data.resumable import plan_batches
from collm.data.scoring import load_scores, score
from collm.errors import CollmError
from collm.models.backbone import rope_switches
from collm.training.batching import EpochSampler, evened
from collm.training.dataset import assemble
from collm.training.hidden import collect_hidden
from collm.training.recipe import parse_recipe
from collm.training.train import train

SWITCH = 40
LONGROPE = {
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": SWITCH,
        "factor": 6.4,
    },
}


@pytest.fixture
def longrope(tiny_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    return tiny_model(**LONGROPE)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts of some 20 tokens, and some of more than 40."""
    rows = [
        {"prompt": f"{a} + 3 =", "completion": " " + "1 2 3 " * (3 if a % 3 else 12 + a) + "#"} for a in range(3, 23)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(length: int) -> Row:
    return Row(
        input_ids=np.arange(length, dtype=np.int32),
        labels=np.arange(length, dtype=np.int32),
        assistant_log_probs=np.zeros((length, 1), np.float32),
        assistant_top1=np.zeros((length, 1), np.bool_),
        pseudo_labels=np.zeros(length, np.int32),
    )


def test_batches_do_not_cross_a_switch() -> None:
    lengths = [9, 50, 41, 12, 40, 42, 39]
    assert plan_batches(lengths, range(7), 1000) == [[1, 5, 2, 4, 6, 3, 0]]
    # A sequence of 41 tokens reads 40 of them.
    assert plan_batches(lengths, range(7), 1000, [40]) == [[1, 5], [2, 4, 6, 3, 0]]


@pytest.mark.parametrize("grouped", [True, False])
def test_steps_do_not_cross_a_switch(grouped: bool) -> None:
    rows = evened([row(n) for n in [9, 50, 41, 12, 40, 42, 39, 8, 7]], 4, [40])
    lengths = [len(r["input_ids"]) for r in rows]
    assert sorted(lengths) == [7, 8, 9, 9, 9, 12, 39, 40, 41, 42, 50, 50]
    assert sum(bool((r["labels"] != IGNORED).any()) for r in rows) == 9, "what fills up counts nothing"
    sampler = EpochSampler(lengths, 4, seed=0, grouped=grouped, switches=[40])
    order = list(sampler)
    assert sorted(order) == list(range(12))
    for start in range(0, 12, 4):
        assert len({lengths[i] > 40 for i in order[start : start + 4]}) == 1


def test_one_side_stays_as_it_is() -> None:
    rows = [row(n) for n in (5, 6, 7)]
    assert evened(rows, 4, [40]) == rows and len(evened(rows, 4, [], always=True)) == 4


def test_scores_and_hidden_states_are_those_of_each_text_alone(
    longrope: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    assert rope_switches(longrope) == (SWITCH,)
    examples, formatter = load_examples(data), Formatter(tiny_tokenizer)
    lengths = [len(formatter.encode(example)) for example in examples]
    assert min(lengths) < SWITCH < max(lengths)

    def scored(examples: list[Example], name: str, batch_tokens: int) -> list[list[float]]:
        path = score(examples, longrope, formatter, tmp_path / name, batch_tokens=batch_tokens, progress=False)
        return [list(found["log_prob"]) for found in load_scores(path)]

    together, alone = scored(examples, "together", 10_000), scored(examples, "alone", 1)
    for left, right in zip(together, alone, strict=True):
        assert left == pytest.approx(right, abs=1e-4)
    items = assemble(examples, formatter, 256, [tmp_path / "together"])
    hidden, _ = collect_hidden(longrope, items, limit=10**9, batch_tokens=10_000, progress=False)
    single, _ = collect_hidden(longrope, items, limit=10**9, batch_tokens=1, progress=False)
    torch.testing.assert_close(hidden, single, atol=1e-4, rtol=1e-4)


def recipe(folder: Path, data: Path, out: str, batch_size: int, accumulation: int, **trainer: Any) -> Any:
    return parse_recipe(
        {
            "out": str(folder / out),
            "base": {"model": str(folder / "base")},
            "objective": "sft",
            "data": {"train": str(data), "validation": str(data), "max_length": 256},
            "training": {
                "epochs": 1,
                "batch_size": batch_size,
                "gradient_accumulation": accumulation,
                "learning_rate": 1e-3,
                "evaluations": 1,
            },
            "trainer": trainer,
        }
    )


def test_training_does_not_mix_them(
    longrope: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    """Texts one by one see the factors of their own length; four at a time must do so, too."""
    longrope.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    outs = [
        train(recipe(tmp_path, data, f"batch{size}", size, 4 // size), progress=False, restart=False) for size in (4, 1)
    ]
    from safetensors.torch import load_file

    left, right = (load_file(out / "model.safetensors") for out in outs)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-5, rtol=0)
    with pytest.raises(CollmError, match="longrope takes other factors"):
        train(recipe(tmp_path, data, "mixed", 4, 1, train_sampling_strategy="sequential"), progress=False)


def test_mixed_batches_would_differ(longrope: PreTrainedModel) -> None:
    """What the other tests rest on: one long row changes the hidden states of a short one."""
    batch = Collator()([row(10), row(60)])
    with torch.inference_mode():
        short = longrope(input_ids=batch["input_ids"][:1, :10]).logits[0]
        beside = longrope(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[0, :10]
    assert float((short - beside).abs().max()) > 0.1
