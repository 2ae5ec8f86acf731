"""Training rows to padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""The label of tokens that are not to be predicted, as everywhere in transformers."""


class Row(TypedDict):
    """One example: `[T]` token ids and labels, `[T, K]` assistant log-probabilities and top-1, `[T]` pseudo-labels."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    assistant_log_probs: NDArray[np.float32]
    assistant_top1: NDArray[np.bool_]
    pseudo_labels: NDArray[np.int32]
    opens: NotRequired[NDArray[np.int32]]
    """Where models share chunks, not tokens: `Chunked.opens`, `[T]`; what stands above belongs to first tokens."""


@dataclass(frozen=True)
class Collator:
    """Pads on the right. Padding is masked and unlabelled; its log-probabilities are 0, so nothing infinite enters."""

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        num_assistants = rows[0]["assistant_log_probs"].shape[1]
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        labels = torch.full((len(rows), length), IGNORED)
        pseudo_labels = torch.zeros(len(rows), length, dtype=torch.long)
        log_probs = torch.zeros(len(rows), length, num_assistants)
        top1 = torch.zeros(len(rows), length, num_assistants, dtype=torch.bool)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            input_ids[i, :n] = torch.from_numpy(row["input_ids"])
            attention_mask[i, :n] = 1
            labels[i, :n] = torch.from_numpy(row["labels"])
            pseudo_labels[i, :n] = torch.from_numpy(row["pseudo_labels"])
            top1[i, :n] = torch.from_numpy(row["assistant_top1"])
            log_probs[i, :n] = torch.from_numpy(row["assistant_log_probs"])
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "assistant_log_probs": log_probs,
            "assistant_top1": top1,
            "pseudo_labels": pseudo_labels,
        }
        if "opens" in rows[0]:
            batch["opens"] = torch.full((len(rows), length), -1)
            for i, row in enumerate(rows):
                batch["opens"][i, : len(row["opens"])] = torch.from_numpy(row["opens"])
        return batch
