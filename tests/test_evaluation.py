"""Answers, figures and the runs that make them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from writers import PairWriter, questions

from collm.data.examples import Example
from collm.decoding.policies import Threshold
from collm.errors import CollmError
from collm.evaluation import result as result_module
from collm.evaluation.comparison import compare, compare_all, rival_of
from collm.evaluation.evaluate import (
    default_name,
    evaluate,
    evaluate_with_traces,
    example_seed,
    near_duplicates,
)
from collm.evaluation.result import EvalResult, result_path
from collm.evaluation.shipped import get_task
from collm.evaluation.stats import bootstrap_ci, holm, paired_difference, sign_flip_test
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams

# ---- statistics


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(300):
        scores = (rng.random(100) < 0.3).astype(float).tolist()
        low, high = bootstrap_ci(scores, resamples=500, seed=seed)
        hits += low <= 0.3 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_interval_of_unanimous_scores_is_not_a_point() -> None:
    low, high = bootstrap_ci([0.0] * 50)
    assert low == 0 and 0.05 < high < 0.09  # 1 - 0.025 ** (1 / 50)
    assert bootstrap_ci([1.0] * 50) == pytest.approx((1 - high, 1))
    # Graded ones, too, and a single question or group of near-duplicates: others may be 0, or 1.
    share = 1 - 0.025 ** (1 / 5)
    assert bootstrap_ci([0.5] * 5) == pytest.approx((0.5 * (1 - share), 0.5 * (1 + share)))
    assert bootstrap_ci([1.0, 0.0, 0.0, 1.0], groups=["a", "a", "b", "b"])[0] == pytest.approx(0.5 * 0.025**0.5)
    assert bootstrap_ci([0.4]) == pytest.approx((0.4 * 0.025, 0.4 * 0.025 + 0.975))
    assert bootstrap_ci([35.0] * 5) == (35.0, 35.0)  # on a scale of its own


@pytest.mark.parametrize("count", [1, 5, 6, 40])
def test_the_interval_of_unanimous_differences_is_not_a_point(count: int) -> None:
    """It holds 0 where the exact test finds nothing at 5 %."""
    found = paired_difference([0.0] * count, [1.0] * count)
    assert found.difference == found.ci95[1] == 1 and (found.ci95[0] <= 0) is (found.p_value >= 0.05)
    same = paired_difference([1.0] * count, [1.0] * count)
    room = 1 - 0.025 ** (1 / count)
    assert same.p_value == 1 and same.ci95 == pytest.approx((-room, room))
    other = paired_difference([1.0] * count, [1.0] * count, groups=["one"] * count)
    assert other.ci95 == pytest.approx((-0.975, 0.975))


def test_the_interval_is_reproducible_and_wants_scores() -> None:
    scores = [0.0, 1.0, 1.0] * 20
    assert bootstrap_ci(scores, seed=3) == bootstrap_ci(scores, seed=3)
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_ci([])


@pytest.mark.parametrize("n", range(0, 9))
def test_mcnemar_equals_enumeration(n: int) -> None:
    """Under the null every discordant example falls to either side alike: count all 2^n outcomes."""
    for b in range(n + 1):
        extreme = sum(abs(2 * bin(word).count("1") - n) >= abs(2 * b - n) for word in range(2**n))
        assert sign_flip_test([-1] * b + [1] * (n - b) + [0] * 3) == pytest.approx(extreme / 2**n)
    assert sign_flip_test([1] * 900) < 1e-250


@given(st.lists(st.integers(-4, 4), max_size=8))
def test_sums_of_groups_are_tested_by_all_choices_of_signs(sums: list[int]) -> None:
    """As many answers are right more often by the one system in a group of questions as the sum says."""
    choices = [sum(s * d for s, d in zip(signs, sums, strict=True)) for signs in product((-1, 1), repeat=len(sums))]
    exact = sum(abs(choice) >= abs(sum(sums)) for choice in choices) / len(choices)
    assert sign_flip_test(sums) == pytest.approx(exact)
    if any(sums):
        assert sign_flip_test([d / 3 for d in sums]) == pytest.approx(exact, abs=0.03)  # graded: drawn, not counted


def test_few_differing_groups_are_no_proof() -> None:
    """Twenty answers turned right, all of them in three groups: no more than three coins that fell alike."""
    groups = [str(i // 10) for i in range(200)]
    better = [float(i < 30 and i % 3 > 0) for i in range(200)]
    found = paired_difference([0.0] * 200, better, groups=groups)
    assert found.p_value == 0.25 and found.difference == pytest.approx(0.1)


def test_the_paired_test_rejects_no_more_often_than_it_says() -> None:
    rng = np.random.default_rng(3)
    rejected = 0
    for _ in range(400):
        differing = rng.integers(0, 2, size=8) * 2.0 - 1
        rejected += sign_flip_test(differing) < 0.05
    assert rejected <= 0.07 * 400


def test_paired_bootstrap_sees_what_unpaired_scores_hide() -> None:
    rng = np.random.default_rng(1)
    first = (rng.random(200) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first == 0)[:12]] = 1  # 12 better, none worse
    found = paired_difference(first.tolist(), second.tolist())
    assert found.difference == pytest.approx(0.06)
    assert 0 < found.ci95[0] < 0.06 < found.ci95[1] and found.p_value < 0.001
    swapped = paired_difference(second.tolist(), first.tolist())
    assert swapped.difference == pytest.approx(-0.06) and swapped.p_value < 0.001
    same = paired_difference(first.tolist(), first.tolist())
    assert (same.difference, same.p_value) == (0.0, 1.0) and same.ci95 == pytest.approx((-0.0183, 0.0183), abs=1e-4)


def test_paired_scores_must_match() -> None:
    for first, second in (([1.0], [1.0, 0.0]), ([], [])):
        with pytest.raises(ValueError, match="same examples"):
            paired_difference(first, second)


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=20),
    st.integers(1, 4),
)
def test_repeating_every_example_tells_nothing_new(pairs: list[tuple[float, float]], copies: int) -> None:
    """Resampled by groups, near-duplicates count as one: neither the interval nor the p-value shrinks."""
    first, second = ([pair[i] for pair in pairs] for i in range(2))
    groups = [str(i) for i in range(len(pairs))] * copies
    options = {"resamples": 200, "seed": 1}
    once = bootstrap_ci(first, **options)  # type: ignore[arg-type]
    assert bootstrap_ci(first * copies, groups=groups, **options) == pytest.approx(once)  # type: ignore[arg-type]
    paired = paired_difference(first, second, **options)  # type: ignore[arg-type]
    again = paired_difference(first * copies, second * copies, groups=groups, **options)  # type: ignore[arg-type]
    assert again.ci95 == pytest.approx(paired.ci95)
    assert abs(again.p_value - paired.p_value) < 0.05  # sums of several are rounded differently around 0


def test_the_interval_over_groups_covers_the_truth_where_that_over_examples_does_not() -> None:
    """20 groups of 10 copies: 95 % intervals hold the truth in nearly 95 % of trials only if groups are resampled."""
    rng = np.random.default_rng(2)
    groups = [str(i // 10) for i in range(200)]
    hits = [0, 0]
    for seed in range(200):
        scores = np.repeat(rng.random(20) < 0.4, 10).astype(float).tolist()
        for way, of in enumerate((None, groups)):
            low, high = bootstrap_ci(scores, groups=of, resamples=400, seed=seed)
            hits[way] += low <= 0.4 <= high
    assert hits[0] < 0.65 * 200 and hits[1] > 0.87 * 200


def test_groups_are_one_for_each_score() -> None:
    with pytest.raises(ValueError, match="groups of 1"):
        bootstrap_ci([0.0, 1.0], groups=["a"])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    corrected = holm(p_values)
    for alpha in (0.01, 0.05, 0.3):
        rejected: set[int] = set()
        for index in sorted(range(len(p_values)), key=lambda i: p_values[i]):
            if p_values[index] * (len(p_values) - len(rejected)) > alpha:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(corrected) if p <= alpha} == rejected


# ---- runs

HALF = SamplingParams(threshold=0.5)


def run(llm: PairWriter | None = None, count: int = 20, params: SamplingParams = HALF, **options: object) -> EvalResult:
    settings = {"batch_size": 4, "progress": False, **options}
    return evaluate(llm or PairWriter(), "word_problems", questions(count), params, **settings)  # type: ignore[arg-type]


def test_the_figures_are_those_of_the_texts(tmp_path: Path) -> None:
    result, traces = evaluate_with_traces(
        PairWriter(abstention=0.3), "word_problems", questions(30), HALF, out=tmp_path / "r.jsonl", progress=False
    )
    steps = [step for trace in traces for step in trace.generation.steps]
    assert result.num_examples == 30 and result.tokens == len(steps)
    assert result.value == pytest.approx(sum(trace.score or 0 for trace in traces) / 30)
    assert 0 < result.value < 1 and result.ci95[0] < result.value < result.ci95[1]
    assert result.deferral_rate == sum(step.author == 1 for step in steps) / len(steps)
    assert result.written_by == {"base": sum(s.author == 0 for s in steps), "helper": sum(s.author == 1 for s in steps)}
    assert result.changed_tokens == sum(step.changed for step in steps) > 0
    assert result.changed_share == result.changed_tokens / len(steps)
    assert result.abstained == sum(step.abstained for step in steps) > 0
    assert result.forward_passes["base"] == len(steps)
    assert result.forward_passes["helper"] == result.abstained + result.written_by["helper"]
    assert result.finish_reasons == {"stop": 30} and result.no_answer == 0
    assert result.versions["torch"] and result.versions["math-verify"] and result.seed == 0
    written = {trace.id: trace for trace in read_traces(tmp_path / "r.jsonl")}
    assert [written[trace.id] for trace in traces] == [replace(t, seconds=round(t.seconds, 4)) for t in traces]
    assert [trace.id for trace in traces] == [f"q{i}" for i in range(30)]


def test_seconds_are_those_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judging takes a second a text, by a clock of our own; writing none."""
    clock = [0.0]
    monkeypatch.setattr("collm.evaluation.evaluate.time.perf_counter", lambda: clock[0])

    def slowly(answer: str | None, gold: str) -> dict[str, float]:
        clock[0] += 1
        return {"exact_match": float(answer == gold)}

    task = replace(get_task("gsm8k"), judge=slowly)
    result = evaluate(PairWriter(), task, questions(4), HALF, progress=False)
    assert clock[0] >= 4 and result.seconds == 0


def test_a_model_alone_and_a_policy_can_be_evaluated(tmp_path: Path) -> None:
    assert run(alone="helper").deferral_rate == 1.0
    assert run(alone=0, out=tmp_path / "base.jsonl").deferral_rate == 0.0
    assert run(policy=Threshold(math.inf), params=SamplingParams(threshold=0.0)).deferral_rate == 0.0
    with pytest.raises(CollmError, match="alone: 0 there, 1 now"):
        run(alone=1, out=tmp_path / "base.jsonl")


def test_the_result_is_written_beside_the_traces_and_reads_back(tmp_path: Path) -> None:
    result = run(out=tmp_path / "run.jsonl", name="pair")
    assert result_path(tmp_path / "run.jsonl") == tmp_path / "run.json"
    loaded = EvalResult.load(tmp_path / "run.json")
    assert replace(loaded, seconds=0) == replace(result, seconds=0)
    assert "pair: exact match" in loaded.summary() and json.dumps(loaded.to_dict())
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(CollmError, match=r"bad\.json"):
        EvalResult.load(tmp_path / "bad.json")


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = run()
    stopped = PairWriter(fail_after=9)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, out=tmp_path / "run.jsonl")
    with (tmp_path / "run.jsonl").open("ab") as file:
        file.write(b'{"id": "q8", "text": "torn by kill -9')
    rest = PairWriter()
    resumed = run(rest, out=tmp_path / "run.jsonl")
    assert rest.written == 20 - 9  # every finished text was on the disk
    assert resumed.scores == whole.scores and resumed.tokens == whole.tokens and resumed.ids == whole.ids
    again = PairWriter()
    assert run(again, out=tmp_path / "run.jsonl").scores == whole.scores
    assert again.written == 0


def test_a_finished_run_told_again_keeps_the_commit_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_module, "commit", lambda: "then")
    run(out=tmp_path / "run.jsonl")
    monkeypatch.setattr(result_module, "commit", lambda: "now")
    assert run(out=tmp_path / "run.jsonl").commit == EvalResult.load(tmp_path / "run.json").commit == "then"
    lines = (tmp_path / "run.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run.jsonl").write_bytes(b"".join(lines[:-1]))
    assert run(out=tmp_path / "run.jsonl").commit == "now"


def test_systems_that_other_golds_judged_are_not_compared() -> None:
    rows = [replace(row, fields={"answer": "99"}) if row.id == "q3" else row for row in questions(20)]
    task = get_task("gsm8k")
    first, other = (evaluate(PairWriter(), task, each, HALF, progress=False) for each in (questions(20), rows))
    assert first.settings["examples"] == other.settings["examples"]
    with pytest.raises(CollmError, match="different gold answers"):
        compare(first, other)
    compare(replace(first, golds=""), other)  # an older result tells of none


def test_no_result_of_an_earlier_run_stands_beside_a_stopped_one(tmp_path: Path) -> None:
    """Its texts were deleted to ask another system; a makefile would take the figures that are there for its own."""
    run(out=tmp_path / "run.jsonl", name="one")
    (tmp_path / "run.jsonl").unlink()
    other = SamplingParams(threshold=0.6)
    with pytest.raises(KeyboardInterrupt):
        run(PairWriter(fail_after=9), params=other, out=tmp_path / "run.jsonl", name="other")
    assert not (tmp_path / "run.json").exists()
    run(params=other, out=tmp_path / "run.jsonl", name="other")
    assert EvalResult.load(tmp_path / "run.json").name == "other"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"params": SamplingParams(threshold=0.6)}, "params.threshold: 0.5 there, 0.6 now"),
        ({"params": SamplingParams(threshold=0.5, seed=1)}, "params.seed"),
        ({"count": 19}, "examples"),
        ({"identity": {"checkpoint": "other"}}, "identity"),
    ],
)
def test_traces_of_another_run_are_refused(tmp_path: Path, options: dict[str, object], told: str) -> None:
    run(out=tmp_path / "run.jsonl")
    before = (tmp_path / "run.jsonl").read_bytes()
    with pytest.raises(CollmError, match=re.escape(told)):
        run(out=tmp_path / "run.jsonl", **options)
    assert (tmp_path / "run.jsonl").read_bytes() == before


def test_answers_that_other_golds_judged_are_refused(tmp_path: Path) -> None:
    """The text of a question is what it was: only the field with its answer was put right."""
    run(out=tmp_path / "run.jsonl")
    rows = [replace(row, fields={"answer": "99"}) if row.id == "q3" else row for row in questions(20)]
    gold = get_task("word_problems").gold
    told = f"q3: {gold(questions(20)[3])!r} there, {gold(rows[3])!r} now"
    with pytest.raises(CollmError, match=re.escape(told)):
        evaluate(PairWriter(), "word_problems", rows, HALF, out=tmp_path / "run.jsonl", progress=False)


def test_a_foreign_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "mine"}\n')
    with pytest.raises(CollmError, match="not written by an evaluation"):
        run(out=tmp_path / "data.jsonl")
    with pytest.raises(CollmError, match="jsonl"):
        run(out=tmp_path / "x.json")
    assert (tmp_path / "data.jsonl").read_text() == '{"prompt": "mine"}\n'


def test_every_example_has_a_seed_of_its_own_whatever_the_batch() -> None:
    seeds = {}
    for batch_size in (1, 7):
        llm = PairWriter()
        run(llm, batch_size=batch_size, params=replace(HALF, seed=5))
        seeds[batch_size] = llm.seeds
    assert seeds[1] == [example_seed(5, f"q{i}") for i in range(20)]
    assert sorted(seeds[7]) == sorted(seeds[1])
    assert len(set(seeds[1])) == 20
    assert example_seed(6, "q0") != example_seed(5, "q0")


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run.jsonl"
    for examples, told in (
        ([], "no examples"),
        (questions(2) * 2, "same id"),
        ([Example("a", prompt="q")], "no gold answer"),
    ):
        with pytest.raises(CollmError, match=told):
            evaluate(PairWriter(), "gsm8k", examples, out=out, progress=False)
    assert not out.exists()


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    run(progress=True, name="my pair")
    captured = capsys.readouterr()
    assert captured.out == "" and "my pair" in captured.err and "20/20" in captured.err


def test_comparison_is_paired() -> None:
    weak, strong = run(PairWriter(needed=8), count=60, name="weak"), run(PairWriter(needed=5), count=60, name="strong")
    found = compare(weak, strong)
    assert (found.first, found.second, found.only_first) == ("weak", "strong", 0)
    assert found.only_second == sum(strong.scores) - sum(weak.scores) > 5
    assert found.difference == pytest.approx(strong.value - weak.value)
    assert found.p_value == pytest.approx(2 / 2**found.only_second) and found.ci95[0] > 0
    assert found.test == "exact McNemar"
    assert "strong against weak" in found.summary()
    shuffled = replace(strong, ids=strong.ids[::-1], scores=strong.scores[::-1])
    assert compare(weak, shuffled) == found
    graded = replace(strong, scores=tuple(score / 2 for score in strong.scores))
    assert compare(weak, graded).test == "sign-flip"


def test_groups_of_near_duplicates_widen_intervals() -> None:
    def of(needed: int, grouped: bool, name: str) -> EvalResult:
        examples = questions(40)
        if grouped:
            examples = [replace(e, fields={**e.fields, "group": i // 8}) for i, e in enumerate(examples)]
        return evaluate(PairWriter(needed=needed), "word_problems", examples, HALF, name=name, progress=False)

    weak, strong, plain = of(8, True, "weak"), of(5, True, "strong"), of(5, False, "strong")
    assert strong.groups[:9] == ("0",) * 8 + ("1",) and strong.num_groups == 5
    assert plain.groups == () and plain.num_groups is None
    assert strong.ci95 == bootstrap_ci(strong.scores, groups=strong.groups) != plain.ci95
    found = compare(weak, strong)
    assert found.num_groups == 5 and found.test == "sign-flip"
    assert found.p_value == 2 / 2**5  # one more right in each of five groups, at least
    assert "5 groups" in found.summary() and "5 groups" in strong.summary()
    assert compare(weak, plain) == found  # an older result, made before the file told of groups
    assert compare(replace(weak, groups=()), plain).p_value < found.p_value
    with pytest.raises(CollmError, match="different groups"):
        compare(weak, replace(strong, groups=strong.groups[::-1]))
    with pytest.raises(CollmError, match="group is the name"):
        evaluate(PairWriter(), "word_problems", [replace(questions(1)[0], fields={"answer": "1", "group": []})])


def test_further_metrics_have_intervals_over_groups() -> None:
    task = replace(
        get_task("word_problems"),
        metrics=("exact_match", "odd"),
        judge=lambda answer, gold: {"exact_match": float(answer == gold), "odd": float(int(answer or 0) % 2)},
    )
    examples = [replace(e, fields={**e.fields, "group": str(i // 8)}) for i, e in enumerate(questions(40))]
    result = evaluate(PairWriter(), task, examples, HALF, progress=False)
    plain = evaluate(PairWriter(), task, questions(40), HALF, progress=False)
    assert result.metrics == plain.metrics and 0 < result.metrics["odd"] < 1
    assert result.metrics_ci95 != plain.metrics_ci95


def test_an_example_without_a_group_is_a_group_of_its_own() -> None:
    examples = [
        replace(e, fields={**e.fields, **({"group": "q"} if i < 2 else {})}) for i, e in enumerate(questions(4))
    ]
    assert len(set(near_duplicates(examples))) == 3


def test_several_comparisons_are_corrected_for_their_number() -> None:
    rival, *others = (run(PairWriter(needed=n), count=60, name=str(n)) for n in (8, 7, 6, 5))
    found = compare_all(rival, others)
    assert [c.holm_p for c in found] == holm([c.p_value for c in found])
    assert all("Holm-corrected" in c.summary() for c in found)
    [alone] = compare_all(rival, others[:1])
    assert alone.holm_p is None and alone == compare(rival, others[0]) and "Holm" not in alone.summary()


def test_the_rival_is_named_without_doubt() -> None:
    first, second = run(name="a"), run(name="b")
    assert rival_of([first, second], None) is first and rival_of([first, second], "b") is second
    with pytest.raises(ValueError, match="no system 'c'; there are 'a', 'b'"):
        rival_of([first, second], "c")
    with pytest.raises(ValueError, match="more than one system 'a'"):
        rival_of([first, first], "a")


def test_cost_is_passes_per_token(tmp_path: Path) -> None:
    result = run(PairWriter(abstention=0.3), out=tmp_path / "run.jsonl")
    assert result.passes_per_token == {name: n / result.tokens for name, n in result.forward_passes.items()}
    assert json.loads((tmp_path / "run.json").read_text())["passes_per_token"] == result.passes_per_token
    assert replace(result, tokens=0).passes_per_token == {}


def test_results_from_before_a_field_was_added_are_read(tmp_path: Path) -> None:
    row = run(out=tmp_path / "run.jsonl").to_dict()
    for name in ("groups", "metrics", "metrics_ci95", "passes_per_token"):
        del row[name]
    (tmp_path / "old.json").write_text(json.dumps(row))
    assert EvalResult.load(tmp_path / "old.json") == EvalResult.load(tmp_path / "run.json")


def test_only_like_can_be_compared() -> None:
    first = run()
    for other in (run(count=19), replace(first, task="gsm8k"), replace(first, task_version=first.task_version + 1)):
        with pytest.raises(CollmError, match="different"):
            compare(first, other)
    assert math.isclose(compare(first, first).p_value, 1.0)


def test_ways_of_decoding_have_names_of_their_own() -> None:
    models = ("base", "calculator")
    names = [
        default_name(models, SamplingParams(), None),
        default_name(models, SamplingParams(deferral="confident"), None),
        default_name(models, SamplingParams(), "calculator"),
        default_name(models, SamplingParams(), 0),
        default_name(models, SamplingParams(deferral_rate=0.1), None),
        default_name(models, SamplingParams(threshold=0.9), None),
        default_name(models, SamplingParams(deferral="random", deferral_rate=0.1), None),
    ]
    both = "base + calculator"
    assert names[:4] == [both, f"{both}, confident", "calculator", "base"]
    assert names[4:] == [f"{both}, rate 0.1", f"{both}, threshold 0.9", f"{both}, random, rate 0.1"]
