"""The decision itself, on rows of logits: plain tensors, nothing of vLLM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.models.served import ServedInfo
from collm.vllm_plugin.request import NEVER, Rule


class Rows:
    """A rule for each row of the engine's batch. Written on the host, and copied when it has changed."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._rules = [NEVER] * size
        self._signals = torch.zeros(size, dtype=torch.long, device=device)
        self._cuts = torch.full((size,), torch.inf, device=device)
        self._changed = False
        self.defers = self.reads_law = False
        """Whether any row does."""

    def __getitem__(self, row: int) -> Rule:
        return self._rules[row]

    def __setitem__(self, row: int, rule: Rule) -> None:
        self._rules[row] = rule
        self._changed = True

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Signals `[size]` (their numbers) and cuts `[size]`, on the device."""
        if self._changed:
            self._signals.copy_(torch.tensor([rule.signal for rule in self._rules]))
            self._cuts.copy_(torch.tensor([rule.cut for rule in self._rules]))
            self.defers = any(rule.defers for rule in self._rules)
            self.reads_law = any(rule.reads_law for rule in self._rules)
            self._changed = False
        return self._signals, self._cuts


class Gate:
    """The gate among the logits of an export."""

    def __init__(self, info: ServedInfo, device: torch.device) -> None:
        self.info = info
        self._ids = torch.tensor(info.defer_token_ids, device=device)
        self._bias = torch.tensor(info.bias, device=device)

    def scores(self, logits: Tensor) -> Tensor:
        """`[N, K]` float32."""
        return logits[:, self._ids].float() * self.info.scale + self._bias

    def signals(self, logits: Tensor, log_odds: Tensor) -> Tensor:
        """`[N, 4]`: what `decoding.policies` compares with a cut, in the order of `request.SIGNALS`."""
        law = torch.log_softmax(logits[:, : self.info.vocab_size].float(), dim=-1)
        top = law.amax(dim=-1)
        error = torch.log((-torch.expm1(top)).clamp(min=2.0**-24))
        gain = -F.softplus(-log_odds) + error
        return torch.stack([log_odds, gain, torch.special.entr(law.exp()).sum(dim=-1), -top], dim=-1)

    def decide(self, logits: Tensor, signals: Tensor, cuts: Tensor, *, defers: bool, reads_law: bool) -> Tensor:
        """Leave each row its deferral token alone where its signal exceeds its cut, and all tokens of text elsewhere.

        Args:
            logits: `[N, V]`, changed in place.
            signals: `[N]`, which signal each row compares.
            cuts: `[N]`.
            defers: whether any row could; spares the work.
            reads_law: whether any row compares something else than the gate.
        """
        hidden = slice(self.info.vocab_size, None)
        if not defers:
            logits[:, hidden] = -torch.inf
            return logits
        scores = self.scores(logits)
        odds = torch.logsumexp(scores, dim=-1)
        value = odds
        if reads_law:
            value = self.signals(logits, odds).gather(1, signals[:, None])[:, 0]
        go = value > cuts
        logits[:, hidden] = -torch.inf
        # All of it on the device: to ask which rows defer would make the host wait for the pass.
        logits.masked_fill_(go[:, None], -torch.inf)
        chosen = self._ids[scores.argmax(dim=-1)]
        logits.scatter_(1, chosen[:, None], torch.where(go, 0.0, -torch.inf).to(logits)[:, None])
        return logits
