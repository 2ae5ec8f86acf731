"""Runs that are killed at any byte, and gone on with after anything was changed, are right or refused."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from writers import PairWriter, questions

from collm.data.examples import Example
from collm.data.formatting import Formatter, PromptFormat
from collm.data.scores import load_scores, partial_path
from collm.data.scoring import score
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.evaluation.result import EvalResult, result_path
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams

RUNS: list[dict[str, Any]] = [
    {},
    {"length": 5},
    {"params": SamplingParams(seed=1)},
    {"params": SamplingParams(threshold=0.9)},
    {"count": 5},
    {"alone": "base"},
]
"""Ways in which a second start may differ from the first."""


def answers(out: Path | None, *, fail_after: int | None = None, **run: Any) -> EvalResult:
    """The system is told apart by its length, as real ones are by their weights."""
    length = run.get("length", 7)
    return evaluate(
        PairWriter(length=length, fail_after=fail_after),
        "exact_match",
        questions(run.get("count", 4)),
        run.get("params", SamplingParams()),
        alone=run.get("alone"),
        out=out,
        identity={"length": length},
        batch_size=2,
        progress=False,
    )


FRESH = {number: answers(None, **run) for number, run in enumerate(RUNS)}


def same(a: EvalResult, b: EvalResult) -> bool:
    return all(
        getattr(a, name) == getattr(b, name) for name in ("value", "ids", "scores", "tokens", "written_by", "settings")
    )


@settings(max_examples=60, deadline=None)
@given(
    first=st.sampled_from(range(len(RUNS))),
    second=st.sampled_from(range(len(RUNS))),
    fail_after=st.none() | st.integers(0, 4),
    kept=st.floats(0, 1),
    result=st.booleans(),
)
def test_an_evaluation(first: int, second: int, fail_after: int | None, kept: float, result: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run-0.1"
        with suppress(KeyboardInterrupt):
            answers(out, fail_after=fail_after, **RUNS[first])
        whole = out.read_bytes()
        before = whole[: round(kept * len(whole))]  # killed at any byte
        out.write_bytes(before)
        if not result:
            result_path(out).unlink(missing_ok=True)
        try:
            found = answers(out, **RUNS[second])
        except CollmError as error:
            assert first != second and "other settings" in str(error)
            assert out.read_bytes() in (before, before[: before.rfind(b"\n") + 1])  # half a line is nobody's
            return
        assert same(found, FRESH[second])
        assert sorted(trace.id for trace in read_traces(out)) == sorted(found.ids)
        assert same(EvalResult.load(result_path(out)), FRESH[second])


TEXTS = [Example(str(n), prompt=f"{n} + 30 =" * (1 + n % 3), completion=f" {n + 30}") for n in range(6)]
OTHER = [*TEXTS[:-1], Example("5", prompt="5 + 30 =", completion=" 36")]
SCORINGS: list[dict[str, Any]] = [
    {},
    {"seed": 1},
    {"dtype": "bfloat16"},
    {"system": "Add."},
    {"texts": OTHER},
    {"max_length": 12},
]


def scores(out: Path, stop_after: int | None = None, **run: Any) -> list[list[float]]:
    model = make_model(seed=run.get("seed", 0), hidden_size=16, intermediate_size=16)
    model = model.bfloat16() if "dtype" in run else model
    formatter = Formatter(make_tokenizer(), PromptFormat(system_prompt=run.get("system")))
    batches = [0]

    def stopping(*_: Any) -> None:
        batches[0] += 1
        if stop_after is not None and batches[0] > stop_after:
            raise KeyboardInterrupt

    model.get_decoder().register_forward_pre_hook(stopping)
    options = {"batch_tokens": 40, "max_length": run.get("max_length"), "progress": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.data.scoring.check_project", lambda _: None)  # its passes are no batches
        score(run.get("texts", TEXTS), model, formatter, out, **options)
    found: list[list[float]] = load_scores(out)["log_prob"][:]
    return found


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[float]]]:
    folder = tmp_path_factory.mktemp("scored")
    return [scores(folder / str(number), **run) for number, run in enumerate(SCORINGS)]


@settings(max_examples=20, deadline=None)
@given(
    first=st.sampled_from(range(len(SCORINGS))),
    second=st.sampled_from(range(len(SCORINGS))),
    stop_after=st.none() | st.integers(0, 3),
    kept=st.floats(0, 1),
)
def test_scoring(scored: list[list[list[float]]], first: int, second: int, stop_after: int | None, kept: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores"
        try:
            scores(out, stop_after, **SCORINGS[first])
        except KeyboardInterrupt:
            left = partial_path(out)
            left.write_bytes(left.read_bytes()[: round(kept * left.stat().st_size)])
        try:
            found = scores(out, **SCORINGS[second])
        except CollmError as error:
            assert first != second and "is stale" in str(error)
            return
        assert found == scored[second]
        assert first == second or stop_after is not None
