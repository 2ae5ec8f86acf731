"""Base model and gate as one module, so that both run inside one wrapped forward pass (DDP, FSDP, ZeRO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from collm import gate
from collm.cuts import START
from collm.data.collate import IGNORED
from collm.models.backbone import causal_lm, hidden_states, logits_rows, project
from collm.models.head import DeferralHead
from collm.models.openings import Openings, places

Objective = Literal["marginal", "weak_supervision", "sft"]


@dataclass(frozen=True)
class LossConfig:
    objective: Objective = "marginal"
    deferral_cost: float = 0.0
    target_rate: float | None = None
    """The price of a deferred token is then found during training, instead of `deferral_cost`."""


def objective_loss(
    log_gate: Tensor,
    log_probs: Tensor,
    pseudo_labels: Tensor | None,
    config: LossConfig,
    price: Tensor | None = None,
) -> Tensor:
    """The loss per labelled token, `[N]`, of `[N, 1+K]` log-gates and gold-token log-probabilities.

    Args:
        price: nats a deferred token, instead of `config.deferral_cost`.
    """
    if config.objective == "sft":
        return -log_probs[:, 0]
    if config.objective == "weak_supervision":
        assert pseudo_labels is not None
        loss = gate.weak_supervision_loss(log_gate, log_probs[:, 0], pseudo_labels)
    else:
        loss = gate.token_nll(log_gate, log_probs)
    if price is not None or config.deferral_cost:
        # expm1 keeps small probabilities of deferring exact.
        loss = loss - (config.deferral_cost if price is None else price) * torch.expm1(log_gate[:, 0])
    return loss


class BaseWithGate(nn.Module):
    """The trainable side of the system: base model and deferral head. Assistants enter as stored scores only."""

    accepts_loss_kwargs = True
    """Tells transformers' Trainer to pass the number of labelled tokens of the whole accumulation."""

    def __init__(
        self,
        model: nn.Module,
        head: DeferralHead | None,
        config: LossConfig,
        vocab_size: int | None = None,
        openings: Openings | None = None,
    ) -> None:
        """Args:
        vocab_size: of the base's tokenizer; logits beyond it are padding and take no part in the law.
        openings: of the base's tokens, where models share chunks.
        """
        super().__init__()
        self.openings = openings
        self.vocab_size = vocab_size
        self.model = model
        self.head = head
        self.loss_config = config
        self.detailed = False
        """Whether the outputs have `tokens`, for `rates.TokenTable`."""
        self.price: Tensor | None = None
        """What the loss charges for a deferred token now, where it follows a target rate."""

    @property
    def config(self) -> Any:
        return causal_lm(self.model).config

    @property
    def _no_split_modules(self) -> list[str]:
        """Which layers accelerate shards as units (FSDP), by the names of their classes."""
        present = {type(module).__name__ for module in self.modules()}
        return [name for name in causal_lm(self.model)._no_split_modules or () if name in present]

    def gradient_checkpointing_enable(self) -> None:
        lm: PreTrainedModel = causal_lm(self.model)
        lm.gradient_checkpointing_enable({"use_reentrant": False})

    def _of_base(self, hidden: Tensor, gold: Tensor) -> Tensor:
        """`[2, N]` float32 at hidden states `[N, H]`: log-probabilities of gold tokens; 1 where one is the first choice
        (0 in training mode).

        Logits exist for `logits_rows` positions at a time. Where there are more, the backward pass computes them again:
        8,192 positions of a vocabulary of 128k would keep 12 GiB of them otherwise.
        """

        def part(states: Tensor, ids: Tensor) -> Tensor:
            logits = project(self.model, states)[:, : self.vocab_size].float()
            log_probs = -F.cross_entropy(logits, ids, reduction="none")
            right = torch.zeros_like(log_probs) if self.training else (logits.argmax(-1) == ids).float()
            return torch.stack([log_probs, right])

        return self._in_parts(part, hidden, gold)

    def _in_parts(self, part: Callable[..., Tensor], hidden: Tensor, *more: Tensor) -> Tensor:
        rows = logits_rows(self.model)
        if len(hidden) <= rows:
            return part(hidden, *more)
        pieces = zip(hidden.split(rows), *(each.split(rows) for each in more), strict=True)
        # Nothing random lies behind the hidden states, so no generator's state has to be kept.
        parts = [checkpoint(part, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
        return torch.cat(parts, dim=1)

    def _of_chunks(self, hidden: Tensor, ids: Tensor, labelled: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """`[C]` each, of the labelled chunks: the base's log-probabilities with their closing factors; 1 where it would
        write the chunk (0 in training mode).

        Args:
            hidden: `[B, T-1, H]`; ids, labelled, last: `[B, T-1]` of the tokens that they predict (`Chunked.opens`).
        """
        assert self.openings is not None
        wanted = (labelled | (last >= 0)).nonzero(as_tuple=True)
        states, gold, before, counted = hidden[wanted], ids[wanted], last[wanted], labelled[wanted]
        openings = self.openings = self.openings.to(gold.device)

        def part(states: Tensor, gold: Tensor, before: Tensor) -> Tensor:
            logits = project(self.model, states)[:, : self.vocab_size].float()
            return torch.stack(places(logits, gold, before, openings, choices=not self.training))

        log_prob, close, right, opens = self._in_parts(part, states, gold, before)
        opening = before >= 0
        chunk = opening.cumsum(0) - 1  # of each place; the first place of a turn opens
        num = int(opening.sum())
        own = log_prob.new_zeros(num).index_add(0, chunk[counted], log_prob[counted])
        wrong = log_prob.new_zeros(num).index_add(0, chunk[counted], 1.0 - right[counted])
        # A chunk closes where the next one of its turn opens; the end of a turn closes nothing.
        goes_on = F.pad(before[opening][1:] != START, (0, 1))[:num]
        at_start, at_end = close[opening], F.pad(close[opening][1:], (0, 1))[:num]
        closes = F.pad(opens[opening][1:], (0, 1))[:num] > 0
        scores = own - at_start + torch.where(goes_on, at_end, 0.0)
        written = (wrong == 0) & (closes | ~goes_on)
        mine = counted[opening]
        return scores[mine], written[mine].float() * (0.0 if self.training else 1.0)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        assistant_log_probs: Tensor | None = None,
        assistant_top1: Tensor | None = None,
        pseudo_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        opens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss, and sums over labelled tokens for the log.

        Where models share chunks, a chunk stands for its tokens: the loss is a sum over chunks, still divided by
        labelled tokens, so that figures compare; gates and posteriors are sums over `chunks` of them.

        Args:
            input_ids, attention_mask: `[B, T]`.
            labels: `[B, T]`, the token id where it is to be predicted, else `IGNORED`; not shifted.
            assistant_log_probs: `[B, T, K]` float32, log-probability of token t under each assistant.
            assistant_top1: `[B, T, K]` bool, only read for `tokens`.
            pseudo_labels: `[B, T]`, for weak supervision.
            num_items_in_batch: labelled tokens of the whole step (all accumulated batches, all processes); the loss
                is the sum over this batch divided by it. Without it, by the batch's own count.
            opens: `[B, T]`, `Chunked.opens`; what is said above of tokens is then said of the first ones of chunks.
        """
        hidden = hidden_states(self.model, input_ids, attention_mask, use_cache=False)
        mask = labels[:, 1:] != IGNORED  # [B, T-1]; token t+1 is predicted at position t
        # As indices: each selection by a mask would wait for the device, to know how many there are.
        if opens is None:
            starts = mask.nonzero(as_tuple=True)
            at_start = hidden[:, :-1][starts]  # [N, H]
            base_log_probs, base_right = self._of_base(at_start, labels[:, 1:][starts])
        else:
            last = opens[:, 1:]
            starts = (mask & (last >= 0)).nonzero(as_tuple=True)
            at_start = hidden[:, :-1][starts]
            base_log_probs, base_right = self._of_chunks(hidden[:, :-1], input_ids[:, 1:], mask, last)
        if self.head is None or assistant_log_probs is None:
            log_gate, log_probs = base_log_probs.new_zeros(len(at_start), 1), base_log_probs[:, None]
        else:
            log_gate = gate.log_gate(self.head(at_start))
            log_probs = torch.cat([base_log_probs[:, None], assistant_log_probs[:, 1:][starts].float()], dim=-1)
        weak = None if pseudo_labels is None else pseudo_labels[:, 1:][starts]
        losses = objective_loss(log_gate, log_probs, weak, self.loss_config, self.price)
        labelled = len(at_start) if opens is None else int(mask.sum())
        count = losses.new_tensor(max(1, labelled))
        with torch.no_grad():
            sums = {
                "count": losses.new_tensor(labelled),
                "objective": losses.sum(),
                "nll": gate.token_nll(log_gate, log_probs).sum(),
                "base_nll": -base_log_probs.sum(),
                "base_right": base_right.sum(),
                "gate": log_gate.exp().sum(0),  # [1+K]
                "posterior": gate.log_posterior(log_gate, log_probs).exp().sum(0),  # [1+K]
            }
            if opens is not None:
                sums["chunks"] = losses.new_tensor(len(at_start))
            if self.detailed and assistant_top1 is not None:
                base = torch.stack([base_log_probs, base_right], dim=1)
                sums["tokens"] = torch.cat(
                    [base, log_gate, log_probs[:, 1:], assistant_top1[:, 1:][starts].float()], dim=1
                )
        return {"loss": losses.sum() / (count if num_items_in_batch is None else num_items_in_batch), **sums}
