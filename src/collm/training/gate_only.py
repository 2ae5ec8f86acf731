"""Marginal-likelihood training of the gate alone, over cached hidden states: seconds instead of hours.

Hidden states that are more than fits into memory are read by parts; on a GPU, where there is one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from collm.errors import CollmError
from collm.gate import log_gate, log_posterior, token_nll
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.training.hidden import part_rows
from collm.training.initialisation import Standardiser
from collm.training.model import LossConfig, objective_loss
from collm.training.price import Price, held_out_loss

BLOCK = 1024
"""Tokens that are read from the file in one piece: some megabytes."""
ROWS = 65_536
"""Tokens that are evaluated at once."""


@dataclass(frozen=True)
class GateData:
    """Labelled tokens, or chunks, with the base frozen: `hidden` `[N, H]`, `log_probs` `[N, 1+K]`, base first."""

    hidden: Tensor
    log_probs: Tensor
    labelled: int | None = None
    """Tokens that losses are divided by, where rows are chunks; None: the rows are tokens."""

    @property
    def count(self) -> int:
        return len(self.hidden) if self.labelled is None else self.labelled

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    def parts(self, device: torch.device, generator: torch.Generator | None = None) -> Iterator[GateData]:
        """The tokens, `part_rows` at a time, on the device.

        Args:
            generator: draws which tokens make a part, by blocks that are read in one piece; None: in order. All of them
                are one part where they fit.
        """
        rows = part_rows(self.width)
        if generator is None or len(self.hidden) <= rows:
            for hidden, log_probs in zip(self.hidden.split(rows), self.log_probs.split(rows), strict=True):
                yield GateData(hidden.to(device), log_probs.to(device))
            return
        hidden_blocks, log_prob_blocks = self.hidden.split(BLOCK), self.log_probs.split(BLOCK)
        order = torch.randperm(len(hidden_blocks), generator=generator)
        for chosen in order.split(max(1, rows // BLOCK)):
            yield GateData(
                torch.cat([hidden_blocks[i] for i in chosen]).to(device),
                torch.cat([log_prob_blocks[i] for i in chosen]).to(device),
            )

    def resident(self, device: torch.device) -> GateData:
        """All of it on the device, where it is one part."""
        if not 0 < len(self.hidden) <= part_rows(self.width):
            return self
        return replace(next(self.parts(device)), labelled=self.labelled)


@dataclass(frozen=True)
class HeldOut:
    """Sums over tokens, as means: of the objective, both likelihoods, the gate and its posterior, `[1+K]` each."""

    objective: float
    nll: float
    base_nll: float
    gate: Tensor
    posterior: Tensor

    def loss(self, config: LossConfig) -> float:
        """What the best gate is chosen by."""
        if config.target_rate is None:
            return self.objective
        return held_out_loss(self.nll, 1.0 - float(self.gate[0]), config.target_rate)


@torch.inference_mode()
def evaluate_gate(
    head: DeferralHead, data: GateData, config: LossConfig, standardise: Standardiser | None = None
) -> HeldOut:
    """Means per token.

    Args:
        standardise: what the head was made for; None: raw hidden states.
    """
    device = head.weight.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    gate, posterior = (torch.zeros(1 + head.num_assistants, dtype=torch.float64, device=device) for _ in range(2))
    for part in data.parts(device):
        for hidden, log_probs in zip(part.hidden.split(ROWS), part.log_probs.split(ROWS), strict=True):
            gates = log_gate(head(hidden if standardise is None else standardise(hidden)))
            objective = objective_loss(gates, log_probs, None, config)
            sums += torch.stack([objective.sum(), token_nll(gates, log_probs).sum(), -log_probs[:, 0].sum()])
            gate += gates.exp().sum(0)
            posterior += log_posterior(gates, log_probs).exp().sum(0)
    objective_sum, nll, base_nll = (sums / max(1, data.count)).tolist()
    count = max(1, len(data.hidden))
    return HeldOut(objective_sum, nll, base_nll, (gate / count).cpu(), (posterior / count).cpu())


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
    """The head with the best held-out objective, trained on its device.

    Steps are taken on standardised hidden states and folded back, so `learning_rate` means the same for every model.

    Raises:
        CollmError: the loss is not a number.
    """
    device = head.weight.device
    standardise = Standardiser.of(train.hidden).to(device)
    with torch.no_grad():  # unfold: the same head for standardised hidden states
        head.bias.add_(head.weight @ standardise.mean)
        head.weight.mul_(standardise.std)
    train, validation = train.resident(device), validation.resident(device)
    best, waited = copy.deepcopy(head), 0
    best_loss = evaluate_gate(head, validation, config, standardise).loss(config)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    price = None
    if config.target_rate is not None:
        price = Price(config.target_rate, math.ceil(epochs) * math.ceil(len(train.hidden) / batch_tokens), device)
    for epoch in range(math.ceil(epochs)):
        total = torch.zeros((), dtype=torch.float64, device=device)
        gates = torch.zeros(1 + head.num_assistants, dtype=torch.float64, device=device)
        for part in train.parts(device, generator):
            order = torch.randperm(len(part.hidden), generator=generator).to(device)
            for batch in order.split(batch_tokens):
                gate = log_gate(head(standardise(part.hidden[batch])))
                charged = None if price is None else price.value
                losses = objective_loss(gate, part.log_probs[batch], None, config, charged)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
                total += losses.detach().sum()
                gates += gate.detach().exp().sum(0)
                if price is not None:
                    price.step(-torch.expm1(gate.detach()[:, 0]).mean())
        if not math.isfinite(float(total)):
            raise CollmError(
                f"the loss is {float(total)} in epoch {epoch + 1}: check the scores, lower gate_learning_rate"
            )
        held_out = evaluate_gate(head, validation, config, standardise)
        figures = {"epoch": epoch + 1, "loss": float(total) / train.count, "eval_loss": held_out.loss(config)}
        figures |= {"deferred": 1.0 - float(gates[0]) / len(train.hidden)}
        figures |= {"eval_nll": held_out.nll, "eval_deferred": 1.0 - float(held_out.gate[0])}
        log(figures if price is None else {**figures, "price": float(price.value)})
        if held_out.loss(config) < best_loss:
            best, best_loss, waited = copy.deepcopy(head), held_out.loss(config), 0
        else:
            waited += 1
            if waited > patience:
                break
    standardise.fold(best)
    return best


def gate_figures(head: DeferralHead, data: GateData, config: LossConfig, info: CheckpointInfo) -> dict[str, float]:
    """What the Trainer logs for the other ways of training: means per held-out token."""
    found = evaluate_gate(head, data, config)
    figures = {"eval_loss": found.loss(config), "eval_nll": found.nll, "eval_base_nll": found.base_nll}
    for k, assistant in enumerate(info.assistants, start=1):
        figures[f"eval_gate/{assistant.name}"] = float(found.gate[k])
        figures[f"eval_posterior/{assistant.name}"] = float(found.posterior[k])
    return figures
