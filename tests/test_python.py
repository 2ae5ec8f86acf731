"""Python as people write it: settings by name, torch's own types, models of all kinds as assistants, notebooks."""

from __future__ import annotations

import asyncio
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from collm import CollaborativeLM, SamplingParams
from collm.errors import CollmError
from collm.models.loading import load_model
from collm.models.tools import Calculator
from collm.report.trace import read_traces
from collm.training.recipe import load_recipe
from collm.types import Generation, Step

PROMPT = "3 + 10 = "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("python")
    tokenizer = make_tokenizer()
    for seed, name in enumerate(("base", "helper")):
        make_model(seed=seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def llm(folders: Path) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(folders / "base")


PLAIN = SamplingParams(max_tokens=5, deferral="never", stop=("x",))


def test_settings_are_given_by_name_in_every_method(llm: CollaborativeLM) -> None:
    expected = llm.generate(PROMPT, PLAIN)
    by_name: dict[str, Any] = {"max_tokens": 5, "deferral": "never", "stop": "x"}
    assert expected.completion_tokens == 5
    assert llm.generate(PROMPT, **by_name) == expected
    assert llm.generate_batch([PROMPT], **by_name) == [expected]
    assert dict(llm.generate_each([PROMPT], **by_name)) == {0: expected}
    assert [chunk.generation for chunk in llm.stream(PROMPT, **by_name)][-1] == expected
    assert asyncio.run(llm.agenerate(PROMPT, **by_name)) == expected

    async def last() -> Generation | None:
        return [chunk.generation async for chunk in llm.astream(PROMPT, **by_name)][-1]

    assert asyncio.run(last()) == expected
    # What is named is set in the params that are given, for each of several.
    assert llm.generate(PROMPT, SamplingParams(max_tokens=9, deferral="never", stop=("x",)), max_tokens=5) == expected
    both = llm.generate_batch([PROMPT, "5 "], [PLAIN, PLAIN], max_tokens=2)
    assert [generation.completion_tokens for generation in both] == [2, 2]


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ({"max_tokens": 3}, {}, r"generate\(prompt, max_tokens=3\).*not as a dict"),
        (3, {}, "not as a int"),
        (None, {"max_new_tokens": 3}, "'max_new_tokens'; here it is called max_tokens"),
        (None, {"temprature": 1.0}, "did you mean 'temperature'"),
        (None, {"temperature": "a"}, "temperature must be a number, not 'a'"),
        (None, {"top_p": None}, "top_p must be a number"),
        (None, {"threshold": "0.5"}, "threshold must be a number"),
        (None, {"stop": 3}, "stop must be a text or a list of texts"),
        (None, {"stop": ("a", 3)}, "stop must be a text or a list of texts"),
        (None, {"speculative": "no"}, "speculative must be True or False"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_told(llm: CollaborativeLM, params: Any, settings: Any, message: str) -> None:
    for write in (llm.generate, lambda prompt, *rest, **more: llm.generate_batch([prompt], *rest, **more)):
        with pytest.raises(ValueError, match=message):
            write(PROMPT, *([] if params is None else [params]), **settings)


def test_torch_types_and_paths_do_as_well_as_names(folders: Path) -> None:
    given = CollaborativeLM.from_pretrained(
        folders / "base", folders / "helper", dtype=torch.bfloat16, device=torch.device("cpu")
    )
    named = CollaborativeLM.from_pretrained(str(folders / "base"), [str(folders / "helper")], dtype="bfloat16")
    how = SamplingParams(max_tokens=5, deferral="always")
    assert given.model_names == named.model_names == ("base", "helper")
    assert given.generate(PROMPT, how).token_ids == named.generate(PROMPT, how).token_ids
    assert CollaborativeLM.from_pretrained(folders / "base", device="auto").generate(PROMPT, PLAIN)
    with pytest.raises(CollmError, match="dtype is one of"):
        CollaborativeLM.from_pretrained(folders / "base", dtype=torch.float64)


def test_an_assistant_may_be_a_transformers_model_a_path_or_a_tool(folders: Path) -> None:
    how = SamplingParams(max_tokens=5, deferral="always")
    spec = CollaborativeLM.from_pretrained(folders / "base", [str(folders / "helper")]).generate(PROMPT, how).token_ids
    network = load_model(str(folders / "helper"))
    for given in (network, [network], {"helper": network}, folders / "helper", {"helper": folders / "helper"}):
        llm = CollaborativeLM.from_pretrained(folders / "base", given)
        assert llm.model_names == ("base", "helper") and llm.generate(PROMPT, how).token_ids == spec
    other = CollaborativeLM.from_pretrained(folders / "base", {"expert": network, "sums": "calculator"})
    assert other.model_names == ("base", "expert", "sums")
    tool = Calculator(make_tokenizer())
    assert CollaborativeLM.from_pretrained(folders / "base", tool).models[1] is tool


@pytest.mark.parametrize(
    ("assistant", "message"),
    [(3, "an assistant is a path"), ([make_tokenizer], "an assistant is a path"), ("no/such/folder", "no such folder")],
)
def test_what_is_no_assistant_is_told(folders: Path, assistant: Any, message: str) -> None:
    with pytest.raises(CollmError, match=message):
        CollaborativeLM.from_pretrained(folders / "base", assistant)


def test_a_network_of_fewer_tokens_is_refused(folders: Path) -> None:
    with pytest.raises(CollmError, match="the model has 100 tokens"):
        CollaborativeLM.from_pretrained(folders / "base", make_model(vocab_size=100))


def test_a_notebook_shows_who_wrote_what() -> None:
    steps = (Step(1, 0, -0.5, (0.9, 0.1)), Step(2, 1, -0.1, (0.2, 0.8), base_token_id=3))
    generation = Generation("<b>42", steps, ("<b>", "42\u202e"), "stop", 3, ("base", "calc & co"))
    shown = generation._repr_html_()
    assert "&lt;b&gt;" in shown and "<b>" not in shown and "\u202e" not in shown
    assert shown.count("background:#e69f00") == 2  # the token and the legend
    assert "calc &amp; co 0.800" in shown and "the base would have written another token" in shown
    assert "2 tokens, 50.0% written by assistants" in shown


@pytest.mark.parametrize("what", ["recipe", "trace"])
def test_an_error_that_says_it_all_comes_without_the_one_behind_it(tmp_path: Path, what: str) -> None:
    """In Python the traceback of a cause stands above the error, and hides it."""
    file = tmp_path / "file"
    file.write_text("out: [" if what == "recipe" else "no trace\n")
    with pytest.raises(CollmError) as caught:
        if what == "recipe":
            load_recipe(file)
        else:
            read_traces(file)
    assert "During handling" not in "".join(traceback.format_exception(caught.value))
    assert "direct cause" not in "".join(traceback.format_exception(caught.value))
