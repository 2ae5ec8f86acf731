"""Logits in parts: training sees the same loss and gradients, and never more of them than a bound at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from collm.data.collate import IGNORED
from collm.models import backbone
from collm.models.head import DeferralHead
from collm.training.model import BaseWithGate, LossConfig

VOCABULARY, HIDDEN, ROWS = 320, 32, 7


class Largest(TorchDispatchMode):
    """Notes the most rows of any tensor over the vocabulary that is made while it is on."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and are_logits(leaf):
                self.rows = max(self.rows, leaf.shape[0])
        return made


def are_logits(tensor: Tensor) -> bool:
    """`[rows, V]`, or without the two that pad the vocabulary; the output head's weights are `[H, V]` in places."""
    return tensor.dim() == 2 and tensor.shape[1] in (VOCABULARY, VOCABULARY - 2) and tensor.shape[0] != HIDDEN


def batch(kind: str, num_assistants: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY - 2, (3, 24), generator=generator)
    labels = ids.clone()
    labels[:, :5] = IGNORED
    labels[1, 20:] = IGNORED
    if kind == "few":
        labels[:, 7:] = IGNORED  # one part is enough
    if kind == "none":
        labels[:] = IGNORED
    scores = -3 * torch.rand(3, 24, num_assistants, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "assistant_log_probs": scores,
        "pseudo_labels": (scores[..., 0] > -1).long(),
    }


def loss_and_gradients(module: BaseWithGate, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    module.zero_grad()
    outputs = module(**inputs)
    outputs["loss"].backward()
    return outputs, [torch.zeros(0) if p.grad is None else p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("kind", ["many", "few", "none"])
@pytest.mark.parametrize("objective", ["marginal", "weak_supervision", "sft"])
def test_parts_change_neither_loss_nor_gradients(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, kind: str, objective: Any
) -> None:
    torch.manual_seed(0)
    head = None if objective == "sft" else DeferralHead(HIDDEN, 1)
    if head is not None:
        torch.nn.init.normal_(head.weight)
    module = BaseWithGate(tiny_model(), head, LossConfig(objective, 0.1), VOCABULARY - 2).train()
    inputs = batch(kind)
    whole, whole_gradients = loss_and_gradients(module, inputs)
    monkeypatch.setattr(backbone, "LOGITS_AT_ONCE", VOCABULARY * ROWS)
    parts, gradients = loss_and_gradients(module, inputs)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])
    for left, right in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-5)


def test_memory_is_bounded_by_the_part(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BaseWithGate(tiny_model(), DeferralHead(HIDDEN, 1), LossConfig(), VOCABULARY - 2).train()
    inputs = batch("many")

    def measure() -> tuple[int, int]:
        """Most rows of logits made at once, and rows kept for the backward pass."""
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += len(tensor) if are_logits(tensor) else 0
            return tensor

        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = module(**inputs)["loss"]
            loss.backward()
        return largest.rows, kept

    labelled = int((inputs["labels"][:, 1:] != IGNORED).sum())
    rows, kept = measure()
    assert rows == labelled and kept >= labelled  # the measure sees them where nothing is cut
    monkeypatch.setattr(backbone, "LOGITS_AT_ONCE", VOCABULARY * ROWS)
    assert measure() == (ROWS, 0)


def test_rows_follow_the_vocabulary(tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert backbone.logits_rows(tiny_model(vocab_size=4096)) == 2**14
    model = tiny_model()
    model.config.vocab_size = 151_936  # Qwen2.5's
    assert backbone.logits_rows(model) * 151_936 * 4 <= 256 * 2**20
    model.config.vocab_size = 2**30
    assert backbone.logits_rows(model) == 1
