"""What studies keep in the repository is whole: from the committed files alone they go on where they were."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from collm.data.scores import load_scores
from collm.evaluation.overview import read_results
from collm.evaluation.tasks.equations import equations
from collm.evaluation.written import read_written

RECIPES = Path(__file__).parent.parent / "recipes"
SCORES = sorted(path.parent for path in RECIPES.glob("*/scores/*/*/scores.json"))
MODELS = sorted(path.parent for path in RECIPES.glob("*/kept/**/collm.json"))
ANSWERS = sorted(RECIPES.glob("*/kept/**/test/*.jsonl.xz"))


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def test_something_is_kept() -> None:
    assert SCORES and MODELS and ANSWERS


@pytest.mark.parametrize("folder", SCORES, ids=name)
def test_scores_can_be_read(folder: Path) -> None:
    told = json.loads((folder / "scores.json").read_text())
    assert len(load_scores(folder)) == told["num_examples"] > 0


@pytest.mark.parametrize("folder", MODELS, ids=name)
def test_models_are_whole(folder: Path) -> None:
    """Whatever has an adapter has its weights; whether they fit the base is told when it is loaded."""
    files = {path.name for path in folder.iterdir()}
    assert ("adapter_config.json" in files) == ("adapter_model.safetensors" in files)
    weights = sorted(folder.glob("*.safetensors"))
    assert weights
    for path in weights:
        with safe_open(path, "np") as file:
            assert list(file.keys())


@pytest.mark.parametrize("answers", ANSWERS, ids=name)
def test_answers_are_those_of_their_result(answers: Path, tmp_path: Path) -> None:
    result = answers.with_name(answers.name.removesuffix(".jsonl.xz") + ".json")
    told = json.loads(result.read_text())
    shutil.copy(result, tmp_path)
    (tmp_path / result.with_suffix(".jsonl").name).write_bytes(lzma.decompress(answers.read_bytes()))
    (read,) = read_results([tmp_path / result.name])
    written = read_written(tmp_path / result.name, read)
    assert not written.missing and len(read.ids) == told["num_examples"]


@pytest.mark.parametrize("answers", [path for path in ANSWERS if "gsm8k" in path.parts], ids=name)
def test_equations_are_counted_by_the_rule_of_today(answers: Path) -> None:
    """Else systems that were run before and behind a change of it would be put side by side."""
    told = json.loads(answers.with_name(answers.name.removesuffix(".jsonl.xz") + ".json").read_text())
    counted = [
        equations(json.loads(line)["text"]) for line in lzma.decompress(answers.read_bytes()).splitlines()[1:] if line
    ]
    assert [sum(each) for each in zip(*counted, strict=True)] == [told["equations_right"], told["equations_shown"]]
