"""The demo: its world keeps apart what it must, and a much smaller plan of it runs from end to end."""

from __future__ import annotations

import io
import json
import logging
import queue
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from collm.demo import run_demo
from collm.demo.corpus import ADDENDS, AGES, FACTS, KINDS, Corpus, Sizes, equations, make_corpus, texts
from collm.demo.pieces import ASSISTANT_TEMPLATE, END, START, make_tokenizer
from collm.demo.plan import BOTH, SYSTEMS, Plan, Schedule
from collm.demo.workers import Job, Progress, Workers
from collm.errors import CollmError

SMALL = Sizes(people=(12, 4, 6), fiction=100, train=60, validation=8, test=10, facts_in_context=1, sums_in_context=20)
TINY = Plan(
    sizes=replace(SMALL, fiction=40, train=24),
    base_hidden_size=16,
    expert_hidden_size=16,
    layers=1,
    base=Schedule(1, 1e-3),
    facts=Schedule(1, 1e-3),
    drill=Schedule(0.1, 1e-3),
    arithmetic=Schedule(0.1, 1e-3),
    tuning=Schedule(1, 1e-3),
    rates=(0.0, 0.5, 1.0),
    few_rates=(0.0, 0.5),
    rounds=1,
    max_tokens=6,
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return make_corpus(SMALL, seed=3)


def everything(corpus: Corpus, *splits: str) -> str:
    return "\n".join(text for split in splits for row in corpus.rows[split] for text in texts(row))


# -- the world


def test_a_seed_makes_the_same_world_and_another_seed_another(corpus: Corpus) -> None:
    assert make_corpus(SMALL, seed=3) == corpus
    assert make_corpus(SMALL, seed=4).people != corpus.people


def test_the_base_reads_of_nobody_who_is_asked_about(corpus: Corpus) -> None:
    read = everything(corpus, "train", "fiction")
    asked = [person.name for split in ("validation", "test") for person in corpus.people[split]]
    assert len(asked) == 10
    assert not [name for name in asked if name in read]


def test_people_of_different_splits_are_different_people(corpus: Corpus) -> None:
    names = [person.name for people in corpus.people.values() for person in people]
    assert len(set(names)) == len(names) == sum(SMALL.people)
    for split, people in corpus.people.items():
        others = [person.name for other, group in corpus.people.items() if other != split for person in group]
        assert people and not [name for name in others if name in everything(corpus, split)]


def test_fiction_tells_nothing_of_the_world(corpus: Corpus) -> None:
    read = everything(corpus, "fiction")
    assert not [person.name for people in corpus.people.values() for person in people if person.name in read]


def test_no_model_reads_a_held_out_question_or_sum(corpus: Corpus) -> None:
    for split, readers in {
        "test": ("train", "fiction", "facts", "arithmetic", "validation"),
        "validation": ("train", "fiction", "facts", "arithmetic"),
    }.items():
        read = everything(corpus, *readers)
        questions = [texts(row)[0] for row in corpus.rows[split]]
        sums = equations(everything(corpus, split))
        assert questions and sums
        assert not [question for question in questions if question in read]
        assert not sums & equations(read)


def test_the_facts_expert_reads_every_fact_and_the_arithmetic_expert_every_other_sum(corpus: Corpus) -> None:
    statements = everything(corpus, "facts")
    people = [person for group in corpus.people.values() for person in group]
    assert all("".join(person.statement(fact)) in statements for person in people for fact in FACTS)
    held_out = equations(everything(corpus, "validation", "test"))
    every_sum = {f"{a}+{b}" for a in AGES for b in ADDENDS}
    assert equations(everything(corpus, "arithmetic")) >= every_sum - held_out


def test_results_are_right_where_they_are_taught_and_anything_in_fiction(corpus: Corpus) -> None:
    def right(split: str) -> list[bool]:
        found = []
        for text in everything(corpus, split).splitlines():
            for left in equations(text):
                result = text.partition(f"{left}=")[2].partition(".")[0]
                found.append(sum(map(int, left.split("+"))) == int(result))
        return found

    for split in ("train", "validation", "test", "arithmetic"):
        assert right(split) and all(right(split))
    assert sum(right("fiction")) < 0.2 * len(right("fiction"))


def test_answers_are_those_of_the_world(corpus: Corpus) -> None:
    people = {person.name: person for person in corpus.people["test"]}
    assert {row["kind"] for row in corpus.rows["test"]} == set(KINDS)
    for row in corpus.rows["test"]:
        question, answer = texts(row)
        assert answer.endswith(f"#### {row['answer']}")
        asked = [person for name, person in people.items() if name in question]
        if row["kind"] == "facts":
            assert row["answer"] in {str(getattr(asked[0], fact)) for fact in FACTS}
        elif row["kind"] == "both":
            [years] = [word for word in question.split() if word.isdigit()]
            assert int(row["answer"]) == asked[0].age + int(years)


# -- the tokenizer


def test_digits_are_tokens_and_experts_do_not_see_the_question() -> None:
    tokenizer = make_tokenizer(["Mira Tolan is 26. 26+17=43. #### 43"] * 3)
    assert tokenizer.tokenize("26+17=43") == ["2", "6", "+", "1", "7", "=", "4", "3"]
    messages = [{"role": "user", "content": "How old?"}, {"role": "assistant", "content": "26."}]
    shown = tokenizer.apply_chat_template(messages, chat_template=ASSISTANT_TEMPLATE, tokenize=False)
    assert shown == f"{START}26.{END}"


# -- all of it


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=120)
    results = run_demo(out, seed=1, plan=TINY, workers=0, console=console)
    assert isinstance(console.file, io.StringIO)
    return out, results, console.file.getvalue()


def test_a_small_demo_writes_its_results(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, results, _ = finished
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [system["name"] for system in results["systems"]] == [system.name for system in SYSTEMS]
    assert {system["kind"] for system in results["systems"]} == {"single", "joint", "control"}
    for system in results["systems"]:
        low, high = system["ci95"]
        assert 0 <= low <= system["exact_match"] <= high <= 1
        assert 0 <= system["deferral_rate"] <= 1
        if system["kind"] == "single":
            assert system["deferral_rate"] == 0
    assert results["seconds"] > 0 and results["seed"] == 1 and not results["resumed"]


def test_a_small_demo_shows_table_samples_report_and_curve(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, _, shown = finished
    for system in SYSTEMS:
        assert system.name in shown
    assert "written by: base" in shown and str(out / "report.html") in "".join(shown.splitlines())
    page = (out / "report.html").read_text()
    assert BOTH in page and "<svg" in page
    assert (out / "curve.csv").read_text().startswith("target_rate,")
    assert (out / "curve.svg").is_file()


def test_a_second_start_takes_up_what_is_there_and_says_what_it_does(
    finished: tuple[Path, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, results, _ = finished
    again = run_demo(out, seed=1, plan=TINY, workers=0, console=Console(file=io.StringIO()))
    assert again["resumed"] and again["systems"] == results["systems"]
    told = capsys.readouterr().err
    assert "going on in" in told
    for line in ("the base: learning how people ask", f"{BOTH}: training", f"{BOTH}: answering 10 questions"):
        assert told.count(line) == 1
    for system in SYSTEMS:
        assert f"{system.name}: " in told


def test_samples_begin_with_questions_that_need_both(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, _, shown = finished
    rows = [json.loads(line) for line in (out / "data" / "test.jsonl").read_text().splitlines()]
    asked = {kind: [row["messages"][0]["content"] for row in rows if row["kind"] == kind][:2] for kind in KINDS}
    page = (out / "report.html").read_text()
    places = {kind: [page.index(question) for question in asked[kind]] for kind in KINDS}
    assert max(places["both"]) < min(places["arithmetic"] + places["facts"])
    text = " ".join(shown.split())
    places = {kind: [text.index(question) for question in asked[kind]] for kind in KINDS}
    assert max(places["both"]) < min(places["arithmetic"] + places["facts"])


def test_stages_tell_what_they_do_and_warn_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their warnings were once in a log file alone, and a pipe heard nothing for four minutes."""
    monkeypatch.setattr("collm.demo.workers.SILENCE", 0.05)
    said: list[str] = []
    monkeypatch.setattr("collm.demo.stages.thinking", _thinking, raising=False)
    pool = Workers(0, tmp_path / "log.txt", said.append)
    assert pool.all([Job("thinking")]) == ["done"]
    assert said == ["thinking", "warning: the gate is shut"]
    log = (tmp_path / "log.txt").read_text()
    assert "the gate is shut" in log and "to the log alone" in log
    # As the lines of other processes come.
    lines: queue.Queue[tuple[int, str] | None] = queue.Queue()
    pool._lines = lines
    listener = threading.Thread(target=pool._listen)
    listener.start()
    lines.put((7, "thinking"))
    time.sleep(0.5)
    lines.put((7, ""))  # has finished
    time.sleep(0.2)
    told = len(said)
    time.sleep(0.5)
    lines.put(None)
    listener.join(5)
    assert "still at it: thinking" in said and len(said) == told


def test_the_time_left_is_told_from_the_pace_of_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("collm.demo.workers.time.monotonic", lambda: now)
    told = Console(file=io.StringIO(), width=80)
    say = Progress(0.0, told, work=100.0, workers=2)
    say("begins")
    now = 60.0
    say.finished(25.0, 60.0)  # both processes have done 25 by now, if the other one is as fast
    say("goes on")
    now = 110.0
    say("nearly")
    assert isinstance(told.file, io.StringIO)
    assert told.file.getvalue().splitlines() == [
        "[    0 s] begins",
        "[   60 s, 1 min left] goes on",
        "[  110 s, soon done] nearly",
    ]


def _thinking() -> str:
    print("to the log alone")
    logging.getLogger("collm.demo.stages").info("thinking")
    logging.getLogger("collm.training").warning("the gate is shut")
    logging.getLogger("collm.training.watch").warning("to the log alone, for it is meant to be so")
    return "done"


def test_another_demo_does_not_go_on_in_its_folder(finished: tuple[Path, dict[str, Any], str]) -> None:
    with pytest.raises(CollmError, match="other settings"):
        run_demo(finished[0], seed=2, plan=TINY, workers=0)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CollmError, match="not empty"):
        run_demo(tmp_path, plan=TINY, workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
