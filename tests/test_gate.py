"""The equations against brute force, and their degenerate cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from collm import gate


def random_problem(seed: int, batch: int, length: int, num_assistants: int) -> tuple[Tensor, Tensor]:
    """Scores `[B, T, K]` and gold-token log-probabilities `[B, T, 1+K]` of laws over 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, length, num_assistants, generator=generator) * 3
    laws = torch.randn(batch, length, 1 + num_assistants, 5, generator=generator).log_softmax(-1)
    return scores, laws[..., 2]


def brute_force_nll(scores: Tensor, log_probs: Tensor) -> float:
    """-log of the sum over *all* paths Z of P(X, Z), per token, in plain Python."""
    length, width = log_probs.shape
    gates = [[1.0, *(math.exp(float(s)) for s in row)] for row in scores]
    gates = [[g / sum(row) for g in row] for row in gates]
    total = sum(
        math.prod(gates[t][z] * math.exp(float(log_probs[t, z])) for t, z in enumerate(path))
        for path in itertools.product(range(width), repeat=length)
    )
    return -math.log(total) / length


@pytest.mark.parametrize("num_assistants", [1, 2, 3])
def test_loss_equals_enumeration_of_all_z(num_assistants: int) -> None:
    scores, log_probs = random_problem(num_assistants, 1, 5, num_assistants)
    loss = gate.marginal_nll(gate.log_gate(scores), log_probs, torch.ones(1, 5, dtype=torch.bool))
    assert float(loss) == pytest.approx(brute_force_nll(scores[0], log_probs[0]), abs=1e-5)


@pytest.mark.parametrize("num_assistants", [1, 2, 3])
def test_gradient_is_gate_minus_posterior(num_assistants: int) -> None:
    scores, log_probs = random_problem(7, 3, 4, num_assistants)
    scores.requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    log_gate = gate.log_gate(scores)
    gate.marginal_nll(log_gate, log_probs, mask).backward()
    expected = (log_gate.exp() - gate.log_posterior(log_gate, log_probs).exp())[..., 1:] / mask.sum()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.where(mask[..., None], expected, 0.0).detach(), atol=1e-6, rtol=1e-5)


def test_one_assistant_is_the_papers_sigmoid() -> None:
    scores = torch.tensor([[-3.0], [0.0], [2.5]])
    expected = torch.stack([1 - torch.sigmoid(scores[:, 0]), torch.sigmoid(scores[:, 0])], -1)
    torch.testing.assert_close(gate.log_gate(scores).exp(), expected)


def test_gate_is_float32_whatever_comes_in() -> None:
    # In bfloat16 sigmoid(7) is 1 and its log-odds are lost.
    log_gate = gate.log_gate(torch.tensor([[7.0]], dtype=torch.bfloat16))
    assert log_gate.dtype == torch.float32
    assert float(log_gate[0, 1] - log_gate[0, 0]) == pytest.approx(7.0, abs=1e-5)


@given(
    seed=st.integers(0, 10_000),
    junk=st.sampled_from([-math.inf, math.nan, math.inf, 5.0]),
    num_assistants=st.integers(1, 3),
    bits=st.lists(st.booleans(), min_size=8, max_size=8).filter(any),
)
@settings(max_examples=60, deadline=None)
def test_what_is_masked_has_no_effect(seed: int, junk: float, num_assistants: int, bits: list[bool]) -> None:
    mask = torch.tensor(bits).reshape(2, 4)
    scores, log_probs = random_problem(seed, 2, 4, num_assistants)
    results = []
    for fill in (0.0, junk):
        s = scores.clone().requires_grad_()
        p = torch.where(mask[..., None], log_probs, fill).requires_grad_()
        loss = gate.marginal_nll(gate.log_gate(s), p, mask)
        loss.backward()
        assert s.grad is not None and p.grad is not None
        results.append((loss.detach(), s.grad, p.grad))
    for a, b in zip(*results, strict=True):
        assert bool(torch.isfinite(b).all())
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_a_model_that_cannot_write_the_token_leaves_it_to_the_others() -> None:
    scores = torch.tensor([[[1.0, -2.0]]], requires_grad=True)
    log_probs = torch.tensor([[[-1.5, -math.inf, -math.inf]]])
    log_gate = gate.log_gate(scores)
    loss = gate.marginal_nll(log_gate, log_probs, torch.ones(1, 1, dtype=torch.bool))
    assert float(loss) == pytest.approx(1.5 - float(log_gate[0, 0, 0]), abs=1e-6)
    loss.backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, log_gate.exp().detach()[..., 1:])


def test_a_token_that_nobody_can_write_costs_infinity_and_teaches_nothing() -> None:
    scores = torch.zeros(1, 2, 1, requires_grad=True)
    log_probs = torch.tensor([[[-math.inf, -math.inf], [-1.0, -2.0]]])
    loss = gate.marginal_nll(gate.log_gate(scores), log_probs, torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert float(loss) == math.inf
    assert scores.grad is not None
    assert float(scores.grad[0, 0, 0]) == 0
    assert float(scores.grad[0, 1, 0]) != 0


@pytest.mark.parametrize(("score", "expected"), [(200.0, 2.0), (-200.0, 1.0)])
def test_gate_at_zero_or_one(score: float, expected: float) -> None:
    scores = torch.full((1, 1, 1), score, requires_grad=True)
    loss = gate.marginal_nll(gate.log_gate(scores), torch.tensor([[[-1.0, -2.0]]]), torch.ones(1, 1, dtype=torch.bool))
    loss.backward()
    assert float(loss) == pytest.approx(expected)
    assert scores.grad is not None and bool(torch.isfinite(scores.grad).all())


def test_shapes_and_empty_masks_are_refused() -> None:
    log_gate = gate.log_gate(torch.zeros(2, 3, 1))
    with pytest.raises(ValueError, match=r"\[B, T, 1\+K\]"):
        gate.marginal_nll(log_gate, torch.zeros(2, 3, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no labelled token"):
        gate.marginal_nll(log_gate, torch.zeros(2, 3, 2), torch.zeros(2, 3, dtype=torch.bool))


def test_pseudo_labels() -> None:
    #                    base right, both right, only 2 right, only 1 right, none right
    base = torch.tensor([True, False, False, False, False])
    top1 = torch.tensor([[True, True], [True, True], [False, True], [True, False], [False, False]])
    log_probs = torch.tensor([[-0.1, -0.2], [-0.3, -0.2], [-0.1, -0.9], [-0.9, -math.inf], [-3.0, -2.0]])
    assert gate.pseudo_labels(base, top1, log_probs, "a").tolist() == [0, 2, 2, 1, 0]
    assert gate.pseudo_labels(base, top1, log_probs, "b").tolist() == [0, 2, 2, 1, 2]
    with pytest.raises(ValueError, match="'a' or 'b'"):
        gate.pseudo_labels(base, top1, log_probs, "c")


def test_balanced_weights_give_classes_the_same_mass() -> None:
    labels = torch.tensor([0] * 90 + [2] * 10)
    weights = gate.balanced_weights(labels, 3)
    assert weights[1] == 0
    mass = torch.bincount(labels, minlength=3) * weights
    assert float(mass[0]) == pytest.approx(float(mass[2])) == pytest.approx(50)


def test_weak_supervision_is_two_thirds_ce_and_one_third_weighted_bce() -> None:
    scores, labels = torch.tensor([[0.7], [-1.2]]), torch.tensor([1, 0])
    base = torch.tensor([-2.0, -0.5])
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        scores[:, 0], labels.float(), pos_weight=torch.tensor(5.0), reduction="none"
    )
    found = gate.weak_supervision_loss(gate.log_gate(scores), base, labels)
    torch.testing.assert_close(found, -2 / 3 * base + bce / 3)
