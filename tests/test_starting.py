"""From nothing to a result: `collm init` for each preset, and `collm run` of what it wrote, with tiny models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import make_model, make_tokenizer

from collm.cli import main
from collm.evaluation.result import EvalResult
from collm.llm.deferral import told
from collm.models.info import CalibrationRow, CalibrationTable, load_info
from collm.training.recipe import load_recipe
from collm.workflow.presets import KNOWN, shipped
from collm.workflow.run import _ways_of_pair

QUICK = (
    *("training.epochs=1", "training.batch_size=4", "training.gradient_accumulation=1", "training.evaluations=1"),
    *("init.max_tokens=200", "calibration.rates=[0.3]", "calibration.rounds=1", "generation.max_tokens=6"),
)
MODELS = {
    "specialist": ("--assistant", "expert=helper"),
    "larger": ("--assistant", "helper"),
    "tool": (),
}


def collm(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


UNMARKED = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"}]} for n in range(60)
]
"""Neither the texts nor a field tell the answers."""


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {n + 3} + {n % 7}?"},
                {"role": "assistant", "content": f"{n + 3} + {n % 7} = {n + 3 + n % 7}\n#### {n + 3 + n % 7}"},
            ],
            "answer": str(n + 3 + n % 7),
            "group": n // 2,
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("starting")
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("base", "helper")):
        make_model(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    return root


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


@pytest.mark.parametrize("preset", KNOWN)
def test_what_init_writes_runs_to_its_report(here: Path, preset: str) -> None:
    recipe = f"{preset}.yaml"
    asked = ("--base", "base", "--data", "all.jsonl", "--task", "exact_match", *MODELS[preset])
    done = collm("init", recipe, "--preset", preset, *asked)
    assert done.exit_code == 0, done.output
    assert f"collm run {recipe}" in done.stdout
    read = load_recipe(recipe)
    assert read.target_rate == KNOWN[preset].rate and read.tune == "lora"  # type: ignore[index]
    changes = (*QUICK, f"evaluation.fine_tuned_base={str(preset == 'specialist').lower()}")
    done = collm("run", recipe, *changes)
    assert done.exit_code == 0, done.output
    found = {p.stem: EvalResult.load(p) for p in (read.out / "evaluation").glob("*.json")}
    expected = {"base_as_it_came", "base_of_the_pair_alone", "pair"}
    expected |= {"base_fine_tuned_alone"} if preset == "specialist" else set()
    expected |= set() if preset == "tool" else {"expert_alone" if preset == "specialist" else "helper_alone"}
    assert expected <= set(found) <= expected | {"asked_as_often_at_random"}
    assert {name for result in found.values() for name in result.ids} == set(found["pair"].ids)
    for result in found.values():
        assert result.name in done.stdout
    report = (read.out / "report.html").read_text()
    assert "base as it came" in report and report.count("<svg") >= 2
    info = load_info(read.out)
    assert info is not None and [table.signal for table in info.calibration] == [KNOWN[preset].signal]  # type: ignore[index]
    # What was chosen is what everybody takes who says nothing.
    chosen, settings = info.chosen, found["pair"].settings
    assert chosen is not None and (chosen.task, chosen.signal) == ("exact_match", KNOWN[preset].signal)  # type: ignore[index]
    assert chosen.deferral_rate == settings["params.deferral_rate"] and told(chosen) in done.stdout
    short = ("What is 4 + 1?", "--max-tokens", "6", "--plain")
    written = collm("generate", read.out, *short)
    assert written.exit_code == 0, written.output
    assert told(chosen) in written.stderr
    by_hand = ("--method", settings["params.deferral"], "--deferral-rate", chosen.deferral_rate)
    same = collm("generate", read.out, *short, *by_hand)
    assert same.stdout == written.stdout and told(chosen) not in same.stderr
    # Started again, nothing is written anew, and the same is told.
    kept = {path: path.read_bytes() for path in (read.out / "evaluation").glob("*.jsonl")}
    again = collm("run", recipe, *changes)
    assert again.exit_code == 0 and again.stdout == done.stdout
    assert kept == {path: path.read_bytes() for path in (read.out / "evaluation").glob("*.jsonl")}


def test_rates_that_lie_close_have_files_of_their_own(here: Path) -> None:
    """2 and 2.5 % were both `pair, 2%`, so that the second was refused as another run of the first, hours later."""
    asked = ("--base", "base", "--data", "all.jsonl", "--task", "exact_match", "--force")
    assert collm("init", "close.yaml", "--preset", "tool", *asked).exit_code == 0
    recipe = load_recipe("close.yaml", ["evaluation.rates=[0.02, 0.025, 0.2]"])
    row = CalibrationRow(target_rate=0.02, achieved_rate=0.02, threshold=0.5, log_odds=0.0, metric_value=0.5)
    table = CalibrationTable(task="exact_match", metric="exact_match", seed=0, num_prompts=1, rows=[row], best=0)
    pairs = [way for way in _ways_of_pair(recipe, table) if way.alone is None]
    assert [way.name for way in pairs] == ["pair, 2%", "pair, 2.5%", "pair, 20%"]
    assert [way.file for way in pairs] == ["pair_2.jsonl", "pair_2_5.jsonl", "pair_20.jsonl"]


def test_the_pair_is_the_pair_whatever_an_assistant_is_called(here: Path) -> None:
    """Beside an assistant `pair`, `pair alone` was what all others were tested against."""
    asked = ("--base", "base", "--assistant", "pair=helper", "--data", "all.jsonl", "--task", "exact_match", "--force")
    assert collm("init", "named.yaml", "--preset", "specialist", *asked).exit_code == 0
    done = collm("run", "named.yaml", *QUICK, "tune=gate", "evaluation.fine_tuned_base=false", "evaluation.rates=[0.3]")
    assert done.exit_code == 0, done.output
    assert "pair alone against pair:" in done.stdout


def test_a_run_goes_on_where_it_was_stopped(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of the evaluation, and of the calibration before; the result is that of one go."""
    from collm.workflow import run as steps

    asked = ("--base", "base", "--data", "all.jsonl", "--task", "exact_match", "--tune", "gate", "--force")
    assert collm("init", "stopped.yaml", "--preset", "tool", *asked).exit_code == 0
    changes = [*QUICK, "training.epochs=2"]
    whole = collm("run", "stopped.yaml", *changes, "out=runs/whole")
    assert whole.exit_code == 0, whole.output
    for name in ("calibrate", "evaluate"):
        real = getattr(steps, name)

        def stopping(*given: Any, _real: Any = real, **options: Any) -> Any:
            _real(*given, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(steps, name, stopping)
        done = collm("run", "stopped.yaml", *changes, "out=runs/stopped")
        assert done.exit_code == 130 and "run the same command again to resume" in done.stderr
        monkeypatch.setattr(steps, name, real)
    done = collm("run", "stopped.yaml", *changes, "out=runs/stopped")
    assert done.exit_code == 0, done.output
    assert done.stdout.replace("runs/stopped", "runs/whole") == whole.stdout


def test_a_run_goes_on_the_next_day(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a template tells the day, the base as it came was shown another one than the pair, and its answers of the
    day before were refused as another run's."""
    template = (
        "{{ strftime_now('%d %b') }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    shutil.copytree(here / "base", here / "dated", dirs_exist_ok=True)
    make_tokenizer(chat_template=template).save_pretrained(here / "dated")
    asked = ("--base", "dated", "--data", "all.jsonl", "--task", "exact_match", "--force")
    assert collm("init", "days.yaml", "--preset", "tool", *asked).exit_code == 0
    changes = (*QUICK, "evaluation.fine_tuned_base=false")
    done = collm("run", "days.yaml", *changes)
    assert done.exit_code == 0, done.output

    class Tomorrow(date):
        @classmethod
        def today(cls) -> Tomorrow:
            return cls.fromordinal(date.today().toordinal() + 1)

    monkeypatch.setattr("collm.data.formatting.date", Tomorrow)
    again = collm("run", "days.yaml", *changes)
    assert again.exit_code == 0, again.stderr
    assert again.stdout == done.stdout


def test_a_restart_throws_nothing_of_others_away(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what lies in a folder that is no run's, nor the answers of a run that goes on meanwhile."""
    from collm.workflow import run as steps

    asked = ("--base", "base", "--data", "all.jsonl", "--task", "exact_match", "--tune", "gate", "--force")
    assert collm("init", "again.yaml", "--preset", "tool", *asked).exit_code == 0
    own = here / "project" / "evaluation" / "by_hand.txt"
    own.parent.mkdir(parents=True)
    own.write_text("a year's work")
    done = collm("run", "again.yaml", *QUICK, "out=project", "--restart")
    assert done.exit_code == 1 and "not a collm run" in done.stderr
    assert own.read_text() == "a year's work"
    real, told = steps._reported, []

    def meanwhile(*given: Any) -> Any:
        command = [sys.executable, "-m", "collm", "run", "again.yaml", *QUICK, "--restart"]
        told.append(subprocess.run(command, capture_output=True, text=True, check=False))
        return real(*given)

    monkeypatch.setattr(steps, "_reported", meanwhile)
    done = collm("run", "again.yaml", *QUICK)
    assert told[0].returncode == 1 and "is being written by" in told[0].stderr
    assert done.exit_code == 0, done.output


def test_questions_of_one_group_stay_together(here: Path) -> None:
    parts = {name: Path(f"specialist-data/{name}.jsonl") for name in ("train", "calibration", "test")}
    if not parts["train"].exists():
        pytest.skip("made by the first test")
    groups = {name: {json.loads(line)["group"] for line in path.open()} for name, path in parts.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 30
    assert len(groups["train"]) > 15


@pytest.mark.parametrize("names", [("question", "answer"), ("instruction", "output")])
def test_questions_and_answers_become_conversations(here: Path, names: tuple[str, str]) -> None:
    told = [{names[0]: f"{n} + 1?", names[1]: f"{n} + 1 = {n + 1}\n#### {n + 1}", "input": ""} for n in range(60)]
    (here / "told.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    options = ("--preset", "tool", "--base", "base", "--data", "told.jsonl", "--task", "exact_match", "--force")
    done = collm("init", "told.yaml", *options)
    assert done.exit_code == 0, done.output
    row = json.loads(Path("told-data/test.jsonl").read_text().splitlines()[0])
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
    assert row["messages"][0]["content"].endswith("+ 1?") and "count as right" not in done.stderr


def test_on_a_terminal_what_is_missing_is_asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collm.cli import init

    monkeypatch.setattr(init, "interactive", lambda: True)
    given = "tool\nbase\n\nall.jsonl\n\n"
    result = CliRunner().invoke(main, ["init", "asked.yaml"], input=given)
    assert result.exit_code == 0, result.output
    assert "right wherever it answers" in result.stderr
    read = load_recipe("asked.yaml")
    assert (read.base.model, read.assistants[0].model, read.task) == ("base", "calculator", "exact_match")


def test_a_shipped_recipe_is_copied(here: Path) -> None:
    assert "word_problems/pair" in shipped()
    assert collm("init", "copy.yaml", "--like", "word_problems/pair").exit_code == 0
    assert load_recipe("copy.yaml") == load_recipe(shipped()["word_problems/pair"])
    done = collm("init", "copy2.yaml", "--like", "word_problem/pair")
    assert done.exit_code == 2 and "did you mean 'word_problems/pair'" in done.stderr


FULL = {"--preset": "tool", "--base": "base", "--data": "all.jsonl", "--task": "exact_match"}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"--base": None}, 2, ["--base missing", "collm init"]),
        ({"--preset": "larger"}, 2, ["--assistant missing"]),
        ({"--data": None}, 2, ["--data (or --train"]),
        ({"--train": "all.jsonl"}, 2, ["leave out --train"]),
        ({"--base": "./nowhere"}, 1, ["./nowhere: there is no such folder"]),
        ({"--task": "exact_mach"}, 1, ["did you mean 'exact_match'"]),
        ({"--preset": "larger", "--assistant": "calculator"}, 1, ["calculator is a tool"]),
        ({"--assistant": "helper"}, 1, ["helper is no tool"]),
        ({"--data": "nowhere.jsonl"}, 1, ["nowhere.jsonl"]),
        ({"--data": "few.jsonl"}, 1, ["too few to be split"]),
        ({"--data": "asked.jsonl"}, 1, ["asked.jsonl, line 1: 'question' without an answer, a text as 'answer' or"]),
        ({"--data": "no_gold.jsonl"}, 1, ["no gold answer"]),
        ({"--base": "bare"}, 1, ["bare holds a model without its tokenizer"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_and_nothing_written(
    here: Path, changes: dict[str, str | None], code: int, words: list[str]
) -> None:
    (here / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(2)))
    (here / "no_gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNMARKED))
    (here / "asked.jsonl").write_text('{"question": "1 + 1?"}\n')
    (here / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (here / "bare" / name).write_bytes((here / "base" / name).read_bytes())
    options = [part for name, value in {**FULL, **changes}.items() if value for part in (name, value)]
    done = collm("init", "wrong.yaml", *options)
    assert done.exit_code == code, done.output
    for word in words:
        assert word in done.stderr
    assert not Path("wrong.yaml").exists() and not Path("wrong-data").exists()


def test_what_stood_there_before_a_failure_still_does(here: Path) -> None:
    options = [part for pair in FULL.items() for part in pair]
    assert collm("init", "kept.yaml", *options).exit_code == 0
    files = [Path("kept.yaml"), *sorted(Path("kept-data").iterdir())]
    before = [path.read_bytes() for path in files]
    Path("no_gold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in UNMARKED))
    done = collm("init", "kept.yaml", *options, "--force", "--data", "no_gold.jsonl")
    assert done.exit_code == 1 and [path.read_bytes() for path in files] == before


def test_data_that_are_there_are_not_replaced_unasked(here: Path) -> None:
    """`pair.yaml` and `pair.yml` have one folder of data."""
    options = [part for pair in FULL.items() for part in pair]
    assert collm("init", "pair.yaml", *options).exit_code == 0
    before = {path: path.read_bytes() for path in Path("pair-data").iterdir()}
    (here / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(50)))
    done = collm("init", "pair.yml", *options, "--data", "fewer.jsonl")
    assert done.exit_code == 2 and "pair-data/train.jsonl is there already" in done.stderr
    assert not Path("pair.yml").exists()
    assert {path: path.read_bytes() for path in Path("pair-data").iterdir()} == before


def test_a_task_that_the_training_texts_do_not_answer_is_told(here: Path) -> None:
    unmarked = [{**row, "messages": [row["messages"][0], {"role": "assistant", "content": "x"}]} for row in rows(60)]
    (here / "unmarked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unmarked))
    options = [part for pair in {**FULL, "--data": "unmarked.jsonl"}.items() for part in pair]
    done = collm("init", "unmarked.yaml", *options)
    assert done.exit_code == 0, done.output
    assert "only 0% count as right by the task exact_match" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("task=", ["wants the keys task", "collm init"]),
        ("evaluation=", ["wants the keys evaluation"]),
        ("evaluation.data=specialist-data/calibration.jsonl", ["are one"]),
        ("evaluation.data=none.jsonl", ["evaluation.data", "none.jsonl"]),
        ("calibration.rates=[2]", ["between 0 and 1"]),
        ("tune=gate", ["fine_tuned_base"]),
    ],
)
def test_a_run_that_cannot_end_is_refused_at_once(here: Path, change: str, words: list[str]) -> None:
    recipe = Path("refused.yaml")
    asked = ("--base", "base", "--data", "all.jsonl", "--task", "exact_match", "--assistant", "helper", "--force")
    assert collm("init", recipe, "--preset", "specialist", *asked).exit_code == 0
    text = recipe.read_text().replace("refused-data", "specialist-data")
    Path("specialist-data").mkdir(exist_ok=True)
    for name in ("train", "calibration", "test"):
        Path(f"specialist-data/{name}.jsonl").write_text(Path(f"refused-data/{name}.jsonl").read_text())
    recipe.write_text(text)
    done = collm("run", recipe, change)
    assert done.exit_code == 1, done.output
    for word in words:
        assert word in done.stderr
    assert not Path("runs/refused").exists()


def test_questions_that_parts_share_are_told(here: Path) -> None:
    asked = ("--base", "base", "--task", "exact_match", "--assistant", "helper", "--force")
    for name in ("one", "two"):
        Path(f"{name}.jsonl").write_text(Path("all.jsonl").read_text())
    parts = ("--train", "all.jsonl", "--calibration", "one.jsonl", "--test", "two.jsonl")
    done = collm("init", "shared.yaml", "--preset", "specialist", *asked, *parts)
    assert done.exit_code == 0
    assert "warning: calibration.data and evaluation.data share 60 questions" in done.stderr
    assert yaml.safe_load(Path("shared.yaml").read_text())["calibration"]["data"] == "one.jsonl"
