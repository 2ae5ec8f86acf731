"""Recipes: settings changed on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from collm.errors import CollmError
from collm.training.recipe import changed, load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"


def test_a_changed_recipe_differs_in_what_is_named_and_in_nothing_else() -> None:
    path = RECIPES / "word_problems" / "both.yaml"
    changes = ["init.method=b", "deferral_cost=0.1", "assistants.1.model=helper", "lora={r: 4}", "data.validation="]
    plain, varied = load_recipe(path).model_dump(), load_recipe(path, changes).model_dump()
    assert varied["assistants"][1]["model"] == "helper" and varied["lora"]["r"] == 4
    plain["init"]["method"], plain["deferral_cost"], plain["lora"]["r"] = "b", 0.1, 4
    plain["assistants"][1]["model"], plain["data"]["validation"] = "helper", None
    assert varied == plain


def test_the_values_that_are_changed_stay_as_they_were() -> None:
    values = {"out": "a", "training": {"seed": 1}}
    assert changed(values, ["training.seed=2", "out=b"]) == {"out": "b", "training": {"seed": 2}}
    assert values == {"out": "a", "training": {"seed": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("init.metod=b", "did you mean 'method'"),
        ("deferral_cost=-1", "greater than"),
        ("tune", "KEY=VALUE"),
        ("=gate", "KEY=VALUE"),
        ("tune.method=b", "nothing inside|no parts"),
        ("assistants.1.model=x", r"'1' is no entry .*\(0 to 0\)"),
        ("assistants.large=x", "'large' is no entry"),
        ("training={epochs: [", "not valid YAML"),
    ],
)
def test_changes_that_leave_no_recipe_are_refused(change: str, message: str) -> None:
    with pytest.raises(CollmError, match=message):
        load_recipe(RECIPES / "word_problems" / "gate.yaml", [change])
