"""The paper's equations as pure functions (Shen et al., ACL 2024, arXiv 2403.03870), for K >= 1 assistants.

Shapes: `B` batch, `T` positions, `K` assistants; index 0 of the last axis is the base model. Any leading shape will
do, `[N]` labelled tokens as well as `[B, T]`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_POSITIVE_WEIGHT = 8.0
"""Weight of "defer" against "write" in the paper's weighted BCE."""


def log_gate(scores: Tensor) -> Tensor:
    """`log P(Z = z | x_<t)`, `[..., 1+K]` float32, from assistant scores `<theta_k, h> + b_k`, `[..., K]`.

    The base's score is fixed at 0, so that K = 1 is `log(1 - sigmoid(s)), log sigmoid(s)`: the paper's gate.
    """
    scores = scores.float()
    return torch.log_softmax(F.pad(scores, (1, 0)), dim=-1)


def log_posterior(log_gate: Tensor, log_probs: Tensor) -> Tensor:
    """`log P(Z_t = z | x_t, x_<t)`, `[..., 1+K]`; the EM responsibilities the gate regresses on.

    Where every model gives the token probability 0, the posterior is undefined; the gate itself is returned there.
    """
    joint = log_gate + log_probs
    impossible = torch.isneginf(joint).all(dim=-1, keepdim=True)
    return torch.where(impossible, log_gate, torch.log_softmax(torch.where(impossible, 0.0, joint), dim=-1))


def token_nll(log_gate: Tensor, log_probs: Tensor) -> Tensor:
    """`-log sum_z P(Z_t = z) P_z(x_t)`, `[...]`, of `[..., 1+K]` inputs.

    A token that no model can write (all -inf) costs +inf and has gradient 0, not NaN: the double `where` keeps
    `logsumexp` away from rows that are -inf throughout.
    """
    joint = log_gate + log_probs
    impossible = torch.isneginf(joint).all(dim=-1)
    safe = torch.where(impossible[..., None], 0.0, joint)
    return torch.where(impossible, torch.inf, -torch.logsumexp(safe, dim=-1))


def marginal_nll(log_gate: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """The training loss: mean over labelled tokens of `-log sum_z P(Z_t = z | x_<t) P_z(x_t | x_<t)`.

    Args:
        log_gate: `[B, T, 1+K]` log-probabilities of who writes, from `log_gate`.
        log_probs: `[B, T, 1+K]` log-probability of the gold token under each model. Base first.
        mask: `[B, T]` bool, True on labelled tokens. What stands elsewhere (-inf, NaN) has no effect on the loss or
            its gradient.

    Returns:
        A scalar in nats. Its gradient with respect to the scores is (gate - posterior) / number of labelled tokens.

    Raises:
        ValueError: on shapes that do not match, or a mask without a labelled token.
    """
    if log_gate.shape != log_probs.shape or log_gate.shape[:-1] != mask.shape:
        raise ValueError(
            "marginal_nll wants log_gate and log_probs [B, T, 1+K] and mask [B, T], "
            f"not {list(log_gate.shape)}, {list(log_probs.shape)}, {list(mask.shape)}"
        )
    if not bool(mask.any()):
        raise ValueError("no labelled token: the mask is False everywhere")
    return token_nll(log_gate[mask], log_probs[mask]).mean()


def pseudo_labels(base_top1: Tensor, assistant_top1: Tensor, assistant_log_probs: Tensor, method: str = "a") -> Tensor:
    """Weak labels of Z, `[N]` int64 in 0..K, from scores of the *untuned* models on gold tokens.

    Method "a": an assistant's top-1 is the gold token and the base's is not; with several such assistants, the one
    that gives the token the highest probability. Method "b": the base's top-1 is not the gold token; the assistant is
    chosen alike, from all of them if none is right.

    Args:
        base_top1: `[N]` bool, the base's most probable token is the gold one.
        assistant_top1: `[N, K]` bool.
        assistant_log_probs: `[N, K]` log-probability of the gold token.

    Raises:
        ValueError: for an unknown method.
    """
    if method not in ("a", "b"):
        raise ValueError(f"the pseudo-label method is 'a' or 'b', not {method!r}")
    if assistant_top1.shape[-1] == 0:  # a base alone defers nothing
        return torch.zeros_like(base_top1, dtype=torch.long)
    some_right = assistant_top1.any(dim=-1)
    # In method (b) an assistant that is right still comes before one that is wrong.
    candidates = assistant_top1 | ~some_right[:, None]
    # argmax over -inf rows is well defined (0), which is only reached by (b) where every assistant abstains.
    best = torch.where(candidates, assistant_log_probs, -torch.inf).argmax(dim=-1) + 1
    # Ties of -inf between a candidate and a non-candidate cannot arise: a top-1 token has positive probability.
    defer = ~base_top1 & some_right if method == "a" else ~base_top1
    return torch.where(defer, best, 0)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """`[num_classes]` weights that give every class present the same total weight, with mean 1 over tokens."""
    counts = torch.bincount(labels, minlength=num_classes).float()
    present = counts > 0
    weights = torch.zeros(num_classes)
    weights[present] = labels.numel() / (present.sum() * counts[present])
    return weights


def weak_supervision_loss(
    log_gate: Tensor, base_log_probs: Tensor, labels: Tensor, positive_weight: float = 5.0
) -> Tensor:
    """The weak-supervision baseline, per token `[N]`: 2/3 cross-entropy of the base + 1/3 weighted cross-entropy of Z.

    Args:
        log_gate: `[N, 1+K]`.
        base_log_probs: `[N]` log-probability of the gold token under the base.
        labels: `[N]` pseudo-labels in 0..K.
        positive_weight: weight of tokens labelled "defer" (5 in the released scripts).
    """
    weight = torch.where(labels > 0, positive_weight, 1.0)
    return (-2 * base_log_probs + weight * F.nll_loss(log_gate, labels, reduction="none")) / 3
