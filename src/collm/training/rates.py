"""What a pair would make of held-out text at a few rates: each token from the model that the gate gives it to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATES = (0.1, 0.2, 0.4)


@dataclass(frozen=True)
class TokenTable:
    """Labelled tokens: `[N]` of the base as trained, `[N, 1+K]` of the gate, `[N, K]` of the assistants."""

    base_log_probs: Tensor
    base_right: Tensor
    log_gate: Tensor
    log_probs: Tensor
    right: Tensor


@dataclass(frozen=True)
class AtRate:
    rate: float
    """Really deferred: less than was asked for where the assistants abstain on more of the text."""
    accuracy: float
    """Tokens whose writer's first choice is the gold one, the text before them being given."""
    nll: float
    """Nats per labelled token under the law of each token's writer."""


def at_rates(tokens: TokenTable, rates: Sequence[float] = RATES, labelled: float | None = None) -> list[AtRate]:
    """The tokens (or chunks) of the largest gates go to the assistant of the larger gate, but where it gives one no
    probability, the base writes. (So it does where a tool abstains; a tool that is certain and wrong cannot be told
    from that.)

    Args:
        labelled: tokens that nats are divided by, where rows are chunks; None: as many as rows.
    """
    chosen = tokens.log_gate[:, 1:].argmax(-1, keepdim=True)
    log_probs, right = tokens.log_probs.gather(1, chosen)[:, 0], tokens.right.gather(1, chosen)[:, 0]
    odds = torch.logsumexp(tokens.log_gate[:, 1:], -1) - tokens.log_gate[:, 0]
    order = odds.masked_fill(torch.isneginf(log_probs), -torch.inf).argsort(descending=True, stable=True)
    able = int((~torch.isneginf(log_probs)).sum())
    found = []
    for rate in rates:
        deferred = torch.zeros_like(right)
        deferred[order[: min(able, round(rate * len(order)))]] = True
        accuracy = torch.where(deferred, right, tokens.base_right).float().mean()
        nll = -torch.where(deferred, log_probs, tokens.base_log_probs).double().sum()
        found.append(AtRate(float(deferred.float().mean()), float(accuracy), float(nll) / (labelled or len(order))))
    return found
