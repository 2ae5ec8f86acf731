"""Training models with different tokenizers: the loss over chunks, what is equal to what, and refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chunk_toys import byte_level
from conftest import make_model, make_tokenizer
from launching import on_two_processes
from teaching import recipe_values, teach
from test_training import KILL_AT_SAVE, TWO_PROCESSES, assert_same_weights, log_of

from collm.data.chunk_scoring import score_chunks
from collm.data.chunks import Reader
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scoring import openings_of
from collm.errors import CollmError
from collm.gate import log_gate, token_nll
from collm.models.backbone import hidden_states
from collm.models.checkpoint import load_base
from collm.models.codec import ByteCodec
from collm.models.head import DeferralHead
from collm.models.info import load_info
from collm.models.loading import load_tokenizer
from collm.models.pairing import cuts_between
from collm.models.tools import Calculator
from collm.training.rates import at_rates
from collm.training.recipe import load_recipe, parse_recipe
from collm.training.summary import summary
from collm.training.train import train
from collm.values import Answer, Query

NAMES = ("base", "other")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an assistant whose tokenizers split digits and differ in the rest, and sums in sentences."""
    tokenizers = (make_tokenizer(285), make_tokenizer(340))
    models = {
        name: (make_model(seed=seed, vocab_size=len(tokenizer) + 3), tokenizer)
        for seed, (name, tokenizer) in enumerate(zip(NAMES, tokenizers, strict=True))
    }
    return teach(
        tmp_path_factory.mktemp("chunks"),
        models,
        lambda a, b: f"Anna buys {a} + {b} = {a + b} apples" + " and more" * (a % 3),
    )


def run(workplace: Path, out: str, **changes: Any) -> Path:
    return train(parse_recipe(recipe_values(workplace, out, **changes)), progress=False)


@pytest.fixture(scope="module")
def full(workplace: Path) -> Path:
    return run(workplace, "full")


def readers(workplace: Path) -> list[Reader]:
    tokenizers = [load_tokenizer(str(workplace / name)) for name in NAMES]
    cuts = cuts_between(tokenizers, NAMES)
    assert cuts is not None
    base = Reader(Formatter(tokenizers[0]), ByteCodec(tokenizers[0], cuts))
    return [base, Reader(Formatter(tokenizers[1]), ByteCodec(tokenizers[1], cuts), base)]


def test_the_loss_is_that_of_the_chunks_over_labelled_tokens(workplace: Path, full: Path) -> None:
    """The figures told before training against a direct computation: every model on every text, one by one."""
    both = readers(workplace)
    models = [load_base(workplace / name)[0] for name in NAMES]
    head, calculator = DeferralHead.load(full / "init"), Calculator(both[0].formatter.tokenizer)
    nll, base_nll, tokens, chunks, right, gates = 0.0, 0.0, 0, 0, 0, 0.0
    for example in load_examples(workplace / "validation.jsonl"):
        items = [reader.read(example) for reader in both]
        scores = []
        for reader, model, item in zip(both, models, items, strict=True):
            size = len(reader.formatter.tokenizer)
            [found] = score_chunks(model, [item], openings_of(model, reader, size), size)
            scores.append(torch.tensor(found[0]))
            if reader is both[0]:
                right += int(found[1].sum())
        ids = items[0].token_ids
        tool = []
        for start, stop in items[0].spans:
            [[answer]] = calculator.predict([Query.of(ids[:start], model=1, given=(ids[start],))])
            certain = isinstance(answer, Answer) and answer.token_id == ids[start] and stop in (None, start + 1)
            tool.append(0.0 if certain else -torch.inf)
        with torch.inference_mode():
            hidden = hidden_states(models[0], torch.tensor([ids]))[0]
            gate = log_gate(head(hidden[[start - 1 for start, _ in items[0].spans]]))
        log_probs = torch.stack([scores[0], torch.tensor(tool), scores[1]], dim=1)
        nll += float(token_nll(gate, log_probs).sum())
        base_nll -= float(scores[0].sum())
        tokens += items[0].num_labelled
        chunks += items[0].num_starts
        gates += float(gate[:, 2].exp().sum())
    info = load_info(full)
    assert info is not None and info.cuts == both[0].cuts.fingerprint and chunks < tokens
    before = info.training["figures"]["before"]
    assert before["eval_nll"] == pytest.approx(nll / tokens, abs=1e-5)
    assert before["eval_base_nll"] == pytest.approx(base_nll / tokens, abs=1e-5)
    assert before["eval_gate/other"] == pytest.approx(gates / chunks, abs=1e-5)
    assert before["eval_base_accuracy"] == pytest.approx(right / chunks, abs=1e-6)


def test_training_lowers_the_held_out_loss(full: Path) -> None:
    info = load_info(full)
    assert info is not None
    before, after = info.training["figures"]["before"], info.training["figures"]["after"]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_nll"] < after["eval_base_nll"]
    assert info.training["figures"]["rates"]


def test_accumulation_8x1_equals_1x8(workplace: Path, full: Path) -> None:
    other = run(workplace, "accumulated", training={"batch_size": 1, "gradient_accumulation": 8})
    assert_same_weights(full, other, atol=1e-5)
    assert log_of(other, "nll") == pytest.approx(log_of(full, "nll"), abs=1e-5)


def test_parts_of_logits_change_nothing(workplace: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where logits are computed a few rows at a time, and again in the backward pass."""
    monkeypatch.setattr("collm.training.model.logits_rows", lambda model: 7)
    assert_same_weights(full, run(workplace, "parts"), atol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one(workplace: Path, full: Path) -> None:
    path = workplace / "two.yaml"
    path.write_text(json.dumps(recipe_values(workplace, "two", training={"batch_size": 4, "save_minutes": 1e-9})))
    script = workplace / "two.py"
    script.write_text("import collm.models.pairing as pairing\npairing.FEW_CUTS = 1.1\n" + TWO_PROCESSES)
    said = on_two_processes([sys.executable, str(script), str(path)])
    assert [each.count("of the base's tokens start at a cut") for each in said] == [1, 0], "the first process tells"
    assert_same_weights(full, workplace / "two", atol=1e-5)
    assert log_of(workplace / "two", "eval_nll") == pytest.approx(log_of(full, "eval_nll"), abs=1e-5)


@pytest.mark.slow
def test_resumed_after_kill_9_equals_uninterrupted(workplace: Path, full: Path) -> None:
    path = workplace / "killed.yaml"
    path.write_text(json.dumps(recipe_values(workplace, "killed", training={"save_minutes": 1e-9})))
    command = [sys.executable, "-c", KILL_AT_SAVE, str(path), "1"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    path.write_text(json.dumps(recipe_values(workplace, "killed")))
    assert_same_weights(full, train(load_recipe(path), progress=False), atol=0)


def test_the_gate_alone(workplace: Path, full: Path) -> None:
    out = run(workplace, "gate", tune="gate", training={"epochs": 20, "gate_learning_rate": 0.002})
    info, trained = load_info(out), load_info(full)
    assert info is not None and trained is not None and info.cuts == trained.cuts
    losses = log_of(out, "eval_loss")
    assert info.training["figures"]["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert info.training["figures"]["eval_loss"] < losses[0]
    # The same base as before full training: the same figure, by another way.
    assert info.training["figures"]["eval_base_nll"] == pytest.approx(
        trained.training["figures"]["before"]["eval_base_nll"], abs=1e-5
    )


@pytest.mark.parametrize("tune", ["gate", "full"])
def test_nats_at_a_rate_are_per_token_like_all_others(
    workplace: Path, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is deferred, they are those of the base alone."""
    monkeypatch.setattr(at_rates, "__defaults__", ((0.0,), None))
    info = load_info(run(workplace, f"rates-{tune}", tune=tune, training={"epochs": 1}))
    assert info is not None
    figures = info.training["figures"]
    [none] = figures["rates"]
    after = figures.get("after", figures)
    assert none["nll"] == pytest.approx(after["eval_base_nll"], abs=1e-5)
    assert none["accuracy"] == pytest.approx(after["eval_base_accuracy"], abs=1e-6)
    [told] = [text for name, text in summary(workplace / f"rates-{tune}") if name == "pair, 0.0% deferred"]
    assert "of the chunks right" in told


def test_a_target_rate_is_one_of_chunks(workplace: Path) -> None:
    out = run(workplace, "priced", target_rate=0.1, data={"max_length": 40})  # some chunks are cut off
    assert len(log_of(out, "price")) >= 1


def test_a_tool_needs_digits_that_stand_alone(workplace: Path, tmp_path: Path) -> None:
    other = byte_level("llama3", 460)
    make_model(vocab_size=len(other)).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assistants = [{"name": "calculator", "model": "calculator"}, {"name": "x", "model": str(tmp_path)}]
    with pytest.raises(CollmError, match="calculator writes token by token"):
        run(workplace, "tool", assistants=assistants)


def test_scores_of_tokens_are_refused_for_chunks(workplace: Path, tmp_path: Path) -> None:
    from collm.data.scoring import score
    from collm.training.dataset import assemble

    base, _ = readers(workplace)
    examples = load_examples(workplace / "validation.jsonl")
    path = score(examples, str(workplace / "base"), base.formatter, tmp_path / "tokens", progress=False)
    with pytest.raises(CollmError, match="holds scores of tokens"):
        assemble(examples, base.formatter, 256, [path], base)
