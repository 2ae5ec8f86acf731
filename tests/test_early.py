"""What is wrong is told before torch is imported or a weight is read; and what needs no torch does without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import collm
from collm.cli import main
from collm.errors import CollmError
from collm.models.info import AssistantInfo, CheckpointInfo, save_info
from collm.signs import sign
from collm.training.checking import check_recipe
from collm.training.recipe import parse_recipe

RUNNER = """
import contextlib, io, json, sys
from collm.cli import main
sys.modules["torch"] = None  # importing it is an error
told = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments, standalone_mode=True)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(told))
"""


def without_torch(folder: Path, commands: list[list[str]]) -> list[tuple[Any, str, str]]:
    """Exit code, stdout and stderr of each command, in an interpreter that has no torch."""
    command = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    # From another folder, a relative entry would lead elsewhere.
    environment = {**os.environ, "PYTHONPATH": str(Path(collm.__file__).parent.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """`base`, `mute` (without a chat template), `pair` (a gate over `base` and two assistants), data and a recipe."""
    root = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(root / "base")
    tiny_tokenizer.save_pretrained(root / "base")
    shutil.copytree(root / "base", root / "mute")
    (root / "mute" / "chat_template.jinja").unlink()
    (root / "pair").mkdir()
    (root / "pair" / "gate.safetensors").write_bytes(b"read by nobody here")
    assistants = [AssistantInfo(name="calculator", spec="calculator"), AssistantInfo(name="expert", spec="elsewhere/x")]
    save_info(root / "pair", CheckpointInfo(kind="gate", base_model=str(root / "base"), assistants=assistants))
    row = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2\n#### 2"}]}
    (root / "data.jsonl").write_text(json.dumps({**row, "answer": "2"}) + "\n")
    (root / "bad.jsonl").write_text("{\n")
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    (root / "typo.yaml").write_text(yaml.safe_dump({**recipe(), "assistents": []}))
    (root / "lost.yaml").write_text(yaml.safe_dump(recipe(data={"train": "lost.jsonl"})))
    return root


def recipe(**changes: Any) -> dict[str, Any]:
    return {
        "out": "run",
        "base": {"model": "base"},
        "assistants": [{"name": "calculator", "model": "calculator"}],
        "data": {"train": "data.jsonl", "validation": "data.jsonl"},
        **changes,
    }


EXPERT = ["--assistant", "expert=base"]
TASK = ["--task", "word_problems", "--data", "data.jsonl"]
WRONG: list[tuple[list[str], int, str]] = [
    (["generate", "pair", "x", *EXPERT, "--alone", "expart"], 1, "no model 'expart'; the models are base, calculator"),
    (["generate", "pair", "x", *EXPERT, "--alone", "expart"], 1, "did you mean 'expert'?"),
    (["generate", "pair", "x"], 1, "the assistant 'expert' is missing; give --assistant expert=SPEC"),
    (["generate", "pair", "x", "--assistant", "nobody=base"], 1, "no assistant called nobody; its assistants are"),
    (["generate", "pair", "x", *EXPERT, "--base", "./gone"], 1, "./gone: there is no such folder"),
    (["generate", "base", "x", "--device", "cudda"], 2, "there is no device 'cudda'; did you mean 'cuda'?"),
    (["generate", "base", "x", "--device", "cuda:x"], 2, "there is no device 'cuda:x'; use cpu, cuda, cuda:1"),
    (["chat", "gone"], 1, "gone: there is no such folder, and the hub's cache on this machine has no such model"),
    (["chat", "pair", *EXPERT, "--alone", "expart"], 1, "did you mean 'expert'?"),
    (["serve", "gone"], 1, "gone: there is no such folder, and the hub's cache on this machine has no such model"),
    (["serve", "pair"], 1, "the assistant 'expert' is missing"),
    (["bench", "--plot", "x.jpg"], 1, "x.jpg: a picture ends in .png, .svg, .pdf"),
    (
        ["generate", "gone", "x"],
        1,
        "gone: there is no such folder, and the hub's cache on this machine has no such model",
    ),
    (["generate", "runs/gone", "x"], 1, "runs/gone: there is no such folder; a model is"),
    (["generate", "pair", "x", "--assistant", "expert=gone.gguf"], 1, "gone.gguf: there is no such GGUF file"),
    (["generate", "mute", "x", "--alone", "base"], 1, "mute has no chat template, which a question needs: with --raw"),
    (["generate", ".", "x", "--alone", "base"], 1, ". is a folder without a model"),
    (["generate", "base", "x", "--svg", "data.jsonl/x.svg"], 2, "data.jsonl is a file"),
    (["generate", "base", "x", "--trace", "base"], 2, "base is a folder, where a file is wanted"),
    (["eval", "pair", *EXPERT, *TASK[:2], "--data", "bad.jsonl"], 1, "bad.jsonl, line 1: not JSON"),
    (["eval", "pair", *EXPERT, *TASK, "--alone", "none"], 1, "there is no model 'none'"),
    (["eval", "pair", *EXPERT, "--task", "word_problem", "--data", "data.jsonl"], 1, "word_problems"),
    (["calibrate", "base", *TASK], 1, "base has no assistant to defer to: give one (--assistant)"),
    (["calibrate", "base", "--assistant", "calculator", *TASK], 1, "--signal gate needs a gate, and base has none"),
    (["oracle", "base", "--data", "data.jsonl"], 2, "give one with --assistant"),
    (["answer", "pair", "--format", "mt_bench", "--data", "bad.jsonl", "--out", "a.jsonl"], 1, "bad.jsonl"),
    (["score", "data.jsonl", "--model", "./gone", "--out", "scores"], 1, "./gone: there is no such folder"),
    (["score", "bad.jsonl", "--model", "base", "--out", "scores"], 1, "bad.jsonl, line 1: not JSON"),
    (["train", "typo.yaml"], 1, "unknown key 'assistents'; did you mean 'assistants'?"),
    (["train", "lost.yaml"], 1, "data.train: lost.jsonl: cannot be read"),
    (["bench", "--pair", "models", "--base", "./gone", "--assistant", "base"], 1, "./gone: there is no such folder"),
    (["convert", "base"], 1, "no .gguf file"),
]


def test_errors_come_first(place: Path) -> None:
    for (arguments, code, words), (got, _, err) in zip(
        WRONG, without_torch(place, [arguments for arguments, _, _ in WRONG]), strict=True
    ):
        assert (got, words in err) == (code, True), (arguments, got, err)
        assert "Traceback" not in err


def test_what_reads_results_needs_no_torch(place: Path, tmp_path: Path) -> None:
    figures = CliRunner().invoke(
        main,
        ["eval", str(place / "base"), "--task", "word_problems", "--data", str(place / "data.jsonl")]
        + ["--alone", "base", "--max-tokens", "4", "--out", str(tmp_path / "a.jsonl")],
    )
    assert figures.exit_code == 0, figures.output
    for name in (".json", ".jsonl"):
        shutil.copy(tmp_path / f"a{name}", tmp_path / f"b{name}")
    told = without_torch(
        tmp_path,
        [
            ["compare", "a.json", "b.json"],
            ["report", "a.json", "b.json", "--out", "report.html"],
            ["trace", "a.jsonl"],
            ["trace", "a.jsonl", "--html", "trace.html"],
            ["trace", "a.jsonl", "--classes"],
        ],
    )
    for code, out, err in told:
        assert code == 0, (out, err)
    assert (tmp_path / "report.html").is_file() and (tmp_path / "trace.html").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"trainer": {"learning_rat": 1}}, "trainer.learning_rat is not .*; did you mean 'learning_rate'"),
        ({"trainer": {"zqzq": 1}}, "trainer.zqzq is not one of transformers' TrainingArguments$"),
        ({"training": {"schedule": "kosine"}}, "training.schedule: .* no 'kosine'; did you mean 'cosine'"),
        ({"trainer": {"report_to": "tensorbord"}}, "report_to: .* no 'tensorbord'; did you mean 'tensorboard'"),
        ({"trainer": {"report_to": ["none", "clearml"]}}, "clearml needs the package clearml; pip install clearml"),
        ({"data": {"train": "data.jsonl"}}, "data.train: a single example cannot be both learnt and held out"),
        ({"base": {"model": "zq/gone"}}, "base: zq/gone: there is no such folder, and the hub's cache on this machine"),
        ({"base": {"model": "calculater"}}, "base: there is no model 'calculater'; did you mean the tool 'calculator'"),
        ({"base": {"model": "a b"}}, "base: a b: there is no such folder, and the hub did not give such a model"),
        ({"base": {"model": "./gone"}}, r"base: \./gone: there is no such folder"),
        ({"base": {"model": "base", "scores": "gone"}}, r"base: scores: there is no folder gone; collm score"),
        ({"data": {"train": "data.jsonl", "validation": "bad.jsonl"}}, r"data\.validation: bad\.jsonl, line 1: not"),
        ({"out": "data.jsonl"}, "data.jsonl is a file, where a folder is wanted"),
        ({"out": "data.jsonl/run"}, "data.jsonl/run cannot be written: data.jsonl is a file"),
        ({"cache": "data.jsonl"}, "data.jsonl is a file, where a folder is wanted"),
    ],
)
def test_a_recipe_is_checked_by_its_keys(
    place: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(CollmError, match=says):
        check_recipe(parse_recipe(recipe(**changes)))


def test_a_right_recipe_passes_and_an_assistant_that_is_not_opened_may_be_elsewhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    check_recipe(parse_recipe(recipe(trainer={"report_to": "none"})))
    (place / "scores").mkdir(exist_ok=True)
    away = {"name": "large", "model": "/elsewhere/large"}
    check_recipe(parse_recipe(recipe(assistants=[{**away, "scores": "scores", "validation_scores": "scores"}])))
    with pytest.raises(
        CollmError, match="'large': /elsewhere/large: there is no such folder.* give the scores as scores"
    ):
        check_recipe(parse_recipe(recipe(assistants=[away])))


def test_a_pipe_gets_a_sign(place: Path) -> None:
    done = CliRunner().invoke(main, ["generate", str(place / "base"), "x", "--alone", "base", "--max-tokens", "1"])
    assert done.exit_code == 0 and done.stderr.startswith(f"loading {place / 'base'}")


def test_a_notebook_gets_a_sign_and_a_script_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sign("it begins")
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    sign("it begins")
    assert capsys.readouterr().err == "it begins\n"
