"""Every command through the command line, with tiny models; above all what happens on bad input."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.cli import main
from collm.cli.console import speaking

PROBLEMS = [("12 + 30", 42), ("56 * 9", 504), ("9 - 3", 6), ("30 / 5", 6), ("7 + 8", 15), ("4 * 25", 100)] * 2


def collm(*arguments: object, stdin: str | None = None) -> Result:
    """Run a command; an exception that is not an exit is a bug and is raised."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, *words: str, code: int = 1) -> None:
    """One line of error on stderr that says these words, the exit code, and no traceback."""
    assert result.exit_code == code, result.output
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output
    if code == 1:
        assert any(line.startswith("error: ") for line in result.stderr.splitlines())


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Iterator[Path]:
    """A folder to work in: `base`, `helper`, `pickled` (weights), `data.jsonl`, `held_out.jsonl`, `recipe.yaml`."""
    root = tmp_path_factory.mktemp("world")
    for name, seed in (("base", 0), ("helper", 1)):
        tiny_model(seed=seed).save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    (root / "pickled").mkdir()
    tiny_tokenizer.save_pretrained(root / "pickled")
    (root / "pickled" / "config.json").write_text((root / "base" / "config.json").read_text())
    torch.save(tiny_model(seed=0).state_dict(), root / "pickled" / "pytorch_model.bin")
    rows = [
        {
            "id": f"p{number}",
            "messages": [
                {"role": "user", "content": f"What is {problem}?"},
                {"role": "assistant", "content": f"{problem} = {answer}\n#### {answer}"},
            ],
            "answer": str(answer),
        }
        for number, (problem, answer) in enumerate(PROBLEMS)
    ]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [{**row, "id": f"h{number}"} for number, row in enumerate(rows[:4])]
    (root / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    here = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(here)


# -- usage


def test_python_m_collm() -> None:
    done = subprocess.run([sys.executable, "-m", "collm", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("collm, version ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_and_options(shell: str) -> None:
    """As docs/cli.md says; without importing torch, for it is run at each start of a shell and at each Tab."""
    code = "import sys; sys.argv = ['collm']\nfrom collm.cli import main\ntry:\n    main()\nfinally:\n"
    code += "    assert 'torch' not in sys.modules"
    told = []
    for more in ({}, {"COMP_WORDS": "collm calib", "COMP_CWORD": "1" if shell != "fish" else "calib"}):
        kind = "complete" if more else "source"
        environment = {**os.environ, "_COLLM_COMPLETE": f"{shell}_{kind}", **more}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        assert "AssertionError" not in done.stderr, done.stderr
        told.append(done.stdout)
    assert "_COLLM_COMPLETE" in told[0] and "calibrate" in told[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], ["no such command 'generat'", "did you mean 'generate'?"]),
        (["generate", "x", "hello", "--temprature", "1"], ["--temprature", "--temperature"]),
        (["score", "x.jsonl", "--out", "y"], ["--model"]),
        (["generate", "x", "hello", "--top-p", "0"], ["--top-p"]),
        (["generate", "x", "hello", "--max-cache-tokens", "0"], ["neither a number of tokens nor a share below 1"]),
        (["generate", "x", "hello", "--max-cache-tokens", "1.5"], ["--max-cache-tokens", "'1.5'", "0.3"]),
        (["generate", "x", "hello", "--max-cache-tokens", "1.0"], ["'1.0' is neither a number of tokens nor a share"]),
        (["generate", "x", "hello", "--max-cache-tokens", "half"], ["neither a number of tokens", "0.3"]),
        (["generate", "x", "hello", "--deferral", "often"], ["often", "threshold"]),
        (["generate", "x", "hello", "--deferral", "random"], ["--deferral-rate"]),
        (["generate", "x", "hello", "--threshold", "0.5", "--deferral-rate", "0.2"], ["not both"]),
        (
            ["generate", "x", "hello", "--deferral", "always", "--threshold", "0.3"],
            ["--threshold", "--deferral always"],
        ),
        (
            ["eval", "x", "--task", "t", "--data", "d", "--deferral", "never", "--deferral-rate", "0.3"],
            ["--deferral-rate is"],
        ),
        (["generate", "x", "hello", "--deferral", "compose", "--threshold", "0.3"], ["--deferral compose"]),
        (["generate", "x", "hello", "--calibration-task", "t"], ["--calibration-task says", "--deferral-rate"]),
        (["generate", "x", "hello", "--alone", "base", "--deferral", "always"], ["--alone", "--deferral"]),
        (["generate", "x", "hello", "--alone", "base", "--threshold", "0"], ["--alone", "--threshold"]),
        (["generate", "x", "hello", "--stream", "--json"], ["--json", "neither"]),
        (["generate", "x", "hello", "--raw", "--system", "Be brief."], ["--raw"]),
        (["generate", "x", "-"], ["the prompt is empty"]),
        (["calibrate", ".", "--task", "t", "--data", "d", "--rates", "0,half"], ["--rates", "0,half"]),
        (["calibrate", ".", "--task", "t", "--data", "d", "--rates", "0,20"], ["between 0 and 1"]),
        (["train", "no-such-recipe.yaml"], ["no-such-recipe.yaml"]),
        (["trace", "no-such-trace.jsonl"], ["no-such-trace.jsonl"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_usage_errors_exit_with_2(arguments: list[str], words: list[str]) -> None:
    refused(collm(*arguments), *words, code=2)


def test_a_tool_is_scored_with_the_base_tokenizer(world: Path) -> None:
    refused(collm("score", "data.jsonl", "--model", "calculator", "--out", "s"), "--base", code=2)


# -- score


def test_score(world: Path) -> None:
    import datasets

    arguments = ["score", "data.jsonl", "--model", "base", "--out", "scores/base"]
    first = collm(*arguments)
    assert first.exit_code == 0, first.output
    figures, where = first.stdout.splitlines()
    assert where == "scores written to scores/base"
    info = json.loads((world / "scores/base/scores.json").read_text())
    for figure in (
        f"12 examples, {info['labelled_tokens']} tokens scored",
        f"mean log-probability {info['mean_log_prob']:.3f}",
        f"its first choice {info['top1_rate']:.1%}",
        f"{info['tokens_per_second']:,.0f} tokens/s",
    ):
        assert figure in figures
    scores = datasets.load_from_disk("scores/base")
    assert scores["id"] == [f"p{i}" for i in range(len(PROBLEMS))]
    written = (world / "scores/base/scores.json").stat().st_mtime_ns
    again = collm(*arguments)
    assert again.exit_code == 0 and "scored already" in again.stderr
    assert (world / "scores/base/scores.json").stat().st_mtime_ns == written


def test_score_a_tool(world: Path) -> None:
    import datasets

    result = collm("score", "data.jsonl", "--model", "calculator", "--base", "base", "--out", "scores/calculator")
    assert result.exit_code == 0, result.output
    scores = datasets.load_from_disk("scores/calculator")
    assert "possible to the model" in result.stdout and "mean" not in result.stdout
    # "12 + 30 = 42": the calculator is sure of the result and silent elsewhere.
    assert any(scores[0]["top1"]) and not all(scores[0]["top1"])


def test_score_beside_a_base_without_a_template(world: Path, tmp_path: Path) -> None:
    """Completions are tokenised by the template that is given, as the assistant's prompts are."""
    for name in ("base", "helper"):
        shutil.copytree(name, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink()
    template = tmp_path / "template.jinja"
    shutil.copy("base/chat_template.jinja", template)
    options = ["--base", tmp_path / "base", "--out", tmp_path / "scores"]
    bare = ["score", "data.jsonl", "--model", tmp_path / "helper", *options]
    refused(collm(*bare), "chat template")
    result = collm(*bare, "--chat-template", template)
    assert result.exit_code == 0, result.output


def test_the_base_is_told_the_variables_of_templates_too(world: Path, tmp_path: Path) -> None:
    """What it learns may depend on them, and that is what an assistant is scored on."""
    shutil.copytree("base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content and (keep or loop.last) %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}] * 2
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    scoring = ["score", tmp_path / "talk.jsonl", "--model", tmp_path / "base", "--template-kwargs", '{"keep": true}']
    told = []
    for name, base in (("by-itself", []), ("by-the-base", ["--base", tmp_path / "base"])):
        result = collm(*scoring, *base, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        told.append(json.loads((tmp_path / name / "scores.json").read_text()))
    keys = ("fingerprint", "completions", "labelled_tokens", "mean_log_prob")
    assert [told[0][key] for key in keys] == [told[1][key] for key in keys]


def test_stale_scores_are_refused(world: Path) -> None:
    arguments = ["score", "data.jsonl", "--model", "base", "--out", "scores/stale"]
    assert collm(*arguments).exit_code == 0
    refused(collm(*arguments, "--system", "Be brief."), "scores/stale", "system prompt")
    refused(collm(*arguments, "--max-length", 64), "max_length")
    refused(collm(*arguments[:3], "helper", *arguments[4:]), "weights")
    assert collm(*arguments[:3], "helper", *arguments[4:], "--restart").exit_code == 0


def bad_files() -> list[Any]:
    good = '{"prompt": "2 + 2 =", "completion": " 4"}\n'
    turns = '{"messages": [{"role": "user", "content": "Hello"}]}\n'
    return [
        pytest.param(good + '{"prompt": \n', ["data.jsonl, line 2", "not JSON", "expected"], id="malformed"),
        pytest.param(good + '{"text": "a"}\n', ["line 2", "neither messages nor prompt"], id="no-prompt"),
        pytest.param("\n", ["no rows", "expected"], id="empty"),
        pytest.param(turns, ["assistant"], id="no-assistant-turn"),
    ]


@pytest.mark.parametrize(("content", "words"), bad_files())
def test_bad_data(world: Path, tmp_path: Path, content: str, words: list[str]) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    out = tmp_path / "scores"
    refused(collm("score", tmp_path / "data.jsonl", "--model", "base", "--out", out), *words)
    assert not out.exists()


def test_skip_bad_counts_and_goes_on(world: Path, tmp_path: Path) -> None:
    lines = (world / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:2], "{", *lines[2:]]))
    result = collm("score", tmp_path / "data.jsonl", "--model", "base", "--out", tmp_path / "s", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert "line 3" in result.stderr and "1 bad" in result.stderr


def test_everything_cut_away(world: Path, tmp_path: Path) -> None:
    result = collm("score", "data.jsonl", "--model", "base", "--out", tmp_path / "s", "--max-length", 4)
    refused(result, "max_length")


def test_pickled_weights_are_refused(world: Path, tmp_path: Path) -> None:
    refused(collm("score", "data.jsonl", "--model", "pickled", "--out", tmp_path / "s"), "pickled", "safetensors")


def test_another_tokenizer_is_scored_in_chunks(
    world: Path, tmp_path: Path, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    from conftest import make_tokenizer

    tiny_model(vocab_size=290).save_pretrained(tmp_path / "foreign")
    make_tokenizer(vocab_size=290).save_pretrained(tmp_path / "foreign")
    result = collm(
        "score", "data.jsonl", "--model", tmp_path / "foreign", "--base", "base", "--out", tmp_path / "scores"
    )
    assert result.exit_code == 0, result.output
    assert "chunks scored" in result.stdout
    rows = Dataset.load_from_disk(str(tmp_path / "scores"))
    assert all(row["chunk_start"][0] == 0 and len(row["chunk_start"]) == len(row["log_score"]) for row in rows)


def test_debug_shows_the_traceback(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickled"):
        collm("score", "data.jsonl", "--model", "pickled", "--out", tmp_path / "s", "--debug")


def test_ctrl_c_says_how_to_go_on(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal in the midst of scoring; the second run ends what the first began."""
    from collm.data import scoring

    done = []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        done.append(arguments)
        return score_batch(*arguments)

    score_batch = scoring.score_batch
    command = ["score", "data.jsonl", "--model", "base", "--out", tmp_path / "scores", "--batch-tokens", 64]
    monkeypatch.setattr(scoring, "score_batch", interrupted)
    first = collm(*command)
    assert first.exit_code == 130, first.output
    assert "run the same command again to resume" in first.stderr and "Traceback" not in first.stderr
    assert not (tmp_path / "scores").exists()
    monkeypatch.undo()
    second = collm(*command)
    assert second.exit_code == 0 and "going on after 3 of 12" in second.stderr, second.output


def test_ctrl_c_where_there_is_nothing_to_resume(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collm.llm import CollaborativeLM

    monkeypatch.setattr(CollaborativeLM, "generate_batch", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = collm("generate", "base", "Hello")
    assert result.exit_code == 130 and "nothing was changed" in result.stderr


def test_a_missing_extra_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "collm.training.train", raising=False)
    result = collm("train", write_recipe(tmp_path / "recipe.yaml", out=str(tmp_path / "out")))
    refused(result, "accelerate", "pip install 'collm[train]'")


# -- train


RECIPE: dict[str, Any] = {
    "out": "runs/pair",
    "base": {"model": "base"},
    "assistants": [{"name": "calculator", "model": "calculator"}, {"name": "helper", "model": "helper"}],
    "data": {"train": "data.jsonl", "validation_share": 0.3},
    "tune": "gate",
    "training": {"epochs": 2},
}


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


@pytest.fixture(scope="module")
def pair(world: Path) -> str:
    """A checkpoint made by `collm train`: the gate alone, for a calculator and a second model."""
    result = collm("train", write_recipe(world / "recipe.yaml"))
    assert result.exit_code == 0, result.output
    return "runs/pair"


def test_train_makes_a_checkpoint_and_leaves_a_finished_one_alone(pair: str) -> None:
    info = json.loads(Path(pair, "collm.json").read_text())
    assert info["kind"] == "gate" and [a["name"] for a in info["assistants"]] == ["calculator", "helper"]
    again = collm("train", "recipe.yaml")
    assert again.exit_code == 0 and "finished already" in again.stderr and "written" not in again.output
    lines = {name: value.strip() for name, _, value in (line.partition("  ") for line in again.stdout.splitlines())}
    figures = info["training"]["figures"]
    assert lines["held-out nll per token"] == f"{figures['eval_nll']:.4f}"
    assert lines["of the base alone"] == f"{figures['eval_base_nll']:.4f}"
    assert lines["mean gate, held out"].startswith(f"calculator {figures['eval_gate/calculator']:.3f}, helper")
    assert lines["next"] == "collm calibrate runs/pair --task TASK --data CALIBRATION.jsonl"


def test_train_tells_how_it_goes_and_what_came_of_it(world: Path, tmp_path: Path) -> None:
    training = {"epochs": 2, "batch_size": 4, "evaluations": 2}
    recipe = write_recipe(tmp_path / "r.yaml", out=str(tmp_path / "out"), tune="full", training=training)
    result = collm("train", recipe)
    assert result.exit_code == 0, result.output
    assert "{'" not in result.output  # the Trainer's own dictionaries
    told = result.stderr.splitlines()
    figures = json.loads((tmp_path / "out/collm.json").read_text())["training"]["figures"]
    [before] = [line for line in told if line.startswith("held out before training: loss ")]
    assert f"base alone {figures['before']['eval_base_nll']:.4f}" in before and "mean gate: calculator 0." in before
    assert sum(line.startswith("held out after step") for line in told) == 2
    assert any(line.startswith(f"step 1 of {figures['steps']}: loss ") and line.endswith("left") for line in told)
    kept = f"step {figures['best_step']} of {figures['steps']}, the best on held-out text"
    assert any(line.startswith("kept ") and line.endswith(kept) for line in result.stdout.splitlines())


def test_a_second_process_on_the_same_folder_is_refused(world: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    recipe = write_recipe(tmp_path / "r.yaml", out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out/.lock"):
        refused(collm("train", recipe), "is being written by another process", str(tmp_path / "out"))
        refused(collm("train", recipe, "--restart"), "is being written by another process")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}
    # The file of a process that was killed is in nobody's way; test_training kills one.
    assert collm("train", recipe).exit_code == 0


def test_a_folder_belongs_to_its_recipe(pair: str, tmp_path: Path) -> None:
    refused(collm("train", write_recipe(tmp_path / "other.yaml", training={"epochs": 3})), "another recipe", "training")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainng": {}}, ["unknown key 'trainng'", "did you mean 'training'?"]),
        ({"training": {"epoch": 1}}, ["unknown key 'training.epoch'", "did you mean 'epochs'?"]),
        ({"assistants": [{"name": "a", "modle": "calculator", "model": "calculator"}]}, ["did you mean 'model'?"]),
        ({"tune": "everything"}, ["tune", "full"]),
        ({"data": {"train": "missing.jsonl"}}, ["missing.jsonl"]),
        ({"base": {"model": "./nowhere"}}, ["./nowhere", "no such folder"]),
        ({"base": {"model": "pickled"}}, ["pickled", "safetensors"]),
        ({"base": {"model": "calculator"}}, ["tool"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_recipes(world: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    refused(collm("train", write_recipe(tmp_path / "recipe.yaml", out=str(tmp_path / "out"), **changes)), *words)


def test_a_recipe_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("out: [")
    refused(collm("train", tmp_path / "recipe.yaml"), "recipe.yaml", "not valid YAML")


def test_train_refuses_scores_of_another_template(world: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    assert collm("score", "data.jsonl", "--model", "base", "--out", scores, "--system", "Be brief.").exit_code == 0
    recipe = write_recipe(
        tmp_path / "recipe.yaml", out=str(tmp_path / "out"), base={"model": "base", "scores": str(scores)}
    )
    refused(collm("train", recipe), "stale", "system prompt")


@pytest.fixture
def far_away(world: Path, tmp_path: Path) -> dict[str, Any]:
    """The assistant of a recipe: scored elsewhere with a prompt of its own, and nothing but its scores is here."""
    shutil.copytree("helper", tmp_path / "far")
    options = ["--model", tmp_path / "far", "--base", "base", "--system", "Be brief.", "--max-length", 256]
    for name in ("data", "held_out"):
        assert collm("score", f"{name}.jsonl", *options, "--out", tmp_path / name).exit_code == 0
    shutil.rmtree(tmp_path / "far")
    scores = {"scores": str(tmp_path / "data"), "validation_scores": str(tmp_path / "held_out")}
    return {"name": "helper", "model": str(tmp_path / "far"), **scores}


TWO_FILES = {"train": "data.jsonl", "validation": "held_out.jsonl"}


def test_train_from_scores_alone(world: Path, tmp_path: Path, far_away: dict[str, Any]) -> None:
    """The same gate as with the assistant at hand, and a checkpoint that knows whose scores it was made from."""
    near = {"name": "helper", "model": "helper", "format": {"system_prompt": "Be brief."}}
    infos, gates = [], []
    for name, assistant in (("alone", far_away), ("near", near)):
        recipe = write_recipe(tmp_path / f"{name}.yaml", out=name, assistants=[assistant], data=TWO_FILES)
        result = collm("train", recipe)
        assert result.exit_code == 0, result.output
        # Neither has learned anything: the helper is right nowhere.
        assert "warning: no token is labelled to be deferred" in result.stderr and "init.method b" in result.stderr
        info = json.loads(Path(name, "collm.json").read_text())["assistants"][0]
        assert info.pop("place") == (None if assistant is far_away else "../helper")
        infos.append(info)
        gates.append(Path(name, "gate.safetensors").read_bytes())
    assert gates[0] == gates[1]
    assert {**infos[0], "spec": "helper"} == infos[1] and infos[0]["weights_fingerprint"]
    found = collm("generate", "alone", QUESTION, "--assistant", "helper", "--max-tokens", 3)
    assert found.exit_code == 0 and "warning" not in found.stderr
    other = collm("generate", "alone", QUESTION, "--assistant", "base", "--max-tokens", 3)
    assert other.exit_code == 0
    assert (
        "warning: base does not hold the weights that the gate was trained with as assistant 'helper'" in other.stderr
    )
    assert "collm calibrate" in other.stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"validation_scores": None}, ["'helper'", "no such folder", "give the scores as validation_scores"]),
        ({"scores": None, "validation_scores": None}, ["give the scores as scores and validation_scores"]),
        ({"format": {"system_prompt": "Be long."}}, ["stale", "Be brief.", "Be long."]),
        ({"validation_scores": "base_scores"}, ["base_scores", "stale", "weights"]),
    ],
    ids=["no-validation-scores", "no-scores", "other-prompt", "other-model"],
)
def test_scores_alone_that_do_not_do(
    world: Path, tmp_path: Path, far_away: dict[str, Any], changes: dict[str, Any], words: list[str]
) -> None:
    score = ["score", "held_out.jsonl", "--model", "base", "--out", "base_scores", "--max-length", 256]
    assert collm(*score).exit_code == 0
    recipe = write_recipe(tmp_path / "r.yaml", out=str(tmp_path / "out"), assistants=[{**far_away, **changes}])
    values = yaml.safe_load(recipe.read_text())
    refused(collm("train", write_recipe(recipe, **{**values, "data": TWO_FILES})), *words)


def test_scores_of_tokens_that_the_base_does_not_learn(world: Path, tmp_path: Path, far_away: dict[str, Any]) -> None:
    base = {
        "model": "base",
        "format": {"chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"},
    }
    recipe = write_recipe(
        tmp_path / "r.yaml", out=str(tmp_path / "out"), base=base, assistants=[far_away], data=TWO_FILES
    )
    refused(collm("train", recipe), "stale", "--base")


def test_scores_for_a_validation_file_want_one(world: Path, tmp_path: Path, far_away: dict[str, Any]) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", out=str(tmp_path / "out"), assistants=[far_away])
    refused(collm("train", recipe), "validation_scores go with data.validation")


# -- writing together

TOGETHER = ["--assistant", "helper=helper", "--max-tokens", "12"]
QUESTION = "What is 12 + 30?"


def test_generate_as_json(pair: str) -> None:
    result = collm("generate", pair, QUESTION, *TOGETHER, "--json")
    assert result.exit_code == 0, result.output
    row = json.loads(result.stdout)
    assert row["models"] == ["base", "calculator", "helper"]
    assert 1 <= len(row["steps"]) <= 12
    deferred = sum(step["author"] != 0 for step in row["steps"])
    assert row["deferral_rate"] == pytest.approx(deferred / len(row["steps"]))
    assert all(len(step["gate"]) == 3 for step in row["steps"])


def test_generate_prints_text_authors_and_figures(pair: str) -> None:
    plain = collm("generate", pair, QUESTION, *TOGETHER, "--plain", "--threshold", "0.3")
    streamed = collm("generate", pair, QUESTION, *TOGETHER, "--plain", "--threshold", "0.3", "--stream")
    assert plain.exit_code == 0 and plain.stdout == streamed.stdout != "\n"
    shown = collm("generate", pair, QUESTION, *TOGETHER)
    assert "written by:" in shown.stdout and "deferred" in shown.stdout
    # In a pipe, authors are told by brackets, streamed or not.
    marked = collm("generate", pair, QUESTION, *TOGETHER, "--threshold", "0")
    streamed = collm("generate", pair, QUESTION, *TOGETHER, "--threshold", "0", "--stream")
    text = marked.stdout.partition("written by:")[0]
    assert streamed.stdout == text and "[" in text and "[2:...] helper" in streamed.stderr


def test_generate_keeps_what_was_written_before_an_assistant_failed(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from collm.models.tools import Calculator

    def fail(*_: object) -> None:
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(Calculator, "predict", fail)
    command = ["generate", pair, QUESTION, *TOGETHER, "--threshold", "0", "--json"]
    failed = collm(*command)
    row = json.loads(failed.stdout)
    assert failed.exit_code == 1 and "the line is dead" in failed.stderr
    assert row["finish_reason"] == "error" and "calculator" in row["error"] and len(row["steps"]) < 12
    rescued = collm(*command, "--on-assistant-error", "base")
    row = json.loads(rescued.stdout)
    assert rescued.exit_code == 0 and any("dead" in (step["fault"] or "") for step in row["steps"])


def test_speculation_changes_no_text(pair: str) -> None:
    command = ["generate", pair, QUESTION, *TOGETHER, "--threshold", "0.3", "--json"]
    fast, plain = (json.loads(collm(*command, *more).stdout) for more in ([], ["--no-speculative"]))
    assert fast["text"] == plain["text"] and plain["usage"]["drafted"] == 0


def test_generate_reads_the_prompt_from_stdin(pair: str) -> None:
    given = collm("generate", pair, QUESTION, *TOGETHER, "--json")
    piped = collm("generate", pair, "-", *TOGETHER, "--json", stdin=QUESTION + "\n")
    # What it cost is timed, and speculation goes by the times.
    steps = [[step["token_id"] for step in json.loads(result.stdout)["steps"]] for result in (given, piped)]
    assert steps[0] == steps[1] and json.loads(piped.stdout)["text"] == json.loads(given.stdout)["text"]
    raw = collm("generate", pair, "-", *TOGETHER, "--json", "--raw", stdin=QUESTION + "\n")
    assert json.loads(raw.stdout)["prompt_tokens"] < json.loads(given.stdout)["prompt_tokens"]


def test_sampling_options_arrive(pair: str) -> None:
    hot = [*TOGETHER, "--json", "--temperature", "1", "--deferral", "sampled"]
    texts = {seed: collm("generate", pair, QUESTION, *hot, "--seed", seed).stdout for seed in (1, 1, 2)}
    assert texts[1] != texts[2]
    narrow = collm("generate", pair, QUESTION, *hot, "--top-k", 1, "--seed", 2, "--deferral", "never")
    greedy = collm("generate", pair, QUESTION, *TOGETHER, "--json", "--deferral", "never")
    assert json.loads(narrow.stdout)["text"] == json.loads(greedy.stdout)["text"]
    full = json.loads(greedy.stdout)["text"]
    cut = json.loads(
        collm("generate", pair, QUESTION, *TOGETHER, "--json", "--deferral", "never", "--stop", full[3]).stdout
    )
    assert cut["text"] == full[: full.index(full[3])] and cut["finish_reason"] == "stop"


def test_system_prompt_arrives(pair: str) -> None:
    short = json.loads(collm("generate", pair, QUESTION, *TOGETHER, "--json").stdout)
    longer = json.loads(collm("generate", pair, QUESTION, *TOGETHER, "--json", "--system", "Be brief.").stdout)
    assert longer["prompt_tokens"] > short["prompt_tokens"]


def test_a_plain_model_writes_alone(world: Path) -> None:
    result = collm("generate", "base", QUESTION, "--max-tokens", 5, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["models"] == ["base"]
    refused(collm("generate", "base", QUESTION, "--assistant", "calculator", "--deferral", "sampled"), "gate", "train")


def test_alone_is_a_baseline(pair: str) -> None:
    alone = json.loads(collm("generate", pair, QUESTION, *TOGETHER, "--json", "--alone", "helper").stdout)
    helper = json.loads(collm("generate", "helper", QUESTION, "--max-tokens", 12, "--json").stdout)
    assert {step["author"] for step in alone["steps"]} == {2}
    assert alone["text"] == helper["text"]
    refused(collm("generate", pair, QUESTION, *TOGETHER, "--alone", "helpr"), "helpr", "helper")


def test_trace_and_picture(pair: str, tmp_path: Path) -> None:
    trace, picture, page = tmp_path / "t.jsonl", tmp_path / "p.svg", tmp_path / "p.html"
    made = collm("generate", pair, QUESTION, *TOGETHER, "--trace", trace, "--svg", picture)
    assert made.exit_code == 0, made.output
    assert picture.read_text().startswith("<svg") and "calculator" in picture.read_text()
    shown = collm("trace", trace)
    assert shown.exit_code == 0 and QUESTION in shown.stdout
    written = collm("trace", trace, "--html", page)
    assert written.exit_code == 0 and "helper" in page.read_text()
    trace.write_text("{}\n")
    refused(collm("trace", trace), "t.jsonl, line 1", "not a trace")
    trace.write_text("")
    refused(collm("trace", trace), "t.jsonl holds no texts")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([QUESTION, "--assistant", "helpr=helper"], ["helpr", "calculator, helper"]),
        ([QUESTION, "--assistant", "helper=nowhere/at/all"], ["nowhere/at/all"]),
        (["many words " * 300, *TOGETHER], ["context of 256 tokens"]),
        ([QUESTION, *TOGETHER, "--deferral-rate", "0.2"], ["collm calibrate"]),
    ],
    ids=["misspelt", "no-such-folder", "long-prompt", "no-calibration"],
)
def test_generate_refuses(pair: str, arguments: list[str], words: list[str]) -> None:
    refused(collm("generate", pair, *arguments), *words)


def test_the_caches_are_bounded_in_tokens_or_by_a_share(pair: str) -> None:
    """Of a share it is told how much that is."""
    asked = ["generate", pair, QUESTION, *TOGETHER, "--max-tokens", 4, "--max-cache-tokens"]
    refused(collm(*asked, 3), "max_cache_tokens", "raise")
    whole, shared = collm(*asked, 250, "--compiled"), collm(*asked, 0.001)  # on a CPU nothing is compiled
    assert whole.exit_code == shared.exit_code == 0
    assert whole.stdout.splitlines()[0] == shared.stdout.splitlines()[0]
    assert "keeps up to" not in whole.stderr
    for name in ("base", "helper"):
        assert re.search(rf"cpu: {name} keeps up to \d{{3,}} tokens of keys and values", shared.stderr)


def test_a_missing_assistant_is_refused(pair: str, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "moved")
    text = (tmp_path / "moved/collm.json").read_text()
    (tmp_path / "moved/collm.json").write_text(text.replace('"spec": "helper"', '"spec": "gone/elsewhere"'))
    refused(collm("generate", tmp_path / "moved", QUESTION), "'helper' is missing", "helper=SPEC", "gone/elsewhere")


def test_a_newer_checkpoint_is_refused(pair: str, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "newer")
    info = json.loads((tmp_path / "newer/collm.json").read_text())
    (tmp_path / "newer/collm.json").write_text(json.dumps(dict(info, format_version=99)))
    refused(collm("generate", tmp_path / "newer", QUESTION, *TOGETHER), "99", "upgrade collm")


def test_other_weights_are_a_warning(pair: str) -> None:
    result = collm("generate", pair, QUESTION, *TOGETHER, "--base", "helper", "--json")
    assert result.exit_code == 0
    assert "warning: helper does not hold the weights" in result.stderr and "collm calibrate" in result.stderr


# -- eval and calibrate

ROOT = Path(__file__).parent.parent
TASK = ["--task", "word_problems", "--data", "data.jsonl", "--limit", 6, "--batch-size", 3]


def test_speeds_beside_what_was_found(
    pair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_chance = ["--deferral", "random", "--threshold", "0.5"]
    for name, more in (("alone", ["--alone", "base"]), ("joint", []), ("chance", by_chance)):
        done = collm("eval", pair, *TASK, *TOGETHER, *more, "--name", name, "--out", tmp_path / f"{name}.jsonl")
        assert done.exit_code == 0, done.output
    results = [tmp_path / f"{name}.json" for name in ("alone", "joint", "chance")]
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    command: list[Any] = [
        "pair_speed.py",
        pair,
        *results,
        "--data",
        "data.jsonl",
        "--alone",
        "alone=base",
        "--batch",
        2,
    ]
    command += ["--rounds", 2, "--max-tokens", 6, "--dtype", "float32"]
    command += ["--out", tmp_path / "s.json", "--plot", tmp_path / "s.svg"]

    def measure(*words: Any) -> None:
        monkeypatch.setattr(sys, "argv", [str(part) for part in words])
        runpy.run_path(str(folder / "pair_speed.py"), run_name="__main__")

    measure(*command)
    found = json.loads((tmp_path / "s.json").read_text())
    ways = {"alone", *(f"{name}, {way}" for name in ("joint", "chance") for way in ("plain", "speculative"))}
    assert set(found["tokens_per_second"]) == ways and set(found["ratios"]) == {
        f"{way} : alone" for way in ways - {"alone"}
    }
    assert all(one["deferred"] == 0 for one in found["rounds"]["alone"])
    for plain, drafted in zip(found["rounds"]["chance, plain"], found["rounds"]["chance, speculative"], strict=True):
        assert plain["tokens"] == drafted["tokens"] and plain["deferred"] == drafted["deferred"] > 0
    drawn = (tmp_path / "s.svg").read_text()
    assert drawn.startswith("<svg xmlns=") and "<circle" in drawn
    # A quality is not set beside the speed of something else.
    other = json.loads(results[2].read_text())
    other["settings"]["decides"] = "Random(rate=0.1)"
    results[2].write_text(json.dumps(other))
    for words, told in (
        (command, "would be by"),
        (["alone=helper" if w == "alone=base" else w for w in command], "alone"),
    ):
        with pytest.raises(SystemExit):
            measure(*words)
        assert told in capsys.readouterr().err


def test_compare_puts_systems_side_by_side(pair: str, tmp_path: Path) -> None:
    for name, more in (("joint", []), ("alone", ["--alone", "base"])):
        done = collm("eval", pair, *TASK, *TOGETHER, *more, "--name", name, "--out", tmp_path / f"{name}.jsonl")
        assert done.exit_code == 0, done.output
    files = [tmp_path / "alone.json", tmp_path / "joint.json"]
    shown = collm("compare", *files)
    assert "joint against alone" in shown.stdout and "McNemar" in shown.stdout and "6 questions" in shown.stdout
    [row] = json.loads(collm("compare", *files, "--against", "joint", "--json").stdout)
    assert (row["first"], row["second"], row["num_examples"]) == ("joint", "alone", 6)
    refused(collm("compare", *files, "--against", "jont"), "jont", "joint", code=2)
    refused(collm("compare", files[0], tmp_path / "joint.jsonl"), "holds the texts", "its result is", "joint.json")
    refused(collm("compare", files[0], "data.jsonl"), "not the result of an evaluation")
    rule = ("--task", "word_problems_flexible")
    assert (
        collm(
            "eval", pair, *TASK, *rule, *TOGETHER, "--name", "read_by_a_laxer_rule", "--out", tmp_path / "lax.jsonl"
        ).exit_code
        == 0
    )
    shown = collm("compare", *files, tmp_path / "lax.json")
    assert shown.exit_code == 0 and "joint against alone" in shown.stdout and "laxer_rule against" not in shown.stdout
    assert "not tested" in shown.stdout and "laxer_rule (task word_problems_flexible v3)" in shown.stdout
    assert "│ read_by_a_laxer_rule │" in shown.stdout  # to a pipe, nothing is cut off
    refused(collm("compare", files[0], tmp_path / "lax.json"), "different tasks")
    other = collm("eval", pair, *TASK, "--limit", "5", *TOGETHER, "--name", "few", "--out", tmp_path / "few.jsonl")
    assert other.exit_code == 0
    refused(collm("compare", files[0], tmp_path / "few.json"), "different examples")
    again = tmp_path / "again.json"
    again.write_text(files[1].read_text())
    shown = collm("compare", files[1], again, "--against", "joint (again)")  # one name, told apart by the files
    assert "joint (joint) against joint (again)" in shown.stdout


def test_report_puts_evaluations_on_one_page(pair: str, tmp_path: Path) -> None:
    for name, more in (("joint", []), ("alone", ["--alone", "base"])):
        done = collm("eval", pair, *TASK, *TOGETHER, *more, "--name", name, "--out", tmp_path / f"{name}.jsonl")
        assert done.exit_code == 0, done.output
    files = [tmp_path / "alone.json", tmp_path / "joint.json"]
    out = tmp_path / "page" / "report.html"
    (tmp_path / "alone.jsonl").unlink()
    done = collm(
        "report", *files, "--out", out, "--title", "My <systems>", "--cost", "joint/calculator=0.5", "--samples", 2
    )
    assert done.exit_code == 0, done.output
    assert "alone.jsonl is missing" in done.stderr and "joint: read with its traces" in done.stderr
    page = out.read_text()
    assert "<h1>My &lt;systems&gt;</h1>" in page and "against alone" in page and "2 of 6 texts" in page
    assert "0.5 (joint/calculator)" in page
    assert collm("report", files[1], "--out", out, "--samples", 0).exit_code == 0
    assert "<article" not in out.read_text()
    refused(collm("report", *files, "--out", tmp_path / "page.pdf"), "ends in .html", code=2)
    refused(collm("report", *files, "--out", out, "--against", "jont"), "no system 'jont'", "'alone', 'joint'", code=2)
    refused(collm("report", *files, "--out", out, "--cost", "calc=1"), "no such model", "calculator", code=2)
    for wrong in ("calculator", "calculator=much", "calculator=-1", "=1"):
        refused(collm("report", *files, "--out", out, "--cost", wrong), "MODEL=NUMBER", code=2)
    refused(collm("report", *files, "--out", out, "--calibration", pair), "no calibration", "collm calibrate")
    refused(collm("report", tmp_path / "joint.jsonl", "--out", out), "holds the texts")


def test_trace_counts_kinds_of_tokens(pair: str, tmp_path: Path) -> None:
    collm("eval", pair, *TASK, *TOGETHER, "--out", tmp_path / "t.jsonl")
    shown = collm("trace", tmp_path / "t.jsonl", "--classes", "--limit", 3).stdout
    assert "of 3 texts" in shown and "function word" in shown and "number" in shown
    refused(collm("trace", tmp_path / "t.jsonl", "--classes", "--html", tmp_path / "t.html"), "one of them", code=2)
    refused(collm("trace", tmp_path / "t.json"), "its texts are in", "t.jsonl", code=2)


def test_eval_resumes(pair: str, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    command = ["eval", pair, *TOGETHER, *TASK, "--threshold", "0"]
    whole = collm(*command, "--json", "--out", out)
    assert whole.exit_code == 0, whole.output
    figures = json.loads(whole.stdout)
    assert 0 < figures["deferral_rate"] == sum(list(figures["written_by"].values())[1:]) / figures["tokens"]
    assert figures["num_examples"] == 6 and figures["ci95"][0] <= figures["value"] <= figures["ci95"][1]
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    out.write_text("".join(lines[:3]) + lines[3][:20])
    again = collm(*command, "--json", "--out", out)
    # How many passes speculation takes goes by the clock; the texts do not.
    timed = {"seconds": 0, "forward_passes": {}}
    assert {**json.loads(again.stdout), **timed} == {**figures, **timed}
    refused(collm(*command, "--out", out, "--seed", 1), "other settings", "seed")
    # A file that was begun and holds no answer stands in nobody's way.
    empty = tmp_path / "empty.jsonl"
    refused(collm(*command[:-2], "--out", empty, "--deferral-rate", 0.3), "needs a calibration")
    assert not empty.exists()
    empty.write_text(lines[0])
    assert collm(*command, "--out", empty, "--seed", 1).exit_code == 0
    assert "exact match" in collm(*command).stdout


@pytest.mark.parametrize("command", ["eval", "calibrate"])
def test_help_names_the_tasks(command: str) -> None:
    from collm.evaluation.shipped import TASKS

    words = re.findall(r"\w+", collm(command, "--help").stdout)
    assert set(TASKS) <= set(words)


def test_eval_names_the_nearest_task(pair: str) -> None:
    refused(collm("eval", pair, *TOGETHER, "--task", "word_problem", "--data", "data.jsonl"), "'word_problems'")


def test_calibrate_makes_deferral_rates_work(pair: str, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "pair")
    command = ["calibrate", tmp_path / "pair", *TOGETHER, *TASK, "--rates", "0,0.1,1", "--out", tmp_path / "curve"]
    result = collm(*command)
    assert result.exit_code == 0, result.output
    assert "wanted" in result.stdout and (tmp_path / "curve/curve.csv").is_file()
    [table] = json.loads((tmp_path / "pair/collm.json").read_text())["calibration"]
    assert {0, 0.1, 1} <= {row["target_rate"] for row in table["rows"]}
    made = collm("generate", tmp_path / "pair", QUESTION, *TOGETHER, "--json", "--deferral-rate", "0.1")
    assert made.exit_code == 0, made.output
    refused(collm(*command[:-2], "--base", "base", "--data", "missing.jsonl"), "missing.jsonl")
    shutil.copytree(tmp_path / "pair", tmp_path / "copy")
    assert collm("eval", pair, *TASK, "--alone", "base", *TOGETHER, "--out", tmp_path / "r.jsonl").exit_code == 0
    page, curves = tmp_path / "r.html", ("--calibration", tmp_path / "pair", "--calibration", tmp_path / "copy")
    assert collm("report", tmp_path / "r.json", "--out", page, *curves).exit_code == 0
    assert (
        f"Calibration of {tmp_path / 'pair'} on" in page.read_text()
        and f"of {tmp_path / 'copy'} on" in page.read_text()
    )
    again = collm(*command[:-2], "--rates", "0,1")
    assert f"in place of an earlier table of {len(table['rows'])} rates" in again.stdout
    assert "earlier" not in result.stdout
    gain = ["--method", "expected_gain", "--deferral-rate", "0.1"]
    found = collm("generate", tmp_path / "pair", QUESTION, *TOGETHER, *gain)
    refused(found, "a calibration of the expected gain", "--signal expected_gain")


def test_calibrate_tells_rates_that_no_threshold_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    from collm.cli.calibrate import _show
    from collm.models.info import CalibrationRow, CalibrationTable

    rows = [
        CalibrationRow(target_rate=rate, achieved_rate=min(rate, 0.23), threshold=0.5, log_odds=0, metric_value=0.5)
        for rate in (0.0, 0.2, 0.6, 1.0)
    ]
    _show(CalibrationTable(task="t", metric="exact_match", seed=0, num_prompts=1, rows=rows))
    shown = capsys.readouterr()
    assert [line.endswith("missed") for line in shown.out.splitlines()] == [False, False, False, True, True]
    assert "warning: the rates 0.6, 1 were missed (highest achieved: 0.230)" in shown.err


def test_thresholds_are_shown_to_the_digits_they_have(capsys: pytest.CaptureFixture[str]) -> None:
    from collm.cli.calibrate import _show
    from collm.llm.deferral import to_threshold
    from collm.models.info import CalibrationRow, CalibrationTable

    shown = {("gate", 40.0): "1 - 4.2e-18", ("gate", 0.0): "0.5000", ("gate", -10.0): "4.5e-05"}
    shown |= {("gate", math.inf): "1.0000", ("gate", -math.inf): "0.0000", ("expected_gain", -15.0): "3.1e-07"}
    for (what, cut), digits in shown.items():
        row = CalibrationRow(
            target_rate=0.1, achieved_rate=0.1, threshold=to_threshold(what, cut), log_odds=cut, metric_value=0.25
        )
        _show(CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=[row], signal=what))
        assert capsys.readouterr().out.splitlines()[1].split("0.100")[1].split("0.250")[0].strip() == digits


def test_rates_are_told_as_they_were_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    """0.4 % is not 0 %, and 2.5 % not 2 %: neither in the table, nor in the card, nor on the curve."""
    from collm.cli.calibrate import _show
    from collm.models.hub import model_card
    from collm.models.info import CalibrationRow, CalibrationTable, CheckpointInfo
    from collm.report.plots import curve_series

    rates = (0.004, 0.025)
    rows = [
        CalibrationRow(target_rate=rate, achieved_rate=rate, threshold=1.0, log_odds=9.0 - number, metric_value=0.5)
        for number, rate in enumerate(rates)
    ]
    table = CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=rows)
    _show(table)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["0.004", "0.025"]
    card = model_card(CheckpointInfo(calibration=[table]))
    assert "| 0.004 | 0.004 |" in card and "| 0.025 | 0.025 |" in card
    low, high = (point.told for point in curve_series(table).points)
    assert "asked for 0.4%, threshold 1 - 1.2e-04" in low and "asked for 2.5%, threshold 1 - 3.4e-04" in high


@pytest.mark.parametrize(("option", "name"), [("--method", "entropi"), ("--deferral", "expectedgain")])
def test_the_nearest_method_is_named(option: str, name: str) -> None:
    result = CliRunner().invoke(main, ["generate", "x", "hello", option, name])
    near = {"entropi": "entropy", "expectedgain": "expected_gain"}[name]
    assert result.exit_code == 2 and f"did you mean '{near}'?" in result.output
    result = CliRunner().invoke(main, ["generate", "x", "hello", option, "zzz"])
    assert result.exit_code == 2 and "did you mean" not in result.output


def test_calibrate_needs_a_gate(world: Path) -> None:
    base = ["calibrate", "base", "--max-tokens", 4, *TASK]
    for name in ("gate", "expected_gain"):
        found = collm(*base, "--assistant", "calculator", "--signal", name)
        refused(found, f"--signal {name} needs a gate", "--signal entropy")
    refused(collm(*base, "--signal", "entropy"), "no assistant to defer to")


# -- demo


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself takes minutes and is run by `make demo`; a small plan of it is tested with the demo."""
    from collm import demo

    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda out, *, seed, threads: calls.append((out, seed, threads)))
    assert collm("demo", "--out", tmp_path / "demo", "--seed", 3).exit_code == 0
    assert calls == [(tmp_path / "demo", 3, 1)]


def test_the_same_words_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a warning for each of many texts one line is enough; the next command says it again."""
    of_ours = {"__name__": "collm.somewhere", "warnings": warnings}
    for _ in range(2):
        with speaking(verbose=False):
            for words in ("this is slow", "this is slow", "this is slower"):
                exec(f"warnings.warn({words!r})", of_ours)
                with warnings.catch_warnings():  # makes Python forget what it has said
                    warnings.simplefilter("ignore")
            exec("warnings.warn('of a library')", {"__name__": "elsewhere", "warnings": warnings})
    told = capsys.readouterr().err
    assert told.splitlines() == ["warning: this is slow", "warning: this is slower"] * 2
