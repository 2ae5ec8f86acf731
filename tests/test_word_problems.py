"""The word problems' smaller scripts: thresholds read off gold text."""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from collm.data.examples import Example
from collm.data.formatting import Formatter
from collm.decoding.policies import log_odds
from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models.fake import FakeModel
from collm.models.tools import Calculator
from collm.values import Answer, Query

STUDY = Path(__file__).parent.parent / "recipes" / "word_problems"


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STUDY))
        yield {name: importlib.import_module(name) for name in ("teacher_forced",)}


def test_gold_gates_are_those_of_plain_passes_and_count_where_somebody_answers(
    study: dict[str, ModuleType], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base, calculator = FakeModel("base", len(tiny_tokenizer), num_assistants=1), Calculator(tiny_tokenizer)
    formatter = Formatter(tiny_tokenizer)
    llm = CollaborativeLM([base, calculator], [formatter] * 2)
    turns = [("How many?", "12 + 30 = 42\n#### 42"), ("And now?", "5 * 3 = 15")]
    examples = [
        Example(id=str(i), messages=({"role": "user", "content": q}, {"role": "assistant", "content": a}))
        for i, (q, a) in enumerate(turns)
    ]
    expected = []
    for example in examples:
        item = formatter.encode(example)
        for at in np.flatnonzero(item.labelled):
            prediction = base.answer(item.token_ids[:at])
            assert isinstance(prediction, Answer) and prediction.log_gate is not None
            [[said]] = calculator.predict([Query.of(item.token_ids[:at], model=1)])
            expected.append(-np.inf if said is None else log_odds(prediction.log_gate))
    found = study["teacher_forced"].gold_log_odds(llm, examples)
    np.testing.assert_allclose(found, expected)
    assert 4 <= np.isfinite(found).sum() < len(found)  # the digits of both results at least


def test_a_threshold_for_a_rate_defers_that_share(study: dict[str, ModuleType]) -> None:
    values = np.append(np.random.default_rng(0).normal(size=80), np.full(20, -np.inf))
    for rate in (0.1, 0.5, 0.75):
        assert (values > study["teacher_forced"].threshold_for(rate, values)).mean() == pytest.approx(rate, abs=0.011)
    with pytest.raises(CollmError, match="same value"):
        study["teacher_forced"].threshold_for(0.1, np.zeros(5))


def test_a_turned_split_tests_on_what_was_training_data() -> None:
    split_of = runpy.run_path(str(STUDY / "prepare.py"))["split_of"]
    groups = [[f"problem {i}"] for i in range(2000)]
    turned: dict[str, list[str]] = {}
    for group in groups:
        turned.setdefault(split_of(group, 0.33), []).append(split_of(group))
    assert {name: len(old) / len(groups) for name, old in turned.items()} == pytest.approx(
        {"train": 0.70, "calibration": 0.08, "test_a": 0.11, "test_b": 0.11}, abs=0.03
    )
    assert {old for name, olds in turned.items() if name != "train" for old in olds} == {"train"}
