"""Own texts are those of the models, data and day that a recipe now names, or are written anew."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from teaching import recipe_values, teach

from collm.data.examples import Example, load_examples
from collm.errors import CollmError
from collm.models.checkpoint import save_checkpoint
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo
from collm.training import folder, made_from
from collm.training.folder import claimed
from collm.training.own_texts import _questions, write_rows
from collm.training.own_writer import load_writer, looks
from collm.training.recipe import Recipe, parse_recipe
from collm.workflow.checking import check_run

DATED = "{{ strftime_now('%Y-%m-%d') }}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Models and sums; `pair`, a gate on the base, and `full`, the same with weights of its own."""
    tokenizer = make_tokenizer()
    models = {name: make_model(seed=seed, vocab_size=len(tokenizer)) for seed, name in enumerate(("base", "other"))}
    teach(tmp_path, {name: (model, tokenizer) for name, model in models.items()})
    head = DeferralHead(models["base"].config.hidden_size, 1)
    for kind, name in (("gate", "pair"), ("full", "full")):
        info = CheckpointInfo(
            kind=kind,  # type: ignore[arg-type]
            base_model=str(tmp_path / "base"),
            assistants=[AssistantInfo(name="other", spec=str(tmp_path / "other"))],
        )
        save_checkpoint(tmp_path / name, info, models["base"], head, tokenizer)
    (tmp_path / "judge.py").write_text("def any(text, gold):\n    return 1\n")
    return tmp_path


def recipe(place: Path, own: dict[str, Any], **changes: Any) -> Recipe:
    quick = {"objective": "weak_supervision", "tune": "gate", **changes}
    told = recipe_values(place, "out", **quick)
    own = {"task": f"{place / 'judge.py'}:any", "samples": 1, "max_tokens": 8, "device": "cpu", **own}
    return parse_recipe({**told, "assistants": told["assistants"][-1:], "own_texts": own})


def key(asked: Recipe) -> list[Any]:
    assert asked.own_texts is not None
    return looks(asked, asked.own_texts)


def retrained(place: Path, name: str) -> None:
    make_model(seed=5, vocab_size=len(make_tokenizer())).save_pretrained(place / name)


def template_edited(place: Path, name: str) -> None:
    tokenizer = make_tokenizer()
    make_tokenizer(chat_template=f"Go! {tokenizer.chat_template}").save_pretrained(place / name)


def other_ends(place: Path, name: str) -> None:
    path = place / name / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [0, 1]}))


@pytest.mark.parametrize("change", [retrained, template_edited, other_ends])
@pytest.mark.parametrize(
    ("own", "names"),
    [
        ({"writer": "base"}, ["base"]),
        ({"writer": "other"}, ["other"]),
        ({"checkpoint": "pair"}, ["base", "other"]),
        ({"checkpoint": "full"}, ["full", "other"]),
    ],
)
def test_texts_are_written_anew_where_a_model_was_changed(
    place: Path, change: Callable[[Path, str], None], own: dict[str, Any], names: list[str]
) -> None:
    """In its own folder, under the same spec."""
    asked = recipe(place, {k: str(place / v) if k == "checkpoint" else v for k, v in own.items()})
    before = [key(asked)]
    assert key(asked) == before[0]
    for name in names:
        change(place, name)
        assert key(asked) not in before
        before.append(key(asked))


def test_texts_are_written_anew_by_another_model(place: Path) -> None:
    """Where the recipe places it, and however it is loaded; where it lies among devices changes nothing."""
    retrained(place, "third")
    make_tokenizer().save_pretrained(place / "third")
    pair = {"checkpoint": str(place / "pair")}
    other, third = (
        recipe(place, pair, assistants=[{"name": "other", "model": str(place / name)}]) for name in ("other", "third")
    )
    assert key(other) != key(third)
    keys = [
        key(recipe(place, {"writer": "base"}, base={"model": f"{place / 'base'}{how}"}))
        for how in ("", "?dtype=bfloat16", "?quantization=nf4", "?device=cpu")
    ]
    assert keys[0] == keys[3] and all(keys[0] != each for each in keys[1:3]) and keys[1] != keys[2]


def test_the_base_of_a_pair_writes_by_itself(place: Path) -> None:
    """Its assistants are not loaded, and need not be there; nor does it defer."""
    asked = recipe(place, {"writer": "base"}, base={"model": str(place / "full")})
    shutil.rmtree(place / "other")
    assert asked.own_texts is not None and key(asked)
    llm = load_writer(asked, asked.own_texts)
    assert llm.model_names == ("base",) and not llm.has_gate


class Tomorrow(date):
    @classmethod
    def today(cls) -> Tomorrow:
        return cls(2030, 1, 2)


def test_a_run_that_was_stopped_while_writing_goes_on_past_midnight(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is begun but own texts, of prompts that tell the day. Another run has another day, and other texts."""
    make_tokenizer(chat_template=DATED + str(make_tokenizer().chat_template)).save_pretrained(place / "base")
    asked = recipe(place, {"writer": "base"})
    with claimed(asked, restart=False):
        first, told = made_from.first_day(asked.out), key(asked)
    for module in (folder, made_from):
        monkeypatch.setattr(module, "date", Tomorrow)
    with claimed(asked, restart=False):
        assert made_from.first_day(asked.out) == first and key(asked) == told
    for changed, restart in ((asked, True), (recipe(place, {"writer": "base", "seed": 1}), False)):
        with claimed(changed, restart):
            assert made_from.first_day(asked.out) == "2030-01-02" and key(asked) != told


def test_held_out_questions_are_not_asked(place: Path) -> None:
    """Neither those of the training part nor those of `data`, whatever their ids."""
    held_out = load_examples(place / "validation.jsonl")
    lines = (place / "validation.jsonl").read_text().splitlines()
    again = json.dumps({**json.loads(lines[0]), "id": "again"})
    for name, own in (("train.jsonl", {}), ("some.jsonl", {"data": str(place / "some.jsonl")})):
        gold = (place / "train.jsonl").read_text().splitlines()[:3]
        (place / name).write_text("\n".join([*gold, again]))
        asked = _questions(recipe(place, {"writer": "base", **own}), load_examples(place / "train.jsonl"), held_out)
        assert len(asked) == 3
    (place / "some.jsonl").write_text("\n".join(lines))
    with pytest.raises(CollmError, match="all questions are held out"):
        _questions(recipe(place, {"writer": "base", "data": str(place / "some.jsonl")}), [], held_out)


def test_questions_that_are_tested_on_are_told(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    tests = "".join(json.dumps({"prompt": f"{n} - 1 =", "completion": " 2"}) + "\n" for n in range(5))
    for name in ("test", "own"):
        (place / f"{name}.jsonl").write_text(tests)
    asked = recipe(
        place,
        {"writer": "base", "data": str(place / "own.jsonl")},
        task=f"{place / 'judge.py'}:any",
        calibration={"data": str(place / "validation.jsonl")},
        evaluation={"data": str(place / "test.jsonl")},
    )
    with caplog.at_level(logging.WARNING, logger="collm"):
        check_run(asked)
    assert "own_texts.data and evaluation.data share 5 questions" in caplog.text
    caplog.clear()
    check_run(
        recipe(
            place,
            {"writer": "base", "data": asked.data.train},
            **asked.model_dump(mode="json", include={"task", "calibration", "evaluation"}),
        )
    )
    assert "share" not in caplog.text  # training questions are asked again, and that is what is wanted


def test_values_that_json_does_not_know_are_written_as_texts(tmp_path: Path) -> None:
    """Tables have them; the texts were all written before it failed, at each start."""
    fields = {"made": datetime(2026, 1, 1), "raw": b"ab", "price": Decimal("1.5"), "answer": "7"}
    write_rows(tmp_path / "own.jsonl", [Example("a", prompt="1 + 6 =", completion=" 7", fields=fields)])
    [row] = load_examples(tmp_path / "own.jsonl")
    assert row.completion == " 7" and row.fields["answer"] == "7" and row.fields["made"].startswith("2026-01-01")
