"""Marginal-likelihood training of the gate alone, over cached hidden states: seconds instead of hours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from collm.errors import CollmError
from collm.gate import log_gate, log_posterior, token_nll
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.training.initialisation import Standardiser
from collm.training.model import LossConfig, objective_loss


@dataclass(frozen=True)
class GateData:
    """Labelled tokens with the base frozen: `hidden` `[N, H]`, `log_probs` `[N, 1+K]`, base first."""

    hidden: Tensor
    log_probs: Tensor


@torch.inference_mode()
def evaluate_gate(head: DeferralHead, data: GateData, config: LossConfig, chunk: int = 65_536) -> float:
    """Mean objective per token."""
    total = 0.0
    for hidden, log_probs in zip(data.hidden.split(chunk), data.log_probs.split(chunk), strict=True):
        total += float(objective_loss(log_gate(head(hidden)), log_probs, None, config).sum())
    return total / max(1, len(data.hidden))


def train_gate(
    head: DeferralHead,
    train: GateData,
    validation: GateData,
    config: LossConfig,
    *,
    learning_rate: float,
    epochs: float,
    batch_tokens: int,
    patience: int,
    seed: int,
    log: Callable[[dict[str, float]], None],
) -> DeferralHead:
    """The head with the best held-out objective.

    Steps are taken on standardised hidden states and folded back, so `learning_rate` means the same for every model.

    Raises:
        CollmError: the loss is not a number.
    """
    standardise = Standardiser.of(train.hidden)
    with torch.no_grad():  # unfold: the same head for standardised hidden states
        head.bias.add_(head.weight @ standardise.mean)
        head.weight.mul_(standardise.std)
    # Held-out data are few and are standardised once; training data by the batch, to hold them only once.
    held_out = GateData(standardise(validation.hidden), validation.log_probs)
    best, best_loss, waited = copy.deepcopy(head), evaluate_gate(head, held_out, config), 0
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(math.ceil(epochs)):
        order = torch.randperm(len(train.hidden), generator=generator).to(train.hidden.device)
        total = 0.0
        for batch in order.split(batch_tokens):
            losses = objective_loss(
                log_gate(head(standardise(train.hidden[batch]))), train.log_probs[batch], None, config
            )
            loss = losses.mean()
            if not bool(torch.isfinite(loss)):
                raise CollmError(
                    f"the loss is {float(loss)} in epoch {epoch + 1}: check the scores, lower gate_learning_rate"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(losses.detach().sum())
        held_out_loss = evaluate_gate(head, held_out, config)
        log({"epoch": epoch + 1, "loss": total / len(train.hidden), "eval_loss": held_out_loss})
        if held_out_loss < best_loss:
            best, best_loss, waited = copy.deepcopy(head), held_out_loss, 0
        else:
            waited += 1
            if waited > patience:
                break
    standardise.fold(best)
    return best


@torch.inference_mode()
def gate_figures(head: DeferralHead, data: GateData, config: LossConfig, info: CheckpointInfo) -> dict[str, float]:
    """What the Trainer logs for the other ways of training: means per held-out token."""
    gates = log_gate(head(data.hidden))
    figures = {
        "eval_loss": evaluate_gate(head, data, config),
        "eval_nll": float(token_nll(gates, data.log_probs).mean()),
        "eval_base_nll": -float(data.log_probs[:, 0].mean()),
    }
    posterior = log_posterior(gates, data.log_probs).exp().mean(0)
    for k, assistant in enumerate(info.assistants, start=1):
        figures[f"eval_gate/{assistant.name}"] = float(gates[:, k].exp().mean())
        figures[f"eval_posterior/{assistant.name}"] = float(posterior[k])
    return figures
