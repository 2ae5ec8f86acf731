"""`--task MODULE:FUNCTION`: a rule of the user's own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from collm.data.examples import Example
from collm.errors import CollmError
from collm.evaluation.shipped import get_task

RULES = """
from collm.evaluation.shipped import TASKS

def contains(text, gold):
    return gold in text

def of_one(text):
    return 1.0

def wild(text, gold):
    return 2.0

def failing(text, gold):
    return text[1000]

renamed = TASKS["gsm8k"]
"""


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "my_rules", raising=False)
    path = tmp_path / "my_rules.py"
    path.write_text(RULES)
    return path


@pytest.mark.parametrize("place", ["my_rules", "my_rules.py"])
def test_a_function_judges_whole_texts(rules: Path, place: str) -> None:
    task = get_task(f"{place}:contains")
    assert task.name == f"{place}:contains" and task.metric == "contains"
    assert (task.score("It is Rome, I think.", "Rome"), task.score("Paris", "Rome"), task.score("", "Rome")) == (
        1,
        0,
        0,
    )


def test_the_gold_answer_is_the_field_or_the_last_turn(rules: Path) -> None:
    task = get_task("my_rules:contains")
    turns = ({"role": "user", "content": "Capital?"}, {"role": "assistant", "content": "Rome #### 1"})
    assert task.gold(Example(id="1", messages=turns)) == "Rome #### 1"
    assert task.gold(Example(id="1", messages=turns, fields={"answer": "Roma"})) == "Roma"
    assert task.gold(Example(id="1", messages=turns, fields={"answer": ["Rome", "Roma"]})) == '["Rome", "Roma"]'
    with pytest.raises(CollmError, match="no gold answer"):
        task.gold(Example(id="1", messages=turns[:1]))


def test_another_text_of_the_module_is_another_version(rules: Path) -> None:
    before = get_task("my_rules.py:contains").version
    assert get_task("my_rules.py:contains").version == before
    rules.write_text(RULES + "\n# stricter now\n")
    assert get_task("my_rules.py:contains").version != before


def test_a_whole_task_is_taken_as_it_is(rules: Path) -> None:
    assert get_task("my_rules:renamed").name == "gsm8k"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_rules:contains", "no module 'no_such_rules'.*MODULE:FUNCTION"),
        ("no_such_rules.py:contains", "no file no_such_rules.py"),
        ("my_rules:contain", "did you mean 'contains'"),
        ("my_rules:of_one", "function of two texts"),
        ("my_rules:__name__", "function of two texts"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_remedy(rules: Path, spec: str, message: str) -> None:
    with pytest.raises(CollmError, match=message):
        get_task(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:", "cannot be imported .SyntaxError"),
        ("import no_such_package", "needs the package no_such_package"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_module_that_fails_is_named(rules: Path, text: str, message: str) -> None:
    rules.write_text(text)
    with pytest.raises(CollmError, match=message):
        get_task("my_rules.py:f")


@pytest.mark.parametrize(("name", "message"), [("wild", "from 0 to 1, not 2.0"), ("failing", "raised IndexError")])
def test_a_rule_that_misbehaves_is_told_with_the_text(rules: Path, name: str, message: str) -> None:
    with pytest.raises(CollmError, match=message):
        get_task(f"my_rules:{name}").score("some text", "gold")
