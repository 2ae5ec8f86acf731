"""The price of a deferred token: found for a target rate, also beside an assistant that is better everywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file

from collm.errors import CollmError
from collm.gate import log_gate, token_nll
from collm.models.head import DeferralHead
from collm.models.info import load_info
from collm.training.gate_only import GateData, evaluate_gate, train_gate
from collm.training.initialisation import fit
from collm.training.model import LossConfig
from collm.training.price import HIGHEST, Price, held_out_loss
from collm.training.recipe import parse_recipe
from collm.training.train import train


def test_the_price_rises_above_the_target_and_falls_below() -> None:
    price = Price(0.3, 300)
    assert float(price.value) == 0
    price.step(torch.tensor(0.8))
    first = float(price.value)
    assert first > 4 * 0.5  # at once, in proportion
    for _ in range(30):
        price.step(torch.tensor(0.8))
    assert float(price.value) > first + 1  # and more with time
    for _ in range(400):
        price.step(torch.tensor(0.1))
    assert float(price.value) == 0  # never negative: the target is a bound
    for _ in range(10_000):
        price.step(torch.tensor(1.0))
    assert float(price.value) == HIGHEST


@pytest.mark.parametrize("target", [0.1, 0.3, 0.7])
@pytest.mark.parametrize(
    ("num_steps", "speed"), [(120, 0.2), (120, 0.4), (120, 1.0), (600, 0.05), (600, 0.4), (600, 1.0)]
)
def test_the_price_settles_where_the_rate_is_the_target(target: float, num_steps: int, speed: float) -> None:
    """A gate that Adam moves by up to `speed` of log-odds a step, and whose gains are spread evenly over 0..2 nats: it
    is to defer what gains more than the price. Late as it answers, it stays near the target once it is there."""
    log_odds = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer, price = torch.optim.Adam([log_odds], lr=speed), Price(target, num_steps)
    rates, prices = [], []
    for step in range(num_steps):
        rate = torch.sigmoid(log_odds.detach())
        wanted = max(0.0, 1 - float(price.value) / 2)  # the share of tokens that gain more
        log_odds.grad = 0.1 * (rate - wanted)
        optimizer.param_groups[0]["lr"] = speed * (1 - step / num_steps)
        optimizer.step()
        price.step(rate)
        rates.append(float(rate))
        prices.append(float(price.value))
    late = torch.tensor(rates[num_steps // 2 :])
    assert (late - target).square().mean().sqrt() < 0.05, "the gate swings"
    assert rates[-1] == pytest.approx(target, abs=0.02)
    assert prices[-1] == pytest.approx(2 * (1 - target), abs=0.1)


def test_a_price_is_kept_and_goes_on() -> None:
    one, other = Price(0.2, 50), Price(0.2, 50)
    for rate in (0.9, 0.4, 0.3):
        one.step(torch.tensor(rate))
    other.load(json.loads(json.dumps(one.state())))
    assert torch.equal(one.value, other.value)
    one.step(torch.tensor(0.5))
    other.step(torch.tensor(0.5))
    assert torch.equal(one.value, other.value)
    # An older run has not noted how the rate changed.
    other.load({"multiplier": 0.1, "deferred": 0.3})
    assert float(other.value) == pytest.approx(0.1 + 4 * 0.1)


def test_checkpoints_are_compared_by_likelihood_within_the_target() -> None:
    assert held_out_loss(1.0, 0.3, 0.3) == 1.0
    # A checkpoint that defers everything is no better for its likelihood.
    assert held_out_loss(0.2, 0.99, 0.3) > held_out_loss(1.0, 0.31, 0.3)


def better_everywhere(count: int, seed: int) -> GateData:
    """An assistant that is better by 0.2 nats on all tokens, and by 2 more on a quarter that hidden states tell."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 8, generator=generator)
    gain = 0.2 + 2.0 * (hidden[:, 0] > 0.674).float()
    return GateData(hidden, torch.stack([-0.3 - gain, torch.full((count,), -0.3)], dim=1))


def gate(data: GateData, held_out: GateData, config: LossConfig) -> DeferralHead:
    head = fit(data.hidden, (data.hidden[:, 0] > 0).long(), 1)
    return train_gate(
        head,
        data,
        held_out,
        config,
        learning_rate=0.03,
        epochs=40,
        batch_tokens=256,
        patience=40,
        seed=0,
        log=lambda record: None,
    )


def test_beside_an_assistant_that_is_better_everywhere() -> None:
    """Without a price the gate defers nearly all; with a target it defers that much, and where it gains most."""
    data, held_out = better_everywhere(4096, 0), better_everywhere(2048, 1)
    free = evaluate_gate(gate(data, held_out, LossConfig()), held_out, LossConfig())
    assert 1 - float(free.gate[0]) > 0.9
    for target in (0.1, 0.25, 0.5):
        config = LossConfig(target_rate=target)
        head = gate(data, held_out, config)
        found = evaluate_gate(head, held_out, config)
        deferred = 1 - log_gate(head(held_out.hidden))[:, 0].exp()
        assert float(deferred.detach().mean()) == pytest.approx(target, abs=0.03)
        gains = held_out.hidden[:, 0] > 0.674
        assert deferred[gains].mean() > deferred[~gains].mean() + 0.2
        assert found.nll < float(token_nll(torch.log(torch.tensor([[1 - target, target]])), held_out.log_probs).mean())


def test_a_target_beyond_what_is_worth_it_costs_nothing() -> None:
    """An assistant that is worse nearly everywhere: the bound does not bind, and the gate is that of no price."""
    data = better_everywhere(2048, 0)
    worse = GateData(data.hidden, torch.stack([torch.full((2048,), -0.5), data.hidden[:, 0] - 3], dim=1))
    free = gate(worse, worse, LossConfig())
    bound = gate(worse, worse, LossConfig(target_rate=0.5))
    torch.testing.assert_close(free.weight, bound.weight)


# -- through a recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows nothing, and an assistant that has seen the texts: better everywhere."""
    folder = tmp_path_factory.mktemp("price")
    tokenizer = make_tokenizer()
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b} and that is it"} for a in range(8) for b in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, seed in (("base", 0), ("fresh", 1)):
        make_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    train(
        parse_recipe(
            {
                "out": str(folder / "assistant"),
                "base": {"model": str(folder / "fresh")},
                "objective": "sft",
                "data": {"train": str(folder / "train.jsonl"), "validation_share": 0.25},
                "training": {"epochs": 5, "batch_size": 8, "learning_rate": 5e-3, "evaluations": 1},
            }
        ),
        progress=False,
    )
    return folder


def recipe(workplace: Path, out: str, **changes: Any) -> Any:
    return {
        "out": str(workplace / out),
        "cache": str(workplace / "cache"),
        "base": {"model": str(workplace / "base")},
        "assistants": [{"name": "large", "model": str(workplace / "assistant")}],
        "data": {"train": str(workplace / "train.jsonl"), "validation_share": 0.25},
        "init": {"max_tokens": 400},
        "training": {
            "epochs": 12,
            "batch_size": 8,
            "learning_rate": 1e-4,
            "gate_learning_rate": 0.05,
            "evaluations": 3,
        },
        **changes,
    }


def deferred(out: Path) -> float:
    info = load_info(out)
    assert info is not None
    return float(info.training["figures"]["after"]["eval_gate/large"])


@pytest.fixture(scope="module")
def at_target(workplace: Path) -> Path:
    return train(parse_recipe(recipe(workplace, "target", target_rate=0.3)), progress=False)


def test_a_run_meets_its_target(workplace: Path, at_target: Path) -> None:
    assert deferred(train(parse_recipe(recipe(workplace, "free")), progress=False)) > 0.8
    assert deferred(at_target) == pytest.approx(0.3, abs=0.1)
    info = load_info(at_target)
    assert info is not None and info.training["price"]["multiplier"] > 0.1


KILLED = """
import os, signal, sys
from collm.training import trainer
from collm.training.recipe import load_recipe
from collm.training.train import train
step = trainer.CollmTrainer.training_step
def killed(self, *args, **kwargs):
    if self.state.global_step == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
trainer.CollmTrainer.training_step = killed
train(load_recipe(sys.argv[1]), progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_price(workplace: Path, at_target: Path) -> None:
    values = recipe(workplace, "killed", target_rate=0.3)
    path = workplace / "killed.yaml"
    often = {**values["training"], "save_minutes": 1e-9}  # how often is no part of what a folder belongs to
    path.write_text(json.dumps({**values, "training": often}))
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=os.environ, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    resumed = train(parse_recipe(values), progress=False)
    for name in ("model.safetensors", "gate.safetensors"):
        left, right = load_file(at_target / name), load_file(resumed / name)
        assert all(torch.equal(left[key], right[key]) for key in left)
    whole, again = load_info(at_target), load_info(resumed)
    assert whole is not None and again is not None
    assert again.training["figures"]["before"] == whole.training["figures"]["before"]


def test_a_target_and_a_price_are_one_too_many(workplace: Path) -> None:
    with pytest.raises(CollmError, match="leave out one"):
        parse_recipe(recipe(workplace, "both", target_rate=0.3, deferral_cost=0.1))
    with pytest.raises(CollmError, match="objective marginal"):
        parse_recipe(recipe(workplace, "weak", target_rate=0.3, objective="weak_supervision"))
