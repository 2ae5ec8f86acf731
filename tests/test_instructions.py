"""Requests to learn instruction following from: the checker takes them, and none of them is IFEval's."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from collm.data.examples import load_examples
from collm.data.records import records
from collm.errors import CollmError
from collm.evaluation.shipped import get_task
from collm.evaluation.tasks import ifeval

SCRIPT = Path(__file__).parent.parent / "recipes" / "instructions" / "prompts.py"


@pytest.fixture(scope="module")
def prompts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("instruction_prompts", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["instruction_prompts"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The checker's instructions, without the data that two of them need."""
    import nltk

    (tmp_path / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    return dict(INSTRUCTION_DICT)


def test_parts_share_no_subject_and_load_as_examples_of_the_task(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--number", "200", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    parts = {part: load_examples(tmp_path / f"{part}.jsonl") for part in ("train", "calibration", "held_out")}
    assert sum(map(len, parts.values())) == 200 and "prompts" in done.stdout
    subjects = [{example.fields["group"] for example in examples} for examples in parts.values()]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])
    for example in (example for examples in parts.values() for example in examples):
        gold = json.loads(get_task("ifeval").gold(example))
        assert example.question == [{"role": "user", "content": gold["prompt"]}]


def test_prompts_are_a_function_of_their_seed(prompts: ModuleType) -> None:
    first, again, other = (list(prompts.rows(30, seed)) for seed in (1, 1, 2))
    assert first == again != other
    texts = [row["answer"]["prompt"] for row in first]
    assert len(set(texts)) == 30
    with pytest.raises(CollmError, match="ask for fewer"):
        list(prompts.rows(5, 0, [row["answer"]["prompt"] for row in prompts.rows(3000, 0)]))


def test_the_checker_knows_every_kind_and_takes_its_arguments(prompts: ModuleType, registry: dict[str, Any]) -> None:
    for kind in prompts.KINDS:
        for seed in range(20):
            _, given = kind.make(random.Random(seed))
            checker = registry[kind.name](kind.name)
            checker.build_description(**given)
            held = checker.get_instruction_args() or {}
            assert {key: held[key] for key in given if key not in ("keywords", "forbidden_words")} == {
                key: value for key, value in given.items() if key not in ("keywords", "forbidden_words")
            }


def test_no_wording_is_the_checkers_own(prompts: ModuleType, registry: dict[str, Any]) -> None:
    """IFEval's prompts are made of these descriptions."""
    for kind in prompts.KINDS:
        for seed in range(20):
            wording, given = kind.make(random.Random(seed))
            told = {key: "x" if key == "end_phrase" else value for key, value in given.items()}  # a phrase of ours
            described = registry[kind.name](kind.name).build_description(**told)
            assert not prompts.runs(wording) & prompts.runs(described), (wording, described)


def test_no_prompt_is_near_one_of_another_set(prompts: ModuleType) -> None:
    free = list(prompts.rows(40, 0))
    other = free[3]["answer"]["prompt"]
    apart = list(prompts.rows(40, 0, [other.upper()]))
    assert len(apart) == 40 and other not in {row["answer"]["prompt"] for row in apart}
    taken = prompts.runs(other)
    assert taken and not any(prompts.runs(row["answer"]["prompt"]) & taken for row in apart)


KEPT = Path(__file__).parent / "ifeval_runs.bin"
"""Every run of five words in IFEval's 541 prompts (Apache-2.0), as the first five bytes of its SHA-256, sorted: none of
its text. `IFEVAL=ifeval.jsonl pytest tests/test_instructions.py` compares the two."""


def digests(prompts: ModuleType, texts: Iterable[str]) -> set[bytes]:
    found = set().union(*(prompts.runs(text) for text in texts))
    return {hashlib.sha256(" ".join(run).encode()).digest()[:5] for run in found}


@pytest.fixture(scope="module")
def ifevals_runs() -> set[bytes]:
    content = KEPT.read_bytes()
    return {content[i : i + 5] for i in range(0, len(content), 5)}


def test_no_prompt_that_is_learnt_from_is_near_ifeval(prompts: ModuleType, ifevals_runs: set[bytes]) -> None:
    """Those that the recipe writes: 1,500 of seed 0. Two sets of so many would share none by chance (1 in 5,000)."""
    learnt = [row["answer"]["prompt"] for row in prompts.rows(1500, 0)]
    assert len(ifevals_runs) == 15_599 and len(digests(prompts, learnt)) > 10_000
    assert not [prompt for prompt in learnt if digests(prompts, [prompt]) & ifevals_runs]


def test_the_kept_runs_tell_a_prompt_of_ifeval(
    prompts: ModuleType, ifevals_runs: set[bytes], registry: dict[str, Any]
) -> None:
    """Its prompts repeat what the checker says of its instructions."""
    for name in (
        "detectable_format:title",
        "startend:quotation",
        "combination:two_responses",
        "change_case:english_lowercase",
    ):
        described = registry[name](name).build_description()
        assert digests(prompts, [f"Write about tea. {described}"]) & ifevals_runs, described


def test_the_kept_runs_are_those_of_ifeval(prompts: ModuleType, ifevals_runs: set[bytes]) -> None:
    if not os.environ.get("IFEVAL"):
        pytest.skip("IFEVAL=FILE names no copy of IFEval to compare with")
    texts = [record["prompt"] for _, record in records(Path(os.environ["IFEVAL"]))]
    assert len(texts) == 541 and digests(prompts, texts) == ifevals_runs
    learnt = [row["answer"]["prompt"] for row in prompts.rows(1500, 0)]
    assert learnt == [row["answer"]["prompt"] for row in prompts.rows(1500, 0, texts)]


def test_constraints_of_one_prompt_can_be_followed_together(prompts: ModuleType) -> None:
    seen = set()
    for seed in range(500):
        kinds = prompts.choose(random.Random(seed))
        assert 1 <= len(kinds) <= 3
        groups = [kind.group for kind in kinds]
        assert len(set(groups)) == len(groups)
        assert not any((kind.excludes - {kind.group}) & set(groups) for kind in kinds)
        assert len(kinds) == 1 or not any(kind.lone for kind in kinds)
        seen.update(kind.name for kind in kinds)
    assert seen == {kind.name for kind in prompts.KINDS}


FOLLOWED = {
    "keywords:existence": lambda given: " ".join(given["keywords"]),
    "keywords:frequency": lambda given: " ".join([given["keyword"]] * given["frequency"]),
    "keywords:forbidden_words": lambda given: "Nothing of that.",
    "keywords:letter_frequency": lambda given: given["letter"] * given["let_frequency"],
    "length_constraints:number_words": lambda given: " ".join(
        ["word"] * (given["num_words"] - (given["relation"] == "less than"))
    ),
    "length_constraints:number_paragraphs": lambda given: "\n***\n".join(["text"] * given["num_paragraphs"]),
    "length_constraints:nth_paragraph_first_word": lambda given: "\n\n".join(
        [f"{given['first_word'].capitalize()} it is."] * given["num_paragraphs"]
    ),
    "detectable_content:number_placeholders": lambda given: "[date] " * given["num_placeholders"],
    "detectable_content:postscript": lambda given: "Text.\n\nP.S. More.",
    "detectable_format:number_bullet_lists": lambda given: "Points:\n" + "* point\n" * given["num_bullets"],
    "detectable_format:number_highlighted_sections": lambda given: "*this* " * given["num_highlights"],
    "detectable_format:multiple_sections": lambda given: "".join(
        f"{given['section_spliter']} {i + 1}\ntext\n" for i in range(given["num_sections"])
    ),
    "detectable_format:json_format": lambda given: '{"a": 1}',
    "detectable_format:title": lambda given: "<<Tea>>\nText.",
    "combination:two_responses": lambda given: "One.\n******\nTwo.",
    "startend:end_checker": lambda given: f"Well. {given['end_phrase']}",
    "startend:quotation": lambda given: '"As if spoken."',
    "punctuation:no_comma": lambda given: "Nothing of that.",
}
"""What follows an instruction, of those that need no language and no sentences to be told."""
FAILS = {
    "keywords:forbidden_words": lambda given: given["forbidden_words"][0],
    "length_constraints:number_words": lambda given: "word " * (500 if given["relation"] == "less than" else 1),
    "punctuation:no_comma": lambda given: "One, two",
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", FOLLOWED)
def test_who_does_what_the_wording_says_is_accepted(prompts: ModuleType, name: str) -> None:
    ifeval._checker.cache_clear()
    [kind] = [kind for kind in prompts.KINDS if kind.name == name]
    task = get_task("ifeval")
    for seed in range(10):
        _, given = kind.make(random.Random(seed))
        gold = json.dumps({"prompt": "p", "instruction_id_list": [name], "kwargs": [given]})
        assert task.score(FOLLOWED[name](given), gold) == 1.0, given
        assert task.score(FAILS.get(name, lambda _: "no")(given), gold) == 0.0, given
    ifeval._checker.cache_clear()


@pytest.fixture
def sentences() -> Iterator[None]:
    """The data by which sentences and words are told, where they are."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        pytest.skip("NLTK's punkt_tab is not here: `make nltk-data` brings it")
    ifeval._checker.cache_clear()
    yield
    ifeval._checker.cache_clear()


def of_sentences(given: dict[str, Any], more: int) -> str:
    """As many sentences as the constraint's number and `more`; each has a dot inside that ends none."""
    return " ".join(["Dr. Smith came back."] * (given["num_sentences"] + more))


@pytest.mark.usefixtures("sentences")
@pytest.mark.parametrize("seed", range(12))
def test_sentences_are_counted_as_the_wording_says(prompts: ModuleType, seed: int) -> None:
    [kind] = [kind for kind in prompts.KINDS if kind.name == "length_constraints:number_sentences"]
    wording, given = kind.make(random.Random(seed))
    gold = json.dumps({"prompt": "p", "instruction_id_list": [kind.name], "kwargs": [given]})
    verdicts = [get_task("ifeval").score(of_sentences(given, more), gold) for more in (-1, 0)]
    below = given["relation"] == "less than"
    assert verdicts == ([1.0, 0.0] if below else [0.0, 1.0])
    assert str(given["num_sentences"]) in wording and ("below" in wording) == below


@pytest.mark.usefixtures("sentences")
@pytest.mark.parametrize("seed", range(8))
def test_words_in_capitals_are_counted_as_the_wording_says(prompts: ModuleType, seed: int) -> None:
    [kind] = [kind for kind in prompts.KINDS if kind.name == "change_case:capital_word_frequency"]
    wording, given = kind.make(random.Random(seed))
    count = given["capital_frequency"]
    gold = json.dumps({"prompt": "p", "instruction_id_list": [kind.name], "kwargs": [given]})
    task = get_task("ifeval")
    assert task.score(f"Come now: {'NOW! ' * count}", gold) == 1.0
    assert task.score(f"Come now: {'NOW! ' * (count - 1)}Now!", gold) == 0.0
    assert f" {count} " in wording
