"""Training: the loss on the Trainer, what is equal to what, resuming, checkpoints, and refusals."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from launching import on_two_processes
from safetensors.torch import load_file, save_file
from teaching import recipe_values, teach
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.gate import log_gate, marginal_nll
from collm.models.backbone import hidden_states
from collm.models.checkpoint import load_base
from collm.models.head import DeferralHead
from collm.models.info import load_info
from collm.training import initialisation
from collm.training.batching import EpochSampler
from collm.training.recipe import load_recipe, parse_recipe
from collm.training.train import train
from collm.training.trainer import CollmTrainer

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an assistant and data: sums, which the assistant is not taught either (it is random)."""
    tokenizer = make_tokenizer()
    models = {
        name: (make_model(seed=seed, vocab_size=len(tokenizer)), tokenizer)
        for seed, name in enumerate(("base", "other"))
    }
    return teach(tmp_path_factory.mktemp("training"), models)


def run(workplace: Path, out: str, **changes: Any) -> Path:
    return train(parse_recipe(recipe_values(workplace, out, **changes)), progress=False)


def log_of(folder: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record[key] for record in records if key in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / "model.safetensors"), **load_file(folder / "gate.safetensors")}


def assert_same_weights(a: Path, b: Path, atol: float) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def full(workplace: Path) -> Path:
    return run(workplace, "full")


def test_the_loss_is_the_marginal_nll_of_the_texts(workplace: Path, full: Path) -> None:
    """The figure reported before training against a direct computation: every model on every text, one by one."""
    from collm.models.tools import Calculator
    from collm.values import Answer, Query

    base, _, tokenizer, _ = load_base(workplace / "base")
    assistant = AutoModelForCausalLM.from_pretrained(workplace / "other")
    head = DeferralHead.load(full / "init")
    calculator, formatter = Calculator(tokenizer), Formatter(tokenizer)
    total, count = 0.0, 0
    for example in load_examples(workplace / "validation.jsonl"):
        encoded = formatter.encode(example)
        ids = torch.tensor([encoded.token_ids])
        with torch.inference_mode():
            laws = [model(ids).logits[0].log_softmax(-1) for model in (base, assistant)]
            gates = log_gate(head(hidden_states(base, ids)[0]))
        for t, labelled in enumerate(encoded.labelled):
            if labelled:
                gold = encoded.token_ids[t]
                [[answer]] = calculator.predict([Query.of(encoded.token_ids[:t], model=1, given=(gold,))])
                tool = -torch.inf
                if answer is not None:
                    assert isinstance(answer, Answer) and answer.given_log_prob is not None
                    tool = answer.given_log_prob
                log_probs = torch.tensor([float(laws[0][t - 1, gold]), tool, float(laws[1][t - 1, gold])])
                total += float(marginal_nll(gates[t - 1][None, None], log_probs[None, None], torch.tensor([[True]])))
                count += 1
    info = load_info(full)
    assert info is not None
    assert info.training["figures"]["before"]["eval_nll"] == pytest.approx(total / count, abs=1e-5)


def test_training_lowers_the_held_out_loss_and_logs_what_it_should(full: Path) -> None:
    info = load_info(full)
    assert info is not None
    before, after = info.training["figures"]["before"], info.training["figures"]["after"]
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_nll"] < after["eval_base_nll"]
    for name in ("calculator", "other"):
        assert 0 < after[f"eval_gate/{name}"] < 1
        assert 0 <= after[f"eval_posterior/{name}"] <= 1
    assert len(log_of(full, "nll")) >= 2
    assert not (full / "checkpoints").exists()


class Waits(TorchDispatchMode):
    """Where our code makes the host wait for the device: numbers that are read, places whose count must be known."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [each for each in args[1] if each is not None] if func.name() == "aten::index.Tensor" else []
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero") or any(m.dtype == torch.bool for m in masks):
            callers = [frame.filename for frame in traceback.extract_stack()[:-1]]
            caller = [name for name in callers if "/torch/" not in name][-1]
            if "/transformers/" not in caller:  # its check of the mask is its own affair
                self.found.append(f"{func.name()} in {Path(caller).name}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"target_rate": 0.3}], ids=["plain", "with a target"])
def test_a_step_waits_for_the_device_once(workplace: Path, monkeypatch: pytest.MonkeyPatch, more: Any) -> None:
    """For the number of labelled tokens. Losses are looked at where they are logged."""
    step, found = CollmTrainer.training_step, []

    def watched(self: CollmTrainer, *args: Any, **kwargs: Any) -> Any:
        with Waits() as waits:
            loss = step(self, *args, **kwargs)
        found.append(waits.found)
        return loss

    monkeypatch.setattr(CollmTrainer, "training_step", watched)
    run(workplace, f"watched{len(more)}", **more)
    assert found == [["aten::nonzero in model.py"]] * 4
    with Waits() as waits:
        assert bool(torch.ones(3).sum() == 3) and len(torch.ones(3)[torch.tensor([True, False, True])]) == 2
    assert len(waits.found) == 2


def test_a_checkpoint_is_a_plain_model_too(full: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(full)
    ours, head, tokenizer, info = load_base(full)
    assert head is not None and head.num_assistants == 2
    assert [assistant.name for assistant in info.assistants] == ["calculator", "other"]
    ids = torch.tensor([tokenizer.encode("3 + 10 = ")])
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits)


def test_accumulation_8x1_equals_1x8(workplace: Path, full: Path) -> None:
    """Texts of unequal length, so that a mean of means would differ. Float32 sums in another order: 1e-5."""
    other = run(workplace, "accumulated", training={"batch_size": 1, "gradient_accumulation": 8})
    # The grouping by length shuffles by the step's size, which is the same: so are the texts of each step.
    assert_same_weights(full, other, atol=1e-5)
    assert log_of(other, "nll") == pytest.approx(log_of(full, "nll"), abs=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_each_epoch_shows_each_example_once_in_an_order_of_its_own(grouped: bool) -> None:
    lengths = [5, 9, 1, 7, 7, 3, 2, 8, 6, 4] * 20
    sampler = EpochSampler(lengths, 8, seed=1, grouped=grouped)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(200))
    assert epochs[0] == epochs[2] != epochs[1]
    steps = [[lengths[i] for i in epochs[0][start : start + 8]] for start in range(0, 200, 8)]
    spread = sum(max(step) - min(step) for step in steps) / len(steps)
    assert (spread < 3) is grouped
    # Not from long to short: that would be from hard to easy.
    means = [sum(step) / 8 for step in steps]
    assert means != sorted(means, reverse=True)


KILL_AT_SAVE = """
import os, signal, sys
from collm.training import trainer
from collm.training.recipe import load_recipe
from collm.training.train import train
from collm.training.trainer import CollmTrainer
save = trainer.CollmTrainer._save_checkpoint
def killed(self, *args):
    save(self, *args)
    if self.state.global_step >= int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
trainer.CollmTrainer._save_checkpoint = killed
train(load_recipe(sys.argv[1]), progress=False)
"""


@pytest.mark.parametrize(
    ("minutes", "step"),
    [
        pytest.param(5, 2, id="after an evaluation"),
        pytest.param(1e-9, 1, id="before the first evaluation", marks=pytest.mark.slow),
    ],
)
def test_resumed_after_kill_9_equals_uninterrupted(
    workplace: Path, full: Path, caplog: pytest.LogCaptureFixture, minutes: float, step: int
) -> None:
    out = workplace / f"killed-{step}"
    path = workplace / f"killed-{step}.yaml"
    path.write_text(json.dumps(recipe_values(workplace, out.name, training={"save_minutes": minutes})))  # JSON is YAML
    command = [sys.executable, "-c", KILL_AT_SAVE, str(path), str(step)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert load_info(out) is None and (out / ".lock").exists()
    assert [folder.name for folder in (out / "checkpoints").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    # A half-written later checkpoint is passed over.
    half = out / "checkpoints" / "checkpoint-99"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    # How often to save is not part of what the folder belongs to.
    path.write_text(json.dumps(recipe_values(workplace, out.name)))
    with caplog.at_level("INFO", logger="collm"):
        assert train(load_recipe(path), progress=False) == out
    assert f"resuming from {out / 'checkpoints' / f'checkpoint-{step}'}" in caplog.text
    assert_same_weights(full, out, atol=0)
    whole, resumed = load_info(full), load_info(out)
    assert whole is not None and resumed is not None
    assert resumed.training["figures"]["before"] == whole.training["figures"]["before"] != {}


KILL_AT_LAST_LOOK = """
import os, signal, sys
from collm.training.recipe import load_recipe
from collm.training.train import train
from collm.training.trainer import CollmTrainer
CollmTrainer.evaluate_rates = lambda self: os.kill(os.getpid(), signal.SIGKILL)
train(load_recipe(sys.argv[1]), progress=False)
"""


@pytest.mark.parametrize(
    ("kill", "step", "training"),
    [
        # The evaluation after the second step is the best one.
        pytest.param(KILL_AT_SAVE, 3, {"patience": 2, "learning_rate": 0.3}, id="while it waits for a gain"),
        pytest.param(KILL_AT_SAVE, 4, {"patience": 2, "learning_rate": 0.3}, id="stopped for want of a gain"),
        pytest.param(KILL_AT_LAST_LOOK, 6, {"epochs": 1.5, "schedule": "constant"}, id="at its last step"),
    ],
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(
    workplace: Path, kill: str, step: int, training: dict[str, Any]
) -> None:
    training = {"epochs": 3, "evaluations": 12, **training}
    name = f"ends-{step}"
    path = workplace / f"{name}.yaml"
    path.write_text(json.dumps(recipe_values(workplace, name, training=training)))
    done = subprocess.run([sys.executable, "-c", kill, str(path), str(step)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert (workplace / name / "checkpoints" / f"checkpoint-{step}").is_dir()
    resumed, whole = run(workplace, name, training=training), run(workplace, f"{name}-whole", training=training)
    assert log_of(resumed, "eval_loss") == log_of(whole, "eval_loss")
    assert_same_weights(resumed, whole, atol=0)


TWO_PROCESSES = """
import os, sys
from collm.training import folder
claim, where = folder._claim, sys.argv[1]
def claimed(*args):
    with open(where + ".claims", "a") as file:
        file.write(os.environ["RANK"])
    claim(*args)
folder._claim = claimed
from collm.training.recipe import load_recipe
from collm.training.train import train
from collm.training.trainer import CollmTrainer
train(load_recipe(sys.argv[1]), progress=False)
"""


@pytest.mark.slow
def test_two_processes_equal_one(workplace: Path, full: Path) -> None:
    """Data parallel over gloo: 2 x 4 texts a step against 1 x 8. Gradients are summed in another order: 1e-5.

    The number of texts is a multiple of 8; otherwise accelerate repeats some to give all processes as many.
    """
    path = workplace / "two.yaml"
    # The processes agree on when to save, here at the first step already.
    path.write_text(json.dumps(recipe_values(workplace, "two", training={"batch_size": 4, "save_minutes": 1e-9})))
    script = workplace / "two.py"
    script.write_text(TWO_PROCESSES)
    on_two_processes([sys.executable, str(script), str(path)])
    assert Path(f"{path}.claims").read_text() == "0"  # one process prepares, the other waits
    assert_same_weights(full, workplace / "two", atol=1e-5)
    assert log_of(workplace / "two", "eval_nll") == pytest.approx(log_of(full, "eval_nll"), abs=1e-5)


def test_gate_only_leaves_the_base_alone(workplace: Path) -> None:
    out = run(workplace, "gate", tune="gate", training={"epochs": 20, "gate_learning_rate": 0.002})
    info = load_info(out)
    assert info is not None and info.kind == "gate" and info.base_model == str(workplace / "base")
    assert not (out / "model.safetensors").exists()
    model, head, _, _ = load_base(out)
    untouched = AutoModelForCausalLM.from_pretrained(workplace / "base")
    assert head is not None
    torch.testing.assert_close(model.state_dict(), untouched.state_dict())
    losses = log_of(out, "eval_loss")
    assert info.training["figures"]["eval_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert info.training["figures"]["eval_loss"] < losses[0]


def test_weak_supervision_of_the_gate_alone_is_its_initialisation(workplace: Path) -> None:
    out = run(workplace, "gate-weak", tune="gate", objective="weak_supervision")
    trained, initial = DeferralHead.load(out), DeferralHead.load(out / "init")
    torch.testing.assert_close(trained.state_dict(), initial.state_dict())
    marginal = load_info(run(workplace, "gate", tune="gate", training={"epochs": 20, "gate_learning_rate": 0.002}))
    info = load_info(out)
    assert info is not None and marginal is not None and not (out / "model.safetensors").exists()
    assert info.training["figures"]["eval_nll"] > marginal.training["figures"]["eval_nll"]


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["q_proj", "v_prj"], "the base has no layer 'v_prj'; did you mean 'v_proj'"),
        (["zqzq"], "no layer 'zqzq'; there are .*q_proj.*, or all-linear"),
        (r".*\.zq", "no layer of the base matches .*; one is called model.layers.0"),
        ("[", "'\\[' is no regular expression"),
    ],
)
def test_layers_that_lora_does_not_find_are_told_before_anything_is_scored(
    workplace: Path, targets: list[str] | str, says: str
) -> None:
    with pytest.raises(CollmError, match=says):
        run(workplace, "no_lora", tune="lora", lora={"target_modules": targets})
    assert not (workplace / "no_lora" / "cache").exists()


def test_lora_is_small_and_loads_merged(workplace: Path) -> None:
    out = run(workplace, "lora", tune="lora", training={"learning_rate": 1e-2})
    assert not (out / "model.safetensors").exists()
    names = load_file(out / "adapter_model.safetensors").keys()
    assert names and not any("lm_head" in name or "embed" in name for name in names)
    model, head, tokenizer, info = load_base(out)
    assert head is not None and info.kind == "lora"
    told = json.loads((out / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == info.base_model, "a place on the machine that trained it"
    untouched = AutoModelForCausalLM.from_pretrained(workplace / "base")
    ids = torch.tensor([tokenizer.encode("3 + 10 = ")])
    assert (model(ids).logits - untouched(ids).logits).abs().max() > 1e-3


def test_another_base_is_warned_of(workplace: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]) -> None:
    out = run(workplace, "gate", tune="gate", training={"epochs": 20, "gate_learning_rate": 0.002})  # done already
    tokenizer = load_base(workplace / "base")[2]
    tiny_model(seed=5, vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="collm calibrate"):
        load_base(out, base=str(tmp_path))


def test_plain_fine_tuning_and_weak_supervision(workplace: Path) -> None:
    sft = run(workplace, "sft", objective="sft", assistants=[])
    assert load_info(sft) is not None and not (sft / "gate.safetensors").exists()
    weak = run(workplace, "weak", objective="weak_supervision")
    info = load_info(weak)
    assert info is not None and (weak / "gate.safetensors").exists()  # which decodes it, as a pair
    figures = info.training["figures"]["after"]
    assert figures["eval_loss"] != pytest.approx(figures["eval_nll"], abs=1e-3)


def test_deferral_cost_is_added_and_lowers_the_gate(workplace: Path) -> None:
    gates = []
    for cost in (0.0, 20.0):  # an untrained base loses some 6 nats a token without help
        out = run(
            workplace,
            f"cost{cost}",
            tune="gate",
            deferral_cost=cost,
            training={"epochs": 20, "gate_learning_rate": 0.05},
        )
        info = load_info(out)
        assert info is not None
        figures = info.training["figures"]
        deferred = figures["eval_gate/calculator"] + figures["eval_gate/other"]
        assert figures["eval_loss"] == pytest.approx(figures["eval_nll"] + cost * deferred, abs=1e-5)
        gates.append(deferred)
    assert gates[1] < 0.7 * gates[0]


def test_gradient_checkpointing_changes_nothing(workplace: Path, full: Path) -> None:
    other = run(workplace, "checkpointing", training={"gradient_checkpointing": True})
    assert_same_weights(full, other, atol=1e-6)


def test_nan_stops_and_keeps_the_last_good_checkpoint(workplace: Path) -> None:
    values = recipe_values(
        workplace, "nan", training={"learning_rate": 1e30, "epochs": 4, "evaluations": 8, "warmup": 0}
    )
    values["trainer"] = {"max_grad_norm": 0}
    with pytest.raises(CollmError, match="the loss is nan.*lower learning_rate"):
        train(parse_recipe(values), progress=False)
    assert load_info(workplace / "nan") is None


def test_runs_are_not_mixed_up(workplace: Path, full: Path) -> None:
    before = weights(full)
    assert run(workplace, "full") == full  # finished: left as it is
    with pytest.raises(CollmError, match="another recipe.*training.*--restart"):
        run(workplace, "full", training={"learning_rate": 2e-3})
    # A run of a version that did not know all of today's keys is still the same recipe's.
    kept = json.loads((full / "run.json").read_text())
    del kept["base"]["validation_scores"], kept["assistants"][0]["validation_scores"]
    (full / "run.json").write_text(json.dumps(kept))
    assert run(workplace, "full") == full
    (workplace / "foreign").mkdir()
    (workplace / "foreign" / "thesis.txt").write_text("precious")
    with pytest.raises(CollmError, match="choose another out"):
        run(workplace, "foreign")
    assert {path.name for path in (workplace / "foreign").iterdir()} == {"thesis.txt"}
    torch.testing.assert_close(before, weights(full))


def test_pickled_weights_are_refused(workplace: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((workplace / "base" / "config.json").read_text())
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CollmError, match="pickled weights.*safetensors"):
        run(workplace, "pickle", base={"model": str(tmp_path)})


def test_a_gate_of_another_width_is_refused(full: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(full, copy)
    save_file({"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, copy / "gate.safetensors")
    with pytest.raises(CollmError, match="width 16"):
        load_base(copy)


def test_newer_and_partial_checkpoints_are_refused(full: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(full, copy)
    raw = json.loads((copy / "collm.json").read_text())
    (copy / "collm.json").write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(CollmError, match="upgrade collm"):
        load_base(copy)
    (copy / "collm.json").unlink()
    with pytest.raises(CollmError, match="partly written"):
        load_base(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objektive": "sft"}, "unknown key 'objektive'; did you mean 'objective'"),
        ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat'; did you mean 'learning_rate'"),
        ({"assistants": [{"name": "a", "modle": "x"}]}, "did you mean 'model'"),
        ({"objective": "sft"}, "leave out the assistants"),
        ({"assistants": []}, "needs at least one assistant"),
        ({"base": {"model": "x", "dtype": "bfloat16"}}, "moves hardly any weight.*training.bf16: true.*tune: lora"),
        ({"trainer": {"save_step": 3}}, "did you mean 'save_steps'"),
    ],
)
def test_faulty_recipes_name_the_fault(workplace: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CollmError, match=message):
        train(parse_recipe(recipe_values(workplace, "faulty", **change)), progress=False)


def test_missing_and_malformed_recipe_files(tmp_path: Path) -> None:
    with pytest.raises(CollmError, match="no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(CollmError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")


def test_scores_made_beforehand_are_used_and_checked(workplace: Path, full: Path, tmp_path: Path) -> None:
    from collm.data.scoring import score, score_tool
    from collm.models.tools import make_tool

    tokenizer = load_base(workplace / "base")[2]
    formatter, examples = Formatter(tokenizer), load_examples(workplace / "train.jsonl")
    # Scored up to the base's context, as `max_length` is cut to it.
    options: dict[str, Any] = {"max_length": 256, "progress": False}
    score(examples, str(workplace / "base"), formatter, tmp_path / "base", **options)
    score(examples, str(workplace / "other"), formatter, tmp_path / "other", **options)
    score_tool(examples, make_tool("calculator", tokenizer), formatter, tmp_path / "calculator", **options)
    given: dict[str, Any] = {
        "base": {"model": str(workplace / "base"), "scores": str(tmp_path / "base")},
        "assistants": [
            {"name": "calculator", "model": "calculator", "scores": str(tmp_path / "calculator")},
            {"name": "other", "model": str(workplace / "other"), "scores": str(tmp_path / "other")},
        ],
    }
    out = run(workplace, "given", cache=str(tmp_path / "cache"), **given)
    assert_same_weights(full, out, atol=0)
    assert not list((tmp_path / "cache").glob("*-train-*"))  # only the validation examples were scored
    edited = (workplace / "train.jsonl").read_text().replace("3 + 10 = 13", "3 + 10 = 31")
    (tmp_path / "edited.jsonl").write_text(edited)
    data = {"train": str(tmp_path / "edited.jsonl")}
    with pytest.raises(CollmError, match=r"no scores for 1 of 32 examples as they now are .*line 1\)"):
        run(workplace, "edited", cache=str(tmp_path / "cache"), data=data, **given)
    with pytest.raises(CollmError, match="stale.*weights"):
        swapped = [given["assistants"][0], {**given["assistants"][1], "scores": str(tmp_path / "base")}]
        run(workplace, "swapped", cache=str(tmp_path / "cache"), **{**given, "assistants": swapped})


# -- initialisation


def test_initialisation_finds_what_hidden_states_tell() -> None:
    """Large, shifted and correlated features, as hidden states are; a rare class that they do tell apart."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator)
    hidden = torch.randn(4000, 16, generator=generator) @ mixing * 30 + 100
    direction = torch.linalg.solve(mixing, torch.randn(16, generator=generator))
    projection = (hidden - hidden.mean(0)) @ direction
    labels = (projection > projection.quantile(0.97)).long()
    head = initialisation.fit(hidden[:3000], labels[:3000], 1)
    report = initialisation.report(head, hidden[3000:], labels[3000:], torch.ones(1000, 1).bool(), labels[:3000])
    assert report.recall > 0.95
    assert report.precision > 0.4  # balanced classes favour recall
    assert report.label_share[1] == pytest.approx(0.03, abs=0.01)


def test_initialisation_tells_assistants_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3000, 8, generator=generator)
    labels = torch.where(hidden[:, 0] > 1, 1, torch.where(hidden[:, 1] > 1, 2, 0))
    head = initialisation.fit(hidden, labels, 2)
    report = initialisation.report(head, hidden, labels, torch.ones(3000, 2).bool(), labels)
    assert report.recall > 0.9 and report.accuracy_of_choice > 0.9


def test_initialisation_without_labels_starts_low() -> None:
    head = initialisation.fit(torch.randn(50, 4), torch.zeros(50, dtype=torch.long), 2)
    assert float(log_gate(head(torch.randn(10, 4))).detach().exp()[:, 1:].max()) < 0.05


def test_doubts_about_the_initial_gate() -> None:
    good = initialisation.GateReport((0.9, 0.1), 0.5, 0.8, 1.0, 0.1, 0.9)
    nan = float("nan")
    assert initialisation.doubts(good) is None
    for change, words in (
        ({"label_share": (1.0, 0.0), "precision": nan, "recall": nan}, "no token is labelled"),
        ({"precision": 0.0, "recall": nan}, "no held-out token is labelled"),
        ({"precision": 0.0, "recall": 0.0}, "finds none of the held-out tokens"),
        ({"precision": nan, "recall": 0.0}, "finds none of the held-out tokens"),  # it defers nothing at all
    ):
        assert words in (initialisation.doubts(dataclasses.replace(good, **change)) or ""), change


def test_standardisation_folds_away() -> None:
    hidden = torch.randn(100, 6) * 20 + 7
    standardise = initialisation.Standardiser.of(hidden)
    head = DeferralHead(6, 2)
    torch.nn.init.normal_(head.weight)
    expected = head(standardise(hidden))
    standardise.fold(head)
    torch.testing.assert_close(head(hidden), expected, atol=1e-4, rtol=1e-4)


def test_a_resumed_run_uses_the_same_initial_gate(full: Path) -> None:
    figures = json.loads((full / "init" / "figures.json").read_text())
    assert figures["label_share"] == pytest.approx([1 - sum(figures["label_share"][1:]), *figures["label_share"][1:]])
    assert sum(figures["label_share"][1:]) > 0


def test_scores_of_one_file_cover_its_held_out_share(workplace: Path, tmp_path: Path) -> None:
    from collm.data.scoring import score

    formatter, examples = Formatter(load_base(workplace / "base")[2]), load_examples(workplace / "train.jsonl")
    for name in ("base", "other"):
        score(examples, str(workplace / name), formatter, tmp_path / name, max_length=256, progress=False)
    values = recipe_values(workplace, "share", cache=str(tmp_path / "cache"), tune="gate")
    values["data"] = {"train": str(workplace / "train.jsonl"), "validation_share": 0.3}
    values["base"]["scores"] = str(tmp_path / "base")
    values["assistants"] = [{"name": "other", "model": str(workplace / "other"), "scores": str(tmp_path / "other")}]
    train(parse_recipe(values), progress=False)
    assert {path.name.partition("-")[0] for path in (tmp_path / "cache").glob("[!.]*")} == {"hidden"}


def test_a_start_that_failed_does_not_claim_its_folder(workplace: Path) -> None:
    with pytest.raises(CollmError, match=r"none\.jsonl"):
        run(workplace, "second-try", tune="gate", data={"train": str(workplace / "none.jsonl")})
    assert load_info(run(workplace, "second-try", tune="gate")) is not None


def test_several_gpus_want_a_launcher(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(CollmError, match="4 GPUs.*accelerate launch --multi_gpu --num_processes 4 -m collm train"):
        run(workplace, "launcherless")
    run(workplace, "gate_alone", tune="gate", training={"epochs": 1})  # one GPU does for the gate
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CollmError, match="fsdp_cpu_ram_efficient_loading.*false"):
        run(workplace, "empty_weights")
