"""Texts of the models' own: written, kept if a scorer accepts them, learnt beside the gold ones."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from launching import on_two_processes
from teaching import recipe_values, teach

from collm.data.examples import Example, load_examples
from collm.errors import CollmError
from collm.evaluation import runs
from collm.evaluation.evaluate import example_seed
from collm.llm import CollaborativeLM
from collm.models.hub import model_card
from collm.models.info import load_info
from collm.report.trace import Trace, read_traces
from collm.sampling_params import SamplingParams
from collm.training.checking import check_recipe
from collm.training.own_texts import accepted, as_row, own_examples
from collm.training.recipe import parse_recipe
from collm.training.summary import summary
from collm.training.train import train
from collm.types import Generation
from collm.workflow.run import base_alone

JUDGES = """
def even(text, gold):
    return len(text) % 2 == 0

def never(text, gold):
    return 0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that end their texts soon, sums, and a trained pair."""
    tokenizer = make_tokenizer()
    models = {}
    for seed, name in enumerate(("base", "other")):
        model = make_model(seed=seed, vocab_size=len(tokenizer), tie_word_embeddings=False)
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] *= 3
        models[name] = (model, tokenizer)
    folder = teach(tmp_path_factory.mktemp("own"), models)
    (folder / "judges.py").write_text(JUDGES)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "some.jsonl").write_text("".join(lines[:8]))
    train(parse_recipe(values(folder, "pair", own_texts=None)), progress=False)
    return folder


def values(place: Path, out: str, own_texts: dict[str, Any] | None, **changes: Any) -> dict[str, Any]:
    own = own_texts and {
        "checkpoint": str(place / "pair"),
        "task": f"{place / 'judges.py'}:even",
        "samples": 2,
        "data": str(place / "some.jsonl"),
        "max_tokens": 24,
        "device": "cpu",
        **own_texts,
    }
    quick = {"objective": "weak_supervision", "tune": "gate"}
    told = recipe_values(place, out, **{**quick, **changes})
    return {**told, "assistants": told["assistants"][-1:], "own_texts": own}


def run(place: Path, out: str, own_texts: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What the checkpoint tells of its own texts."""
    recipe = parse_recipe(values(place, out, own_texts, **changes))
    check_recipe(recipe)
    info = load_info(train(recipe, progress=False))
    assert info is not None
    told: dict[str, Any] = info.training["own_texts"]
    return told


def learnt(place: Path, out: str) -> list[Example]:
    return load_examples(place / out / "own_texts.jsonl")


def traces_of(place: Path, writer: str) -> list[Trace]:
    return [
        trace
        for folder in (place / "cache").glob(f"own-texts-{writer}-*")
        for file in folder.glob("*.jsonl")
        for trace in read_traces(file)
    ]


def test_a_pair_learns_what_it_draws_from_the_marginal(place: Path) -> None:
    """The texts are those of `sampled` decoding at temperature 1, and the scorer's; the set is gold and own."""
    told = run(place, "own", {"seed": 3})
    assert told["questions"] == 8 and told["written"] == 16 and told["writer"] == "pair"
    assert 0 < told["learnt"] == told["different"] <= told["accepted"] <= 16 - told["unfinished"]
    traces = traces_of(place, "pair")
    assert len(traces) == 16
    assert {step.author for trace in traces for step in trace.generation.steps} == {0, 1}
    llm = CollaborativeLM.from_pretrained(place / "pair")
    params = SamplingParams(max_tokens=24, temperature=1.0, deferral="sampled", seed=example_seed(3, traces[0].id))
    assert traces[0].generation.text in [llm.generate(traces[0].prompt, params, sample=k).text for k in (0, 1)]
    kept = {
        trace.generation.text.strip() for trace in traces if trace.score and trace.generation.finish_reason == "stop"
    }
    rows = learnt(place, "own")
    assert {row.reference for row in rows} == kept - {""}
    questions = {str(example.question) for example in load_examples(place / "some.jsonl")}
    assert {str(row.question) for row in rows} <= questions
    out = place / "own"
    info = load_info(out)
    assert info is not None
    made_from = json.loads((out / "run.json").read_text())
    assert set(made_from["made_from"]["data"]) == {"train", "own", "validation"}
    assert made_from["own_texts"]["seed"] == 3 and info.training["recipe"]["own_texts"]["writer"] == "pair"
    assert f"| {told['learnt']}, by pair" in model_card(info)
    assert dict(summary(out))["own texts"].startswith(f"{told['learnt']} learnt; {told['accepted']} of 16 by pair")
    # Gold scores are those of the runs without own texts; only the own rows were scored anew.
    assert len(list((place / "cache").glob("base-train-*"))) == len(list((place / "cache").glob("base-own-*"))) == 1
    assert train(parse_recipe(values(place, "own", {"seed": 3})), progress=False) == out  # told again


def test_models_that_write_alone(place: Path) -> None:
    """The controls: with the pair's checkpoint, and the recipe's own models without it."""
    for writer, checkpoint, name in [("other", str(place / "pair"), 1), ("other", None, 0), ("base", None, 0)]:
        out = f"alone-{writer}-{checkpoint is None}"
        told = run(place, out, {"writer": writer, "checkpoint": checkpoint})
        assert told["writer"] == writer and told["learnt"]
        authors = [{s.author for s in trace.generation.steps} for trace in traces_of(place, writer)]
        assert {name} in authors and {0, 1} not in authors


def test_arms_of_equal_volume(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit is drawn by the seed from what there is; what is written is kept for the next run; gold may go."""
    many = run(place, "many", {"seed": 5, "samples": 4})
    assert many["learnt"] > 3
    written = sorted((place / "cache").glob("own-texts-pair-*/*.jsonl"))
    few = run(place, "few", {"seed": 5, "samples": 4, "max_texts": 3, "gold": False, "keep": 0.5})
    assert few["learnt"] == 3 and sorted((place / "cache").glob("own-texts-pair-*/*.jsonl")) == written
    assert {row.reference for row in learnt(place, "few")} < {row.reference for row in learnt(place, "many")}
    assert set(json.loads((place / "few" / "run.json").read_text())["made_from"]["data"]) == {
        "train",
        "own",
        "validation",
    }
    assert train(
        parse_recipe(values(place, "few", {"seed": 5, "samples": 4, "max_texts": 3, "gold": False, "keep": 0.5}))
    )
    with caplog.at_level("WARNING", logger="collm"):
        run(place, "wanting", {"seed": 5, "samples": 4, "max_texts": 1000})
    assert f"max_texts is 1000, and there are {many['learnt']}" in caplog.text
    with pytest.raises(CollmError, match="another recipe .it differs in own_texts"):
        run(place, "few", {"seed": 6, "samples": 4, "max_texts": 3, "gold": False, "keep": 0.5})


def test_a_finished_run_is_not_told_again_of_other_questions(place: Path) -> None:
    """Or of another scorer; nor, where gold texts are not learnt, of others of these."""
    for name, source in (("asked.jsonl", "some.jsonl"), ("gold.jsonl", "train.jsonl"), ("scorer.py", "judges.py")):
        shutil.copy(place / source, place / name)
    own = {"data": str(place / "asked.jsonl"), "task": f"{place / 'scorer.py'}:even", "gold": False}
    again = partial(run, place, "finished", own, data={"train": str(place / "gold.jsonl")})
    told = again()
    row = json.loads((place / "asked.jsonl").read_text().splitlines()[0])
    for name, text, key in [
        ("asked.jsonl", json.dumps(row), "own_texts.questions"),
        (
            "asked.jsonl",
            (place / "asked.jsonl").read_text().replace("}\n", ', "answer": "7"}\n'),
            "own_texts.questions",
        ),
        ("scorer.py", f"{JUDGES}# stricter", "own_texts.task"),
        ("gold.jsonl", (place / "asked.jsonl").read_text(), r"data.train"),
    ]:
        before = (place / name).read_text()
        (place / name).write_text(text)
        with pytest.raises(CollmError, match=f"made from something else .it differs in {key}"):
            again()
        (place / name).write_text(before)
        assert again() == told


def test_without_questions_of_their_own_those_of_the_training_part_are_asked(place: Path) -> None:
    data = {"data": {"train": str(place / "some.jsonl"), "validation": None, "validation_share": 0.3}}
    told = run(place, "cut", {"data": None}, **data)
    given = run(place, "given", {"data": str(place / "some.jsonl")}, **data)
    assert told["questions"] == given["questions"] < 8
    assert told["learnt"] == given["learnt"]


def test_base_and_gate_learn_them_and_so_does_the_rival(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `collm run` compares a pair with, the base fine-tuned alone, learns the same texts, which are there."""
    own: dict[str, Any] = {"seed": 5, "samples": 4, "gold": False}
    run(place, "all", own, objective="marginal", tune="full")
    monkeypatch.delattr("collm.training.own_texts.load_writer")
    rival = base_alone(parse_recipe(values(place, "all", own, objective="marginal", tune="full")))
    train(rival, progress=False)
    assert (rival.out / "own_texts.jsonl").read_text() == (place / "all" / "own_texts.jsonl").read_text()
    assert len(learnt(place, "all")) > 3


def test_writing_goes_on_where_it_was_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two texts, or in the middle of writing one down."""
    run(place, "whole", {"seed": 7})
    again = values(place, "stopped", {"seed": 7}, cache=str(place / "cache-of-stopped"))
    write = runs.append_json
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        rows: list[Any] = []

        def stopped(*args: Any) -> None:
            rows.append(args)
            if len(rows) == 12:
                raise KeyboardInterrupt
            write(*args)

        patch.setattr("collm.evaluation.runs.append_json", stopped)
        train(parse_recipe(again), progress=False)
    [folder] = (place / "cache-of-stopped").glob("own-texts-pair-*")
    with (folder / "2.jsonl").open("a") as file:
        file.write('{"id": "half a l')
    assert [len(read_traces(folder / f"{n}.jsonl")) for n in (1, 2)] == [8, 3]
    first = (folder / "1.jsonl").read_bytes()
    train(parse_recipe(again), progress=False)
    assert (folder / "1.jsonl").read_bytes() == first
    assert (place / "stopped" / "own_texts.jsonl").read_text() == (place / "whole" / "own_texts.jsonl").read_text()


@pytest.mark.slow
def test_of_two_processes_one_writes(place: Path) -> None:
    path = place / "two.yaml"
    path.write_text(json.dumps(values(place, "two", {"seed": 9}, objective="marginal", tune="lora")))
    on_two_processes([sys.executable, "-m", "collm", "train", str(path)])
    info = load_info(place / "two")
    assert info is not None and info.training["own_texts"]["learnt"] == len(learnt(place, "two")) > 0


def test_none_that_is_right_is_told(place: Path) -> None:
    with pytest.raises(CollmError, match=r"of 16 by pair 0 are accepted.*Look at .*1\.jsonl.*raise own_texts\.samples"):
        run(place, "none", {"task": f"{place / 'judges.py'}:never"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "gsm9k"}, "own_texts: unknown task 'gsm9k'; did you mean 'gsm8k'"),
        ({"task": "mbpp"}, "own_texts: .*answer|own_texts: .*sandbox"),
        ({"task": "gsm8k"}, "own_texts: .*line 1.* has no gold answer for task 'gsm8k'"),
        ({"task": "gsm8k_8shot"}, "own_texts: .*behind solved examples"),
        ({"checkpoint": "nowhere/pair"}, "own_texts: .*nowhere/pair"),
        ({"checkpoint": "{place}/other"}, "own_texts: .*other has no gate.*collm train"),
        ({"checkpoint": "{place}/wrong"}, "own_texts: checkpoint .*wrong is out itself"),
        ({"checkpoint": None}, "own_texts: a pair writes by its gate: give checkpoint"),
        ({"checkpoint": None, "writer": "large"}, "own_texts: there is no writer 'large': it is base, other"),
        ({"writer": "othr"}, "own_texts: there is no model 'othr'.*did you mean 'other'"),
        ({"writer": "calculator"}, "own_texts: calculator is a tool"),
        ({"data": "{place}/none.jsonl"}, "own_texts: .*none.jsonl"),
        ({"max_texts": 0}, "own_texts.max_texts: .*greater than or equal to 1"),
        ({"samples": 0}, "own_texts.samples: .*greater than or equal to 1"),
        ({"keep": 2}, "own_texts.keep: .*less than or equal to 1"),
        ({"sample": 2}, "unknown key 'own_texts.sample'; did you mean 'samples'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_loaded(place: Path, change: dict[str, Any], message: str) -> None:
    own = {key: v.format(place=place) if isinstance(v, str) else v for key, v in change.items()}
    told = values(place, "wrong", own)
    if own.get("writer") == "calculator":
        told["assistants"] = [{"name": "calculator", "model": "calculator"}]
        told["own_texts"]["checkpoint"] = None
    with pytest.raises(CollmError, match=message):
        check_recipe(parse_recipe(told))
    assert not (place / "wrong").exists()


def said(text: str, score: float | None, finish: Any = "stop") -> Trace:
    return Trace("a", Generation(text, (), (), finish, 3, ("base",)), "1 + 1?", score=score)


def test_own_texts_are_the_right_whole_ones_that_are_not_gold() -> None:
    asked = {"role": "user", "content": "1 + 1?"}
    turns = (asked, {"role": "assistant", "content": "2"})
    gold = [Example("a", messages=turns, fields={"answer": "2", "group": "g"}), Example("b", messages=(asked,))]
    texts = accepted(
        [said("2", 1.0), said("It is 2 ", 1.0), said("It is 2", 1.0), said("3", 0.0), said("two", None), said(" ", 1.0)]
        + [said("It is 2, as", 1.0, "length")]
    )
    [own] = own_examples(gold, texts)
    assert own.reference == "It is 2" and own.question == gold[0].question
    assert as_row(own) == {"id": own.id, "messages": own.messages, "answer": "2", "group": "g"} and own.id != "a"
    assert [each.reference for each in own_examples(gold, texts, gold=False)] == ["2", "It is 2"]
    # Half a point is enough where the recipe says so; of a plain text, its space belongs to it.
    plain = [Example("a", prompt="1 + 1 =", completion=" 2")]
    assert [e.completion for e in own_examples(plain, accepted([said(" two", 0.5)], 0.5))] == [" two"]
    # Of a conversation the earlier answers are learnt with the gold text, once.
    [long] = own_examples([Example("a", messages=(*turns, asked, turns[1]))], {"a": ["two"]})
    assert long.last_turn and [message["content"] for message in long.messages or ()] == [
        "1 + 1?",
        "2",
        "1 + 1?",
        "two",
    ]
