"""Training data: each gold token of the base's sequences with its scores under every model."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm.data.collate import IGNORED, Row
from collm.data.encoding import encode_examples
from collm.data.examples import Example, examples_fingerprint, load_examples
from collm.data.formatting import Encoded, Formatter
from collm.data.scores import load_scores
from collm.errors import CollmError
from collm.gate import pseudo_labels
from collm.training.recipe import DataSection


@dataclass(frozen=True)
class ScoredSet:
    """Encoded examples and, flat over all their `N` labelled tokens in order, the scores of the *untuned* models."""

    items: tuple[Encoded, ...]
    base_log_probs: Tensor
    """`[N]` float32."""
    base_top1: Tensor
    """`[N]` bool."""
    log_probs: Tensor
    """`[N, K]` float32, assistants; -inf where one abstains or saw less of the text."""
    top1: Tensor
    """`[N, K]` bool."""

    def pseudo_labels(self, method: str) -> Tensor:
        """`[N]` in 0..K."""
        return pseudo_labels(self.base_top1, self.top1, self.log_probs, method)

    @property
    def count(self) -> int:
        return len(self.base_log_probs)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each example's labelled tokens end in the flat arrays."""
        return np.cumsum([item.num_labelled for item in self.items])

    def rows(self, labels: Tensor) -> list[Row]:
        """What the collator wants, with `labels` `[N]` as pseudo-labels."""
        rows: list[Row] = []
        num_assistants = self.log_probs.shape[1]
        for item, end in zip(self.items, self.ends, strict=True):
            span = slice(int(end) - item.num_labelled, int(end))
            ids, mask = np.array(item.token_ids, np.int32), np.array(item.labelled)
            log_probs = np.zeros((len(ids), num_assistants), np.float32)
            log_probs[mask] = self.log_probs[span].numpy()
            top1 = np.zeros((len(ids), num_assistants), np.bool_)
            top1[mask] = self.top1[span].numpy()
            weak = np.zeros(len(ids), np.int32)
            weak[mask] = labels[span].numpy()
            rows.append(
                Row(
                    input_ids=ids,
                    labels=np.where(mask, ids, IGNORED).astype(np.int32),
                    assistant_log_probs=log_probs,
                    assistant_top1=top1,
                    pseudo_labels=weak,
                )
            )
        return rows


def load_split(data: DataSection) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; without a validation file, a hash of each id decides, so that adding examples
    moves none from one side to the other."""
    options: dict[str, Any] = {"skip_bad": data.skip_bad, "last_turn": data.last_turn}
    train = load_examples(data.train, **options)
    if data.validation is not None:
        return train, load_examples(data.validation, **options)
    held_out = [zlib.crc32(example.id.encode()) / 2**32 < data.validation_share for example in train]
    validation = [example for example, out in zip(train, held_out, strict=True) if out]
    rest = [example for example, out in zip(train, held_out, strict=True) if not out]
    if not validation or not rest:
        raise CollmError(
            f"{len(train)} examples cannot be split with validation_share {data.validation_share}: "
            "raise it, or give a validation file"
        )
    return rest, validation


def digest(value: object) -> str:
    """Eight hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def assemble(examples: Sequence[Example], formatter: Formatter, max_length: int, paths: Sequence[Path]) -> ScoredSet:
    """Encode examples with the base's `formatter` and put every model's scores beside them, matched by id.

    Args:
        paths: scores of the base, then of each assistant; none for plain fine-tuning, which needs no scores.

    Raises:
        CollmError: an example has no scores, or was scored as something else.
    """
    encoded = encode_examples(examples, formatter, max_length=max_length)
    kept = encoded.kept
    items = tuple(encoded.items[i] for i in kept)
    count, num_models = sum(item.num_labelled for item in items), max(1, len(paths))
    log_probs = torch.full((count, num_models), -torch.inf)
    top1 = torch.zeros(count, num_models, dtype=torch.bool)
    for k, path in enumerate(paths):
        found = {str(row["id"]): row for row in load_scores(path).with_format("numpy")}
        missing = [
            examples[i]
            for i in kept
            if examples[i].id not in found or found[examples[i].id]["example"] != examples_fingerprint([examples[i]])
        ]
        if missing:
            raise CollmError(
                f"{path} has no scores for {len(missing)} of {len(examples)} examples as they now are "
                f"(such as {missing[0].label}): score the same data again"
            )
        start = 0
        for i, item in zip(kept, items, strict=True):
            row = found[examples[i].id]
            # A longer prompt may have left an assistant fewer tokens within max_length: always the first ones.
            n = min(len(row["log_prob"]), item.num_labelled)
            log_probs[start : start + n, k] = torch.tensor(row["log_prob"][:n])
            top1[start : start + n, k] = torch.tensor(row["top1"][:n])
            start += item.num_labelled
    return ScoredSet(items, log_probs[:, 0], top1[:, 0], log_probs[:, 1:], top1[:, 1:])
