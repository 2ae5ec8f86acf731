"""The likelihood of given texts, against forward passes of the whole networks and the gate's own equations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch import Tensor

from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.evaluation import likelihood
from collm.evaluation.likelihood import GivenText, likelihoods
from collm.gate import log_gate, marginal_nll
from collm.llm import CollaborativeLM, TokenPrompt
from collm.models.fake import FakeModel
from collm.models.head import DeferralHead
from collm.models.local import LocalModel
from collm.models.tools import Calculator
from collm.sampling_params import SamplingParams
from collm.values import Answer, Fault, Query, Reply

TOKENIZER = make_tokenizer()
NETWORKS = [make_model(seed=0), make_model("qwen3", seed=1)]
HEAD = DeferralHead(32, 2)
torch.manual_seed(5)
torch.nn.init.normal_(HEAD.weight, std=0.3)
CALCULATOR = Calculator(TOKENIZER)
TEXTS = ["12 + 30 = 42\n#### 42", " Rome", "56 * 9 = 504, and Paris is the capital of France."]


def models() -> list[Any]:
    base = LocalModel(NETWORKS[0], TOKENIZER, HEAD)
    return [base, LocalModel(NETWORKS[1], TOKENIZER, name="helper"), CALCULATOR]


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def given() -> list[GivenText]:
    """The helper sees another prompt than the base and the calculator."""
    prompts = (encode("What is it? "), encode("You are a helpful assistant. What is it? "), encode("What is it? "))
    return [GivenText(prompts, encode(text)) for text in TEXTS]


@torch.no_grad()
def laws(text: GivenText) -> tuple[Tensor, Tensor]:
    """Log-gate `[T, 1+K]`, renormalised over who answers, and log-probabilities `[T, 1+K, V]`, straight from the
    networks."""
    found = []
    for network, prompt in zip(NETWORKS, text.prompts, strict=False):
        ids = torch.tensor([prompt + text.completion])
        found.append(network(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1))
    ids = torch.tensor([text.prompts[0] + text.completion])
    hidden = NETWORKS[0].model(ids).last_hidden_state[0, len(text.prompts[0]) - 1 : -1]
    gate, spoken = log_gate(HEAD(hidden)), torch.full_like(found[0], -torch.inf)
    for t in range(len(text.completion)):
        [[answer]] = CALCULATOR.predict([Query.of(text.prompts[2] + text.completion[:t], model=2, law=True)])
        if answer is None:
            gate[t, 2] = -torch.inf
        else:
            assert isinstance(answer, Answer) and answer.law is not None
            spoken[t] = answer.law
    return gate.log_softmax(-1), torch.stack([*found, spoken], dim=1)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("at_a_time", [3, 512])
def test_the_marginal_is_that_of_the_networks(batch_size: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LAWS", at_a_time)
    called = False
    for text, found in zip(given(), likelihoods(models(), given(), batch_size=batch_size), strict=True):
        gate, log_probs = laws(text)
        gold = torch.tensor(text.completion)
        joint = gate + log_probs[torch.arange(len(gold)), :, gold]
        assert found.log_prob == pytest.approx(float(joint.logsumexp(-1).sum()), abs=1e-3)
        assert found.credit == pytest.approx(joint.softmax(-1).sum(0).tolist(), abs=1e-3)
        assert found.tokens == len(gold)
        mixture = (gate[..., None] + log_probs).logsumexp(1)
        assert found.greedy == bool((mixture.argmax(-1) == gold).all())
        called |= bool(torch.isfinite(gate[:, 2]).any())
    assert called, "the calculator never spoke: the test says nothing about abstention"


def test_it_is_the_training_loss_where_nobody_abstains() -> None:
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight, std=0.3)
    pair = [LocalModel(NETWORKS[0], TOKENIZER, head), LocalModel(NETWORKS[1], TOKENIZER, name="helper")]
    text = GivenText((encode("12"), encode("12")), encode(" apples and 30 more"))
    [found] = likelihoods(pair, [text])
    ids = torch.tensor([text.prompts[0] + text.completion])
    with torch.no_grad():
        gold = ids[0, 1:, None]
        gate = log_gate(head(NETWORKS[0].model(ids).last_hidden_state[0, :-1]))
        each = [network(ids).logits[0, :-1].log_softmax(-1).gather(-1, gold)[:, 0] for network in NETWORKS]
        mask = torch.arange(len(gold)) >= len(text.prompts[0]) - 1
        loss = marginal_nll(gate[None], torch.stack(each, dim=-1)[None], mask[None])
    assert found.log_prob == pytest.approx(-float(loss) * int(mask.sum()), abs=1e-3)


def test_what_compose_writes_is_greedy_and_nothing_else() -> None:
    llm = CollaborativeLM(models(), [Formatter(TOKENIZER)] * 3)
    prompts = (encode("56 * 9 = "),) * 3
    written = llm.generate(TokenPrompt(prompts), SamplingParams(max_tokens=12, deferral="compose"))
    other = (*written.token_ids[:-1], (written.token_ids[-1] + 1) % 300)
    right, wrong = likelihoods(llm.models, [GivenText(prompts, written.token_ids), GivenText(prompts, other)])
    assert right.greedy and not wrong.greedy
    assert right.log_prob == pytest.approx(sum(step.log_prob for step in written.steps), abs=1e-3)
    assert right.log_prob > wrong.log_prob


def test_one_model_alone() -> None:
    for text, found in zip(given(), likelihoods(models(), given(), alone=1), strict=True):
        _, log_probs = laws(text)
        gold = torch.tensor(text.completion)
        assert found.log_prob == pytest.approx(float(log_probs[torch.arange(len(gold)), 1, gold].sum()), abs=1e-3)
        assert found.greedy == bool((log_probs[:, 1].argmax(-1) == gold).all())
        assert found.credit == (0.0, len(gold), 0.0)
    digit = GivenText((encode("1 + 1 = "),) * 3, encode("2"))
    said, unsaid = likelihoods(models(), [digit, given()[1]], alone=2)
    assert said.greedy and said.log_prob == 0.0
    assert unsaid.log_prob == -math.inf and not unsaid.greedy


def test_a_likelihood_is_a_law() -> None:
    """Over all continuations of two tokens it sums to 1, whoever abstains."""
    size = 7
    pair = [FakeModel("base", size, num_assistants=1), FakeModel("helper", size, abstention=0.5)]
    texts = [GivenText(((1,), (2, 3)), (a, b)) for a in range(size) for b in range(size)]
    found = list(likelihoods(pair, texts, batch_size=5))
    assert math.fsum(math.exp(each.log_prob) for each in found) == pytest.approx(1.0, abs=1e-6)
    assert sum(each.greedy for each in found) == 1


def test_a_model_that_fails_says_so() -> None:
    class Broken(FakeModel):
        def predict(self, queries: Sequence[Query]) -> list[list[Reply]]:
            return [[Fault("helper: out of order")] * query.num_last for query in queries]

    pair = [FakeModel("base", 7, num_assistants=1), Broken("helper", 7)]
    with pytest.raises(CollmError, match="likelihood cannot be computed: helper: out of order"):
        list(likelihoods(pair, [GivenText(((1,), (1,)), (2, 3))]))
