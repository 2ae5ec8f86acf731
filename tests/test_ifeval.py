"""IFEval as a task: the harness's checker judges, its figures are the harness's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
from writers import PairWriter

from collm.data.examples import Example
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate_with_traces
from collm.evaluation.shipped import get_task
from collm.evaluation.tasks import ifeval

ROWS: list[dict[str, Any]] = [
    {"prompt": "Name a river. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "prompt": "Write about tea in 5 words or more, with the word leaf.",
        "instruction_id_list": ["length_constraints:number_words", "keywords:existence"],
        "kwargs": [{"relation": "at least", "num_words": 5}, {"keywords": ["leaf"]}],
    },
    {
        "prompt": "Answer in quotation marks.",
        "instruction_id_list": ["startend:quotation", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    },
]
TEXTS = ["The Elbe.", "Tea is made of a leaf", 'Sure:\n"it is the elbe."', "", "Tea, and a leaf, and so on", "*"]
HARNESS = ("prompt_level_strict_acc", "prompt_level_loose_acc")


@pytest.fixture(autouse=True)
def nltk_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in the place of the sentences' data, which no instruction here reads: nothing is fetched."""
    import nltk

    folder = tmp_path_factory.mktemp("nltk")
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    ifeval._checker.cache_clear()
    yield folder
    ifeval._checker.cache_clear()


def example(number: int) -> Example:
    return Example(f"e{number}", prompt=ROWS[number]["prompt"], fields={"answer": ROWS[number]})


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_verdicts_are_the_harnesss(number: int) -> None:
    from lm_eval.tasks.ifeval.utils import process_results

    task = get_task("ifeval")
    gold = task.gold(example(number))
    seen = set()
    for text in TEXTS:
        theirs = process_results({"key": 0, **ROWS[number]}, [text])
        ours = task.judge(task.extract(text), gold)
        assert ours == {metric: float(theirs[metric]) for metric in HARNESS}, text
        each = ifeval.followed(task.extract(text), gold)
        assert each == {m: theirs[m.replace("prompt", "inst")] for m in HARNESS}
        seen.add(tuple(ours.values()))
    assert len(seen) > 1  # the texts tell right from wrong


def test_instructions_are_counted_each_with_an_interval() -> None:
    from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results

    task = get_task("ifeval")
    pairs = [(number, text) for number in range(len(ROWS)) for text in TEXTS]
    golds = [task.gold(example(number)) for number, _ in pairs]
    answers = [task.extract(text) for _, text in pairs]
    found = task.further(answers, golds)
    theirs = [process_results({"key": 0, **ROWS[number]}, [text]) for number, text in pairs]
    assert set(found) == {"prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc"}
    for metric in ("inst_level_strict_acc", "inst_level_loose_acc"):
        value, (low, high) = found[metric]
        assert value == pytest.approx(agg_inst_level_acc([row[metric] for row in theirs]))
        assert low < value < high
    # Copies in one group tell nothing new.
    twice = task.further(answers * 2, golds * 2, [str(i) for i in range(len(pairs))] * 2)
    assert twice["inst_level_strict_acc"][0] == pytest.approx(found["inst_level_strict_acc"][0])
    assert twice["inst_level_strict_acc"][1] == pytest.approx(found["inst_level_strict_acc"][1], abs=0.02)

    # All followed, by few prompts: no certainty.
    [(value, ci95)] = {ifeval.strict_instructions(["The Elbe."] * 3, golds[:1] * 3)}
    assert value == 1 and ci95 == pytest.approx((0.025 ** (1 / 3), 1))


def test_a_languages_verdict_is_the_same_each_time() -> None:
    row = {"prompt": "p", "instruction_id_list": ["language:response_language"], "kwargs": [{"language": "de"}]}
    gold = get_task("ifeval").gold(Example("e", prompt="p", fields={"answer": row}))
    text = "an in so is da die on"  # between languages
    assert len({get_task("ifeval").score(text, gold) for _ in range(20)}) == 1


def test_a_letter_that_the_checker_does_not_count_is_the_same_other_one_each_time() -> None:
    """One of IFEval's prompts wants "#" four times. The checker draws a letter of the alphabet for it."""
    kwargs = {"let_relation": "at least", "letter": "#", "let_frequency": 4}
    row = {"prompt": "p", "instruction_id_list": ["keywords:letter_frequency"], "kwargs": [kwargs]}
    golds = [get_task("ifeval").gold(Example("e", prompt="p", fields={"answer": {**row, "prompt": p}})) for p in "abcd"]
    random.seed(0)
    state = random.getstate()
    for gold in golds:
        verdicts = [ifeval.followed(letter * 4, gold) for letter in ascii_lowercase]
        assert sum(verdict[ifeval.STRICT] == [True] for verdict in verdicts) == 1
        assert all(verdict[ifeval.STRICT] == verdict[ifeval.LOOSE] for verdict in verdicts)
        assert verdicts == [ifeval.followed(letter * 4, gold) for letter in ascii_lowercase]
    assert random.getstate() == state  # nobody else's draws are changed


def test_without_its_data_the_task_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    llm = PairWriter()
    with pytest.raises(CollmError, match=r"needs NLTK's punkt_tab.*python -m nltk.downloader punkt_tab.*NLTK_DATA"):
        evaluate_with_traces(llm, "ifeval", [example(0)], out=tmp_path / "r.jsonl", progress=False)
    assert llm.written == 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "answer",
    [
        None,
        "x",
        {},
        {"prompt": "p", "instruction_id_list": [], "kwargs": []},
        {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": []},
        {"prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [None]},
    ],
)
def test_an_example_without_instructions_is_refused(answer: object) -> None:
    with pytest.raises(CollmError, match="no gold answer for task 'ifeval'"):
        get_task("ifeval").gold(Example("e", prompt="p", fields={"answer": answer}))


def test_an_unknown_instruction_is_named() -> None:
    row = {"prompt": "p", "instruction_id_list": ["punctuation:no_dots"], "kwargs": [{}]}
    with pytest.raises(CollmError, match=r"no instruction 'punctuation:no_dots'; there are: .*punctuation:no_comma"):
        get_task("ifeval").score("x", json.dumps(row))
