"""Training goes on, and is told again, only with the data and weights it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer

from collm.data.scores import load_info as load_scores_info
from collm.data.scores import load_scores
from collm.errors import CollmError
from collm.models.info import load_info
from collm.training import preparation
from collm.training.made_from import RUN, stamp
from collm.training.recipe import parse_recipe
from collm.training.train import train


def write_rows(path: Path, word: str, count: int = 8) -> None:
    rows = [{"prompt": f"{n} + 30 =", "completion": f" {word} {n + 30}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_model(folder: Path, seed: int) -> None:
    make_model(seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_model(tmp_path / "base", 0)
    save_model(tmp_path / "helper", 1)
    write_rows(tmp_path / "train.jsonl", "is")
    write_rows(tmp_path / "validation.jsonl", "are", 4)
    return tmp_path


def run(place: Path, **changes: Any) -> Path:
    """The gate alone, as its initialisation leaves it: the quickest run there is."""
    values = {
        "out": str(place / "out"),
        "cache": str(place / "cache"),
        "base": {"model": str(place / "base")},
        "assistants": [{"name": "helper", "model": str(place / "helper")}],
        "data": {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl")},
        "init": {"max_tokens": 100},
        "objective": "weak_supervision",
        "tune": "gate",
    }
    return train(parse_recipe({**values, **changes}), progress=False)


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (lambda place: write_rows(place / "train.jsonl", "was"), r"data\.train"),
    (lambda place: write_rows(place / "validation.jsonl", "were", 4), r"data\.validation"),
    (lambda place: save_model(place / "base", 5), r"base\.weights"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_finished_run_is_not_told_again_of_something_else(
    place: Path, change: Callable[[Path], None], told: str
) -> None:
    run(place)
    assert run(place) == place / "out"
    change(place)
    before = (place / "out" / RUN).read_bytes()
    with pytest.raises(CollmError, match=rf"made from something else \(it differs in .*{told}.*--restart"):
        run(place)
    assert (place / "out" / RUN).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [*CHANGES, (lambda place: save_model(place / "helper", 6), r"scores\.helper\.train\.model\.weights")],
)
def test_a_stopped_run_does_not_go_on_with_something_else(
    place: Path, change: Callable[[Path], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once kept the gate that was fitted to the old data, and the old checkpoints, without a word."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("collm.training.train._train_gate_only", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(place)
    assert (place / "out/init").exists() and load_info(place / "out") is None
    change(place)
    with pytest.raises(CollmError, match=rf"made from something else \(it differs in .*{told}"):
        run(place)
    assert train_anew(place)


def train_anew(place: Path) -> bool:
    recipe = json.loads((place / "out" / RUN).read_text())
    values = {key: value for key, value in recipe.items() if key not in ("made_from", "files", "day")}
    train(parse_recipe({**values, "out": str(place / "out")}), restart=True, progress=False)
    return load_info(place / "out") is not None


def test_moved_or_touched_files_are_no_other_model(place: Path) -> None:
    run(place)
    save_model(place / "base", 0)
    assert run(place) == place / "out"
    assert stamp(str(place / "base")) != stamp(str(place / "helper")) and stamp("calculator") == {}


def test_rows_that_were_left_out_are_the_same_when_it_is_told_again(place: Path) -> None:
    with (place / "train.jsonl").open("a") as file:
        file.write('{"prompt": "a question without an answer"}\n')
    data = {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl"), "skip_bad": True}
    run(place, data=data)
    assert run(place, data=data) == place / "out"


def test_a_run_of_an_older_collm(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished, it is what it was; in the middle, nobody can say what it was made from."""
    run(place)
    path = place / "out" / RUN
    told = json.loads(path.read_text())
    path.write_text(json.dumps({key: told[key] for key in told if key not in ("made_from", "files", "day")}))
    assert run(place) == place / "out"
    (place / "out/collm.json").unlink()
    with pytest.raises(CollmError, match="begun by an older collm.*--restart"):
        run(place)


def test_the_day_that_a_template_tells_stays_that_of_the_first_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer(
        chat_template="{{ strftime_now('%d %b') }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for name in ("base", "helper"):
        tokenizer.save_pretrained(place / name)
    for name, count in (("train", 6), ("validation", 3)):
        turns = [
            [{"role": "user", "content": f"{n} + 1"}, {"role": "assistant", "content": "12"}] for n in range(count)
        ]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns))
    (place / "out").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("collm.training.train._train_gate_only", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(place)
    told = json.loads((place / "out" / RUN).read_text())
    path = place / "out" / RUN
    assert preparation.first_day(place / "out") == told["day"]
    day = "2020-02-02"
    path.write_text(json.dumps({**told, "day": day}))  # as if it had begun then: its prompts are others
    with pytest.raises(CollmError, match="made from something else"):
        run(place)
    train_anew(place)
    info = load_info(place / "out")
    assert info is not None and info.base_format["date"] == told["day"] == info.assistants[0].format["date"]


def test_given_scores_in_another_dtype_are_taken_and_told(
    place: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collm.data.examples import load_examples
    from collm.data.formatting import Formatter
    from collm.data.scoring import score

    given = {"name": "helper", "model": str(place / "helper")}
    for split, key in (("train", "scores"), ("validation", "validation_scores")):
        rows = load_examples(place / f"{split}.jsonl")
        formatter = Formatter(make_tokenizer())
        out = score(rows, make_model(seed=1).bfloat16(), formatter, place / key, max_length=256, progress=False)
        given[key] = str(out)
        assert len(load_scores(out)) == len(rows) and load_scores_info(out)["format_version"] == 2
    # Both are there, so that the assistant itself need not be opened; its dtype stands in the scores.
    run(place, assistants=[given], data={**DATA(place), "max_length": 256})
    info = load_info(place / "out")
    assert (
        info is not None
        and info.assistants[0].weights_fingerprint == load_scores_info(place / "scores")["weights_fingerprint"]
    )
    # Of the base, which is opened, they are compared with what the recipe says.
    base = {"model": str(place / "base")}
    for split, key in (("train", "scores"), ("validation", "validation_scores")):
        rows = load_examples(place / f"{split}.jsonl")
        name = place / f"base-{key}"
        score(rows, make_model(seed=0).bfloat16(), Formatter(make_tokenizer()), name, max_length=256, progress=False)
        base[key] = str(name)
    with caplog.at_level("WARNING", logger="collm"):
        run(place, base=base, out=str(place / "second"), data={**DATA(place), "max_length": 256})
    assert "was scored in bfloat16, and the recipe has base in float32" in caplog.text


def DATA(place: Path) -> dict[str, str]:
    return {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl")}
