"""A folder to train in: a base, another model to learn with, sums as data; and the recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def teach(
    folder: Path,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    answer: Callable[[int, int], str] = lambda a, b: f"{a} + {b} = {a + b}",
) -> Path:
    """Write the models, 32 sums to train on and 4 held out."""
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"messages": [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": answer(a, b)}]}
        for a in range(3, 9)
        for b in range(10, 16)
    ]
    for name, part in (("train", rows[:32]), ("validation", rows[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def recipe_values(workplace: Path, out: str, **changes: Any) -> dict[str, Any]:
    """A recipe for `base` with a calculator and `other`; a dict among the changes is laid over what is there."""
    values: dict[str, Any] = {
        "out": str(workplace / out),
        "cache": str(workplace / "cache"),
        "base": {"model": str(workplace / "base")},
        "assistants": [
            {"name": "calculator", "model": "calculator"},
            {"name": "other", "model": str(workplace / "other")},
        ],
        "data": {"train": str(workplace / "train.jsonl"), "validation": str(workplace / "validation.jsonl")},
        "init": {"max_tokens": 100},
        "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "evaluations": 2},
    }
    for key, change in changes.items():
        values[key] = {**values.get(key, {}), **change} if isinstance(change, dict) else change
    return values
