"""Initialise the gate: fit it to pseudo-labels with the base frozen.

Hidden states are large and strongly correlated, so the fit runs on standardised ones, in float32, and the scaling is
folded back into theta and b. Classes are balanced: few tokens want an assistant, and a gate that starts near zero
everywhere gives marginal-likelihood training nothing to hold on to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from collm import gate
from collm.models.head import DeferralHead
from collm.training.hidden import part_rows


@dataclass(frozen=True)
class Standardiser:
    """Mean and standard deviation of each hidden feature, `[H]` float32."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> Standardiser:
        """From `[N, H]` hidden states, on the CPU and read by parts. Constant features keep their scale."""
        parts = hidden.split(part_rows(hidden.shape[1]))
        if len(parts) == 1:
            mean, std = hidden.float().mean(dim=0), hidden.float().std(dim=0, correction=0)
        else:  # twice through: a sum of squares less a square would lose what the mean outweighs
            mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(hidden)
            squares = torch.stack([(part.double() - mean).square_().sum(0) for part in parts]).sum(0)
            mean, std = mean.float(), (squares / len(hidden)).sqrt().float()
        return cls(mean, torch.where(std > 1e-6, std, 1.0))

    def to(self, device: torch.device) -> Standardiser:
        return Standardiser(self.mean.to(device), self.std.to(device))

    def __call__(self, hidden: Tensor) -> Tensor:
        return (hidden.float() - self.mean) / self.std

    @property
    def scale(self) -> float:
        """The typical standard deviation: a step of size d in standardised theta is one of d / scale in theta."""
        return float(self.std.square().mean().sqrt())

    def fold(self, head: DeferralHead) -> None:
        """Turn a head for standardised hidden states into the same head for raw ones, in place."""
        with torch.no_grad():
            head.weight.div_(self.std)
            head.bias.sub_(head.weight @ self.mean)


@dataclass(frozen=True)
class GateReport:
    """How the fitted gate fares, "positive" being "defer": shares of tokens in [0, 1]; NaN where there is none."""

    label_share: tuple[float, ...]
    """Share of training tokens with each pseudo-label 0..K."""
    precision: float
    recall: float
    accuracy_of_choice: float
    """Of held-out tokens rightly deferred, the share that went to the labelled assistant (1 for K = 1)."""
    deferred_share: float
    assistant_right: float
    """Of held-out tokens deferred, the share where the chosen assistant's top-1 is the gold token."""


def doubts(report: GateReport) -> str | None:
    """Why training from this gate is likely to end in never deferring, and what to do; None if all is well."""
    if not sum(report.label_share[1:]):
        return (
            "no token is labelled to be deferred, for no assistant's first choice is right where the base's is wrong: "
            "training will collapse to never deferring. Do the scores belong to these texts (collm score tells how "
            "often the first choice is right)? If they do, take init.method b, or an assistant that knows more"
        )
    if math.isnan(report.recall):
        return (
            "no held-out token is labelled to be deferred, so nobody can tell whether the initial gate is any good: "
            "hold out more text (data.validation_share or data.validation)"
        )
    if not report.precision > 0:
        return (
            "the initial gate finds none of the held-out tokens that are labelled to be deferred: training is likely "
            "to collapse to never deferring. Give it more text, raise init.max_tokens, or take init.method b"
        )
    return None


def fit(hidden: Tensor, labels: Tensor, num_assistants: int, *, max_iterations: int = 200) -> DeferralHead:
    """Class-balanced multinomial logistic regression (for K = 1: weighted BCE) of pseudo-labels on hidden states.

    Args:
        hidden: `[N, H]`, any float dtype, before standardisation.
        labels: `[N]` in 0..K.
        num_assistants: K.
        max_iterations: of L-BFGS.

    Returns:
        A head for *raw* hidden states.
    """
    standardise = Standardiser.of(hidden)
    features = standardise(hidden)
    head = DeferralHead(hidden.shape[-1], num_assistants).to(hidden.device)
    weights = gate.balanced_weights(labels, 1 + num_assistants).to(hidden.device)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        per_token = weights[labels] * F.nll_loss(gate.log_gate(head(features)), labels, reduction="none")
        # A unit Gaussian prior on theta, as is usual for logistic regression; without it separable labels diverge.
        loss = per_token.mean() + 0.5 * head.weight.square().sum() / len(labels)
        loss.backward()
        return loss

    if bool((labels > 0).any()):
        with torch.enable_grad():
            optimizer.step(closure)
    else:
        # Nothing to defer: say so with a small gate rather than an undecided one.
        torch.nn.init.constant_(head.bias, -5.0)
    standardise.fold(head)
    return head


@torch.inference_mode()
def report(
    head: DeferralHead, hidden: Tensor, labels: Tensor, assistant_top1: Tensor, train_labels: Tensor
) -> GateReport:
    """Precision and recall on held-out tokens at the default threshold, `1 - P(Z = 0) > 0.5`.

    Args:
        hidden, labels, assistant_top1: `[N, H]`, `[N]` and `[N, K]` of held-out tokens.
        train_labels: pseudo-labels that the gate was fitted to.
    """
    log_gate = gate.log_gate(torch.cat([head(part) for part in hidden.split(part_rows(hidden.shape[1]))]))
    chosen = torch.where(log_gate[:, 0].exp() < 0.5, log_gate[:, 1:].argmax(-1) + 1, 0)
    deferred, positive = chosen > 0, labels > 0
    hits = deferred & positive
    right = assistant_top1.gather(1, (chosen - 1).clamp(min=0)[:, None])[:, 0]
    shares = torch.bincount(train_labels, minlength=1 + head.num_assistants) / max(1, len(train_labels))

    def share(part: Tensor, whole: Tensor) -> float:
        return float(part.sum() / whole.sum()) if bool(whole.any()) else float("nan")

    return GateReport(
        label_share=tuple(shares.tolist()),
        precision=share(hits, deferred),
        recall=share(hits, positive),
        accuracy_of_choice=share(hits & (chosen == labels), hits),
        deferred_share=float(deferred.float().mean()) if len(labels) else float("nan"),
        assistant_right=share(deferred & right, deferred),
    )
