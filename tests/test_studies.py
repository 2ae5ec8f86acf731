"""The studies' makefiles: every step calls what there is, with options that there are, and after what it needs."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
from pathlib import Path

import click
import pytest

from collm.cli import main
from collm.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "recipes").glob("*/study.mk"))


PARTS = ("look", "look-large", "look-gemma", "look-mbpp", "small", "small-pair", "small-mbpp")
"""Of recipes/families: what is not in `all`."""


def steps(study: Path, folder: Path, goal: str = "all") -> list[list[str]]:
    """The commands of a study of which nothing is made yet, as words."""
    nothing = [f"{name}={folder / name.lower()}" for name in ("DATA", "RUNS")]
    nothing.append(f"ARITHMETIC_LM={folder / 'runs' / 'arithmetic_lm'}")
    done = subprocess.run(
        ["make", "-n", "-f", str(study), goal, "PYTHON=python", *nothing],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize(
    ("study", "goal"),
    [*((path, "all") for path in STUDIES), *((ROOT / "recipes" / "families" / "study.mk", goal) for goal in PARTS)],
    ids=lambda each: each if isinstance(each, str) else each.parent.name,
)
def test_every_step_can_be_called(study: Path, goal: str, tmp_path: Path) -> None:
    found = steps(study, tmp_path, goal)
    commands = [words[3:] for words in found if words[:3] == ["python", "-m", "collm"]]
    scripts = [words[1] for words in found if words[0] == "python" and words[1] != "-m"]
    assert "train" in {name for name, *_ in commands}
    for name, *arguments in commands:
        command = main.commands[name]
        with click.Context(command) as ctx:
            _, left, _ = command.make_parser(ctx).parse_args(list(arguments))
        assert left == [], (name, arguments)
        if name == "train":
            load_recipe(ROOT / arguments[0], arguments[1:])
    shipped = [word for words in found for word in words if word.startswith("recipes/")]
    assert all((ROOT / path).exists() for path in [*shipped, *scripts]), shipped
    made: set[str] = set()
    for words in found:
        made.update(value for option, value in itertools.pairwise(words) if option == "--out")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.parent.name)
def test_every_model_is_there_before_it_is_asked(study: Path, tmp_path: Path) -> None:
    made: set[str] = set()
    asked: set[str] = set()
    for words in steps(study, tmp_path):
        if len(words) < 5:  # no step of ours
            continue
        if words[3] == "train":
            made.add(load_recipe(ROOT / words[4], words[5:]).out.name)
        elif words[0] == "python" and words[1] != "-m":
            made.update(Path(value).name for option, value in itertools.pairwise(words) if option == "--out")
        elif words[3] in ("eval", "calibrate", "oracle") and Path(words[4]).is_relative_to(tmp_path / "runs"):
            name = Path(words[4]).name
            asked.add(name)
            assert name in made, f"{name} is asked before it is made"
    assert asked & made


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.parent.name)
def test_what_is_put_side_by_side_has_answered_the_same_questions(study: Path, tmp_path: Path) -> None:
    questions: dict[str, tuple[str, str]] = {}
    tables = 0
    for words in steps(study, tmp_path):
        options = dict(itertools.pairwise(words))
        if words[3:4] == ["eval"]:
            questions[str(Path(options["--out"]).with_suffix(".json"))] = options["--data"], options["--task"]
        if words[3:4] in (["compare"], ["report"]):
            tables += 1
            asked = {word: questions[word] for word in words[4:] if word.endswith(".json")}
            assert len({data for data, _ in asked.values()}) == 1, asked
            rival = next((name for name in asked if Path(name).stem == options.get("--against")), next(iter(asked)))
            assert sum(task == asked[rival][1] for _, task in asked.values()) > 1, f"nothing is tested against {rival}"
    assert tables


def test_every_system_of_the_word_problems_is_tested(tmp_path: Path) -> None:
    found = steps(ROOT / "recipes" / "word_problems" / "study.mk", tmp_path)
    tested = {Path(words[4]).name for words in found if words[3:4] == ["eval"]}
    assert {"sft", "pair", "lora", "weak", "pair_lm", "both", "gate", "arithmetic_tuned"} <= tested


KILLED = """#!/bin/sh
for last; do :; done
test -d "$last" && last=$last/train.jsonl
if [ "${*#*mbpp-all/train.jsonl}" != "$*" ] && mkdir killed; then
    head -c 5 data/qwen/mbpp-all/train.jsonl > "$last"
    kill -9 $PPID $$
fi
exec /bin/cp "$@"
"""
PREPARES = """#!/bin/sh
mkdir -p data/qwen/mbpp-all
for part in train validation test; do echo "a row of $part" > data/qwen/mbpp-all/$part.jsonl; done
"""


def test_a_copy_that_is_killed_is_made_again(tmp_path: Path) -> None:
    """A target that is there is not made anew: half of a file must not come to its name."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "mbpp.jsonl").touch()
    for name, script in (("cp", KILLED), ("python", PREPARES)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    train = tmp_path / "data" / "qwen" / "mbpp" / "train.jsonl"
    make = ["make", "-f", "recipes/qwen/study.mk", str(train.relative_to(tmp_path)), "PYTHON=./python"]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for code in (-signal.SIGKILL, 0):
        done = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stderr
    assert train.read_text() == "a row of train\n"
    assert (train.parent / "calibration.jsonl").read_text() == "a row of validation\n"
