"""What a pass tells of its tokens: Triton's kernels against the twin in torch, and that against the engine."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from collm.decoding.choosing import Draws
from collm.models.head import DeferralHead
from collm.models.paged import plan as planned
from collm.models.paged.plan import DRAW, HEAD, LINES, Plan
from collm.models.paged.telling import BAD, CHOSEN, GATE, Telling, Told, TorchTelling
from collm.noise import key_of
from collm.values import Answer, Draw

pytest.importorskip("triton", reason="Triton is for Linux")
from collm.models.paged.triton_telling import TritonTelling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = [
    Draw(),
    Draw(1, 1, 0.7),
    Draw(-3, 2, 1.5),
    Draw(2**63 - 1, 1, 1.5, top_p=0.9),
    Draw(4, 0, 1.5, top_k=7),
    Draw(5, 0, 1.2, top_p=0.5, top_k=7),
    Draw(6, 0, 0.7, top_p=0.3, top_k=1000),
    Draw(7, 0, 1.5, top_p=0.99, top_k=1),
    Draw(8, 0, 1.0),
]


def plan_of(draws: list[Draw]) -> Plan:
    numbers = np.zeros(planned.size(len(draws)), dtype=np.int32)
    lines = numbers[HEAD:].reshape(LINES, -1)
    for n, how in enumerate(draws):
        low, high = key_of(how.seed)
        floats = struct.unpack("ii", struct.pack("ff", how.temperature, how.top_p))
        lines[DRAW:, n] = np.array([low, high, how.sample, 5 + n], dtype=np.int64).astype(np.uint32).view(
            np.int32
        ).tolist() + [how.top_k, *floats]
    return Plan(torch.from_numpy(numbers).to(DEVICE), len(draws), 16, 0)


def told(
    ops: Telling,
    logits: torch.Tensor,
    hidden: torch.Tensor,
    head: DeferralHead | None,
    vocab: int,
    draws: list[Draw] = DRAWS,
) -> Told:
    rows = ops.tell(logits.to(DEVICE), hidden.to(DEVICE), head, plan_of(draws), vocab)
    return Told(rows.cpu().numpy(), head is not None)


@pytest.mark.parametrize(("assistants", "ties"), [(0, True), (2, False)])
@torch.inference_mode()
def test_kernels_tell_what_the_twin_tells(assistants: int, ties: bool) -> None:
    torch.manual_seed(assistants)
    logits, hidden = 3 * torch.randn(len(DRAWS), 340), torch.randn(len(DRAWS), 24)
    if ties:
        logits = logits.round()
    logits[3, 7:90] = -torch.inf
    head = None
    if assistants:
        head = DeferralHead(24, assistants).to(DEVICE)
        torch.nn.init.normal_(head.weight)
        torch.nn.init.normal_(head.bias)
    found, expected = (told(ops, logits, hidden, head, 330) for ops in (TritonTelling(256), TorchTelling()))
    log_probs = torch.log_softmax(logits[:, :330], -1)
    drawn = 0
    for n, how in enumerate(DRAWS):
        mine, other = found.answer(n), expected.answer(n)
        assert mine is not None and other is not None
        assert len(mine) == len(other) == len(Answer._fields)
        assert (mine.token_id, mine.top_token_id) == (other.token_id, other.top_token_id), how
        drawn += mine.token_id != mine.top_token_id
        numbers = [[a.log_prob, a.top_log_prob, a.entropy, *(a.log_gate or ())] for a in (mine, other)]
        torch.testing.assert_close(*map(torch.tensor, numbers), atol=2e-5, rtol=1e-5)
        assert mine.log_prob == pytest.approx(float(log_probs[n, mine.token_id]), abs=1e-5)
    assert drawn > 3
    # As the engine draws on the CPU.
    own = Draws.of([(how, 5 + n) for n, how in enumerate(DRAWS)])
    chosen = own.choose(log_probs, log_probs.argmax(-1), torch.tensor(own.words))
    assert [int(row[4]) for row in expected.rows] == chosen.tolist()


@pytest.mark.parametrize("ops", [TorchTelling(), TritonTelling()], ids=["torch", "triton"])
@torch.inference_mode()
def test_what_is_not_a_number_is_told_of_its_own_row(ops: Telling) -> None:
    logits, hidden = torch.randn(9, 50), torch.randn(9, 24)
    logits[1, 40], logits[4, 0], logits[6], hidden[8, 3] = torch.nan, torch.inf, -torch.inf, torch.nan
    head = DeferralHead(24, 1).to(DEVICE)
    found = told(ops, logits, hidden, head, 60, [Draw()] * 9)
    assert [n for n in range(9) if found.answer(n) is None] == [1, 4, 6, 8]


@pytest.mark.parametrize("assistants", [None, 1, 3])
@pytest.mark.parametrize("has_close", [False, True])
def test_the_answers_of_a_pass_are_those_of_its_rows(assistants: int | None, has_close: bool) -> None:
    width = GATE + (0 if assistants is None else 1 + assistants) + has_close
    rows = np.random.default_rng(3).integers(1, 2**30, (9, width), dtype=np.int32)
    rows[:, BAD] = 0
    whole = Told(rows, assistants is not None, has_close)
    some = rows.copy()
    some[[2, 7], BAD] = 1
    for found in (whole, Told(some, assistants is not None, has_close)):
        for wanted in (range(9), [8, 2, 3], [7], [4]):
            assert list(found.answers(wanted)) == [found.answer(n) for n in wanted]
    answer = whole.answer(5)
    assert answer is not None and answer.token_id == rows[5, CHOSEN]
    assert answer.log_close == (rows.view(np.float32)[5, -1] if has_close else 0.0)
    assert len(answer.log_gate or ()) == (0 if assistants is None else 1 + assistants)
