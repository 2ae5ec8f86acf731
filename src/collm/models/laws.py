"""From hidden states to predictions: the law of the next token and the gate, and what the host must know of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from collm.gate import log_gate
from collm.models.backbone import project
from collm.models.head import DeferralHead
from collm.types import Prediction


@dataclass(frozen=True, slots=True)
class Laws:
    """The output side of a model. `vocab_size` is that of all models; further logits are padding and cut off."""

    lm: PreTrainedModel
    head: DeferralHead | None
    vocab_size: int

    @property
    def known_tokens(self) -> int:
        """Tokens beyond have probability 0."""
        return int(self.lm.get_output_embeddings().weight.shape[0])

    def of(self, hidden: Tensor) -> list[Prediction | None]:
        """One for each hidden state `[N, H]`; None where it is not a number."""
        log_probs = self._log_probs(hidden)
        # One NaN makes its whole row NaN, in the gate's softmax, too. Float32 holds token ids exactly (up to 2**24), so
        # that all goes to the host at once.
        told = [log_probs[:, :1], log_probs.argmax(dim=-1, keepdim=True).float()]
        if self.head is not None:
            told.append(log_gate(self.head(hidden)))
        return [
            None
            if math.isnan(first) or (gate and math.isnan(gate[0]))
            else Prediction(row, int(top), tuple(gate) if self.head is not None else None)
            for row, (first, top, *gate) in zip(log_probs.unbind(), torch.cat(told, dim=1).tolist(), strict=True)
        ]

    def _log_probs(self, hidden: Tensor) -> Tensor:
        logits = project(self.lm, hidden)[:, : self.vocab_size]
        if logits.dtype == torch.float32 and logits.is_contiguous():
            # In place: for a batch, fresh memory of this size costs many times what is computed in it.
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)
        else:
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        unknown = self.vocab_size - log_probs.shape[1]
        return F.pad(log_probs, (0, unknown), value=-torch.inf) if unknown else log_probs
