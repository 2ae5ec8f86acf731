"""Thresholds for deferral rates, measured on the pair's own texts."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import PreTrainedTokenizerFast
from writers import PairWriter, questions

from collm.calibration import (
    ALWAYS,
    EVEN,
    NEVER,
    Measurement,
    calibrate,
    gate_log_odds,
    midpoints,
    missed,
    next_threshold,
    signals,
    store_table,
    trained_state,
    write_curve,
)
from collm.data.formatting import Formatter
from collm.decoding.choosing import answer_of
from collm.decoding.policies import ExpectedGain, to_log_odds, to_probability
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.llm import CollaborativeLM
from collm.llm.deferral import cut_for_rate, rate_of, settled
from collm.models.fake import FakeModel
from collm.models.head import DeferralHead
from collm.models.info import CalibrationRow, CalibrationTable, CheckpointInfo, Chosen, load_info, save_info
from collm.report.trace import Trace
from collm.sampling_params import Deferral, SamplingParams, Signal
from collm.types import Generation, Step
from collm.values import GREEDY

FLOATS = st.floats(width=32, allow_nan=False)


def run(llm: PairWriter | None = None, count: int = 40, **options: Any) -> CalibrationTable:
    return calibrate(llm or PairWriter(), "word_problems", questions(count), progress=False, **options)


@given(arrays(np.float32, st.integers(0, 12), elements=FLOATS))
def test_midpoints_tell_neighbours_apart(values: np.ndarray) -> None:
    found = midpoints(values)
    distinct = np.unique(values[np.isfinite(values)])[::-1]
    assert found.dtype == np.float32 and len(found) == max(0, len(distinct) - 1)
    for upper, middle, lower in zip(distinct, found, distinct[1:], strict=False):
        assert upper > middle >= lower


def test_midpoints_of_neighbouring_floats() -> None:
    upper = np.float32(17.0)
    lower = np.nextafter(upper, np.float32(0), dtype=np.float32)
    [middle] = midpoints(np.array([lower, upper, upper], dtype=np.float32))
    assert upper > middle >= lower


def test_rates_are_met_although_texts_shift_with_the_threshold() -> None:
    table = run(rounds=4)
    [own] = [row for row in table.rows if row.log_odds == EVEN]
    assert own.target_rate == own.achieved_rate and own.threshold == 0.5
    assert [row.target_rate for row in table.rows if row is not own] == [i / 10 for i in range(11)]
    assert table.rows == sorted(table.rows, key=lambda row: row.target_rate)
    # 12 of 17 or 18 tokens can be deferred at all: the rest of the text has a gate of about 0.
    reachable = [row for row in table.rows if row.target_rate < 0.65]
    for row in reachable:
        assert row.achieved_rate == pytest.approx(row.target_rate, abs=0.015)
    assert table.num_prompts == 40 and table.task == "word_problems" and table.metric == "exact_match"


def test_small_rates_are_met_as_well() -> None:
    """To defer nothing was near enough to 0.4 %, and 1.8 % to 1 %, without a word."""
    table = run(rounds=5, target_rates=(0.004, 0.01, 0.02))
    for row in table.rows[:3]:
        assert row.achieved_rate == pytest.approx(row.target_rate, rel=0.5) and math.isfinite(row.log_odds)
        assert cut_for_rate([table], row.target_rate) == row.log_odds
    assert not missed(table)


def test_a_small_rate_that_no_threshold_gives_is_told() -> None:
    """The gate has one value wherever it is above 0: then it is 6 % or nothing."""
    row = {"threshold": 1.0, "metric_value": 0.5}
    rows = [
        CalibrationRow(target_rate=0.01, achieved_rate=0.0, log_odds=NEVER, **row),
        CalibrationRow(target_rate=0.06, achieved_rate=0.06, log_odds=2.0, **row),
    ]
    table = CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=rows)
    assert [row.target_rate for row in missed(table)] == [0.01]
    with pytest.warns(UserWarning, match=r"0\.01 was not measured: the nearest that calibration achieved is 0\."):
        assert cut_for_rate([table], 0.01) == NEVER


def test_zero_is_never_and_one_is_always() -> None:
    table = run(rounds=1, target_rates=(0.0, 1.0))
    never, _, always = table.rows
    assert (never.log_odds, never.threshold, never.achieved_rate) == (NEVER, 1.0, 0.0)
    assert (always.log_odds, always.threshold, always.achieved_rate) == (ALWAYS, 0.0, 1.0)


def test_the_table_tells_what_decoding_at_its_thresholds_achieves() -> None:
    llm, examples = PairWriter(abstention=0.4), questions(25)
    table = calibrate(llm, "word_problems", examples, progress=False)
    for row in table.rows:
        at = SamplingParams(threshold=to_probability(row.log_odds))
        result = evaluate(llm, "word_problems", examples, at, progress=False)
        assert result.deferral_rate == row.achieved_rate
        assert result.value == row.metric_value and result.ci95 == row.ci95
        assert math.isinf(row.log_odds) or np.float32(row.log_odds) == row.log_odds
        assert to_log_odds(row.threshold) == pytest.approx(row.log_odds)


@pytest.mark.parametrize(("signal", "deferral"), [("gate", "threshold"), ("expected_gain", "expected_gain")])
def test_a_deferral_rate_just_works_once_calibrated(
    signal: Signal, deferral: Deferral, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The whole way, with the real decoders: the rate asked for later is the rate measured now."""
    vocab, eos = len(tiny_tokenizer), frozenset({2})
    base = FakeModel("base", vocab, num_assistants=2, agreement=0.3, eos_token_ids=eos)
    helpers = [FakeModel(name, vocab, agreement=0.3, abstention=0.2, eos_token_ids=eos) for name in ("x", "y")]
    llm = CollaborativeLM([base, *helpers], [Formatter(tiny_tokenizer)] * 3)
    examples, short = questions(10), SamplingParams(max_tokens=20)
    rates = (0, 0.2, 0.5, 1)
    table = calibrate(llm, "exact_match", examples, signal=signal, params=short, target_rates=rates, progress=False)
    llm.info.calibration.append(table)
    for row in table.rows:
        asked = replace(short, deferral=deferral, deferral_rate=row.target_rate)
        result = evaluate(llm, "exact_match", examples, asked, progress=False, batch_size=3)
        assert result.deferral_rate == row.achieved_rate
    asked_for = [row.achieved_rate for row in table.rows if row.log_odds != EVEN]
    assert asked_for[:3] == pytest.approx([0, 0.2, 0.5], abs=0.05)
    assert 0.9 < asked_for[3] < 1  # the base writes where both abstain, at 4 % of the places


@pytest.mark.parametrize(
    ("abstention", "rates", "asked_everywhere"),
    [(0.0, (0.1, 0.3), False), (0.0, (0.1, 0.6), False), (0.7, (0.1, 0.6), True), (0.0, (0.1, 1.0), True)],
    ids=str,
)
def test_nobody_is_asked_at_every_token_for_rates_that_need_it_not(
    abstention: float, rates: tuple[float, ...], asked_everywhere: bool, tmp_path: Path
) -> None:
    """The dearest text of all: it bounds the search only where no other threshold reaches a rate."""
    table = run(PairWriter(abstention=abstention), target_rates=rates, rounds=5, out=tmp_path)
    assert (tmp_path / "threshold_-inf.jsonl").exists() == asked_everywhere
    for row in table.rows:
        if row.target_rate < (0.65 if abstention == 0 else 0.15):
            assert row.achieved_rate == pytest.approx(row.target_rate, abs=0.015)
    whole = run(PairWriter(abstention=abstention), target_rates=(*rates, 1.0), rounds=5)
    unreached = {row.target_rate for row in missed(table)}
    assert unreached == {row.target_rate for row in missed(whole)} & set(rates)


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("rates", [(0.05, 0.3), (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)], ids=str)
def test_rates_beyond_a_tool_that_abstains_end_where_it_is_asked_everywhere(
    rates: tuple[float, ...], rounds: int, tmp_path: Path
) -> None:
    """At once, not by one deep threshold after the other; and any higher rate finds that cut in the table."""
    table = run(PairWriter(abstention=0.9), target_rates=rates, rounds=rounds, out=tmp_path)
    everywhere = run(PairWriter(abstention=0.9), target_rates=(1.0,), rounds=1).rows[-1]
    beyond = [row for row in table.rows if row.target_rate >= 0.1]
    assert {(row.log_odds, row.achieved_rate) for row in beyond[1:]} <= {(ALWAYS, everywhere.achieved_rate)}
    assert beyond[-1].log_odds == ALWAYS and len(list(tmp_path.glob("threshold_*.jsonl"))) <= 5
    with pytest.warns(UserWarning, match="was not measured"):
        assert cut_for_rate([table], 0.6) == ALWAYS


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_rate_that_few_rounds_do_not_reach_is_bounded_from_above(rounds: int) -> None:
    """So that what is told as the highest rate is one."""
    table = run(target_rates=(0.95,), rounds=rounds)
    assert [row.log_odds for row in table.rows if row.target_rate == 0.95] == [ALWAYS]


def test_above_all_that_was_measured_the_gates_of_the_last_text_tell(tmp_path: Path) -> None:
    gates = np.arange(1, 9, dtype=np.float32)
    result = evaluate(PairWriter(), "word_problems", questions(2), progress=False)
    never = Measurement(NEVER, replace(result, deferral_rate=0.0), gates, np.zeros(8, dtype=np.bool_))
    assert next_threshold(0.25, [never]) == 6.5  # two of the eight lie above
    some = Measurement(4.5, replace(result, deferral_rate=0.2), gates, np.zeros(8, dtype=np.bool_))
    assert next_threshold(0.6, [never, some]) == 2.5  # half of what is left, two of the four below
    everywhere = Measurement(ALWAYS, replace(result, deferral_rate=0.3), gates, np.ones(8, dtype=np.bool_))
    assert next_threshold(0.6, [never, some, everywhere]) is None


def test_the_second_choice_has_the_log_odds_at_which_it_is_asked() -> None:
    """Gate 0.3, 0.2, 0.5: the second assistant's token is deferred below log 0.7/0.3, the first's, after the second
    abstained, below log 0.2/0.3 only."""
    law = (0.3, 0.2, 0.5)
    steps = tuple(Step(7, author, -0.5, law, 7, author == 0) for author in (0, 1, 2))
    generation = Generation("abc", steps, ("a", "b", "c"), "length", 1, ("base", "x", "y"))
    gates, accepted = gate_log_odds([Trace(id="q", generation=generation, prompt="")])
    assert gates == pytest.approx([math.log(7 / 3), math.log(2 / 3), math.log(7 / 3)])
    assert accepted.tolist() == [False, True, True]


def test_the_second_choice_has_the_expected_gain_at_which_it_is_asked() -> None:
    """The gates above, and a base that is wrong with probability 0.1."""
    law, wrong = (0.3, 0.2, 0.5), math.log(0.1)
    base = answer_of(torch.tensor([0.9, 0.1]).log(), GREEDY, 0, tuple(math.log(p) for p in law))
    signal = ExpectedGain(-9.0).decide(base, GREEDY, 0).signal
    steps = tuple(Step(7, author, -0.5, law, 7, author == 0, signal=signal) for author in (0, 1, 2))
    generation = Generation("abc", steps, ("a", "b", "c"), "length", 1, ("base", "x", "y"))
    gains, accepted = signals([Trace(id="q", generation=generation, prompt="")], "expected_gain")
    assert gains == pytest.approx([math.log(share) + wrong for share in (0.7, 0.4, 0.7)], rel=1e-6)
    assert accepted.tolist() == [False, True, True]


def test_rates_out_of_reach_are_told() -> None:
    table = run(PairWriter(abstention=0.7), target_rates=(0.0, 0.1, 0.6, 1.0), rounds=3)
    assert [row.target_rate for row in missed(table)] == [0.6, 1.0]


def test_handed_back_deferrals_do_not_count_and_unreachable_rates_say_so() -> None:
    table = run(PairWriter(abstention=0.7), rounds=6)
    ceiling = max(row.achieved_rate for row in table.rows)
    assert 0.15 < ceiling < 0.45
    for row in table.rows:
        if 0 < row.target_rate < ceiling:
            assert row.achieved_rate == pytest.approx(row.target_rate, abs=0.015)
        if ceiling < row.target_rate < 1:
            assert row.achieved_rate == ceiling
    assert len({row.log_odds for row in table.rows if row.target_rate > ceiling + 0.1}) == 1


def test_more_rounds_come_nearer() -> None:
    def error(rounds: int) -> float:
        rows = run(PairWriter(abstention=0.5), rounds=rounds, tolerance=0).rows
        return max(abs(row.achieved_rate - row.target_rate) for row in rows if row.target_rate <= 0.3)

    assert error(6) < error(1)


def test_the_best_row_is_the_cheapest_of_equals() -> None:
    table = run(PairWriter(needed=0), target_rates=(0.3, 0.0, 1.0), rounds=1)
    assert {row.metric_value for row in table.rows} == {1.0}
    assert table.best is not None and table.rows[table.best].log_odds == NEVER
    helped = run(PairWriter(needed=5), rounds=2)
    assert helped.best is not None
    best = helped.rows[helped.best]
    assert best.metric_value == max(row.metric_value for row in helped.rows)
    assert best.achieved_rate == min(r.achieved_rate for r in helped.rows if r.metric_value == best.metric_value)


def test_a_stopped_calibration_goes_on(tmp_path: Path) -> None:
    whole = run(rounds=2)
    with pytest.raises(KeyboardInterrupt):
        run(PairWriter(fail_after=130), rounds=2, out=tmp_path)
    rest, unhurried = PairWriter(), PairWriter()
    assert run(rest, rounds=2, out=tmp_path) == whole
    run(unhurried, rounds=2)
    assert rest.written <= unhurried.written - 120
    idle = PairWriter()
    assert run(idle, rounds=2, out=tmp_path) == whole and idle.written == 0
    with pytest.raises(CollmError, match=r"params\.seed"):
        run(rounds=2, out=tmp_path, seed=1)


def test_a_pair_without_gate_is_refused() -> None:
    with pytest.raises(CollmError, match="no gate"):
        run(PairWriter(gated=False))


def test_the_table_survives_the_checkpoint(tmp_path: Path) -> None:
    save_info(tmp_path, CheckpointInfo())
    table = run(rounds=1)
    store_table(tmp_path, run(rounds=1, count=3))
    store_table(tmp_path, table)
    store_table(tmp_path, table.model_copy(update={"task": "other"}))
    info = load_info(tmp_path)
    assert info is not None
    assert [stored.task for stored in info.calibration] == ["word_problems", "other"]
    assert info.calibration[0] == table
    assert info.calibration[0].rows[0].log_odds == math.inf and info.calibration[0].rows[-1].log_odds == -math.inf
    assert (tmp_path / "curve.csv") in write_curve(table, tmp_path)


@pytest.mark.parametrize(
    ("given", "deferral", "rate", "task"),
    [
        ({}, "expected_gain", 0.2, "gsm8k"),
        ({"deferral_rate": 0.5}, "expected_gain", 0.5, "gsm8k"),
        ({"deferral_rate": 0.5, "task": "other"}, "expected_gain", 0.5, "other"),
        ({"threshold": 0.5}, "threshold", None, None),
        ({"deferral": "threshold"}, "threshold", None, None),
        ({"deferral": "never"}, "never", None, None),
        ({"deferral": "random", "deferral_rate": 0.4}, "random", 0.4, None),
    ],
    ids=str,
)
def test_a_choice_holds_where_nothing_else_is_said(
    given: dict[str, Any], deferral: str, rate: float | None, task: str | None
) -> None:
    chosen = Chosen(task="gsm8k", signal="expected_gain", deferral_rate=0.2)
    found = settled(SamplingParams(**given), chosen)
    assert (found.deferral, found.deferral_rate, found.task) == (deferral, rate, task)
    plain = settled(SamplingParams(**given), None)
    assert plain == replace(SamplingParams(**given), deferral=given.get("deferral", "threshold"))


def test_the_chosen_rate_finds_its_rows_cut_again() -> None:
    """Also where the wanted rate was missed: what was evaluated is what is written afterwards."""
    table = run(rounds=1)
    for one in table.rows:
        assert cut_for_rate([table], rate_of(one)) == pytest.approx(one.log_odds)
    [own] = [one.model_copy(update={"target_rate": 0.93}) for one in table.rows if one.log_odds == EVEN]
    missed_by_far = table.model_copy(update={"rows": [table.rows[0], own, table.rows[-1]]})
    assert cut_for_rate([missed_by_far], rate_of(own)) == EVEN


def test_a_choice_is_kept_and_follows_a_new_calibration(tmp_path: Path) -> None:
    save_info(tmp_path, CheckpointInfo())
    table = run(rounds=1)
    store_table(tmp_path, table)
    info = load_info(tmp_path)
    assert info is not None and info.chosen is None
    store_table(tmp_path, table, chosen=0.1)
    store_table(tmp_path, table.model_copy(update={"task": "other"}))
    info = load_info(tmp_path)
    assert info is not None and info.chosen == Chosen(task="word_problems", signal="gate", deferral_rate=0.1)
    store_table(tmp_path, run(rounds=1, count=7).model_copy(update={"best": 10}))
    info = load_info(tmp_path)
    assert info is not None and info.chosen is not None and info.chosen.deferral_rate == 1.0


def test_python_writes_by_the_choice(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    formatters = [Formatter(tiny_tokenizer)] * 2
    size = len(tiny_tokenizer)
    models = [FakeModel("base", size, num_assistants=1), FakeModel("expert", size)]
    chosen = Chosen(task="t", signal="gate", deferral_rate=1.0)
    llm = CollaborativeLM(models, formatters, CheckpointInfo(chosen=chosen))
    assert llm.generate("Once", max_tokens=9).deferral_rate == 1.0
    assert llm.generate("Once", max_tokens=9, deferral="never").deferral_rate == 0.0
    result = evaluate(llm, "word_problems", questions(2), SamplingParams(max_tokens=9), progress=False)
    assert result.settings["params.deferral_rate"] == 1.0 and result.deferral_rate == 1.0


def test_a_plain_model_has_no_place_for_a_table(tmp_path: Path) -> None:
    with pytest.raises(CollmError, match=r"no collm\.json"):
        store_table(tmp_path, run(rounds=1, count=2))


def test_tables_of_two_processes_are_both_stored(tmp_path: Path) -> None:
    """Reading, changing and writing at once would lose one."""
    save_info(tmp_path, CheckpointInfo())
    table = run(rounds=1, count=3)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: store_table(tmp_path, table.model_copy(update={"task": f"t{n}"})), range(8)))
    info = load_info(tmp_path)
    assert info is not None and {each.task for each in info.calibration} == {f"t{n}" for n in range(8)}


def test_thresholds_of_a_gate_that_was_replaced_meanwhile_are_not_stored(tmp_path: Path) -> None:
    save_info(tmp_path, CheckpointInfo())
    DeferralHead(4, 1).save(tmp_path)
    trained, table = trained_state(tmp_path), run(rounds=1, count=3)
    store_table(tmp_path, table, trained=trained)
    assert trained_state(tmp_path) == trained  # a table changes nothing
    head = DeferralHead(4, 1)
    head.bias.data += 1
    head.save(tmp_path)
    with pytest.raises(CollmError, match="trained anew while it was calibrated"):
        store_table(tmp_path, table, trained=trained)
