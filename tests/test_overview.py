"""The page about several evaluations: all that was asked for is on it, its numbers are those of the results, and
nothing a model wrote can break it."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import NASTY, PageReader, table
from test_tokens import TRACES
from writers import PairWriter, questions

from collm.errors import CollmError
from collm.evaluation import written as written_module
from collm.evaluation.comparison import compare, compare_all
from collm.evaluation.curves import common_name, cost, family, series
from collm.evaluation.evaluate import evaluate
from collm.evaluation.overview import Overview, common_settings, overview_html, read_results, system_row, write_overview
from collm.evaluation.result import EvalResult, trace_path
from collm.evaluation.written import Written, choose, read_written
from collm.report.chart import Chart, Point, Series, chart_svg, look
from collm.report.histogram import histogram
from collm.report.plots import curve_chart
from collm.report.tokens import token_figures
from collm.report.trace import Trace, append_trace, read_traces
from collm.sampling_params import SamplingParams

QUESTIONS = questions(24)


def system(folder: Path, name: str, threshold: float = 0.5, **options: Any) -> Path:
    """A result file with its traces."""
    writer = PairWriter(**{key: options.pop(key) for key in ("needed", "gated", "abstention") if key in options})
    settings: dict[str, Any] = {
        "name": name,
        "identity": {"checkpoint": name.partition(",")[0]},
        "out": folder / f"{name.replace(' ', '_')}.jsonl",
        "progress": False,
    }
    examples = options.pop("examples", QUESTIONS)
    evaluate(writer, "word_problems", examples, SamplingParams(threshold=threshold), **settings, **options)
    return folder / f"{name.replace(' ', '_')}.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("results")
    return [
        system(folder, "alone", alone="base"),
        *(system(folder, f"pair, {rate}", rate) for rate in (0.9, 0.5, 0.2)),
        system(folder, "handing back", abstention=0.4),
        system(folder, "no gate", gated=False),
    ]


def overview(files: list[Path], **changes: Any) -> Overview:
    results = read_results(files)
    found = tuple(read_written(path, result) for path, result in zip(files, results, strict=True))
    return Overview(**{"title": "A page", "written": found, "rival": results[0], **changes})


class Tables(PageReader):
    """The numbers of a page: for every table, by its class, rows of what `<data>` elements hold."""

    def __init__(self, page: str) -> None:
        self.rows: dict[str, list[list[float]]] = {}
        self.table = ""
        super().__init__(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        super().handle_starttag(tag, attrs)
        if tag == "table":
            self.table = dict(attrs).get("class") or ""
        elif tag == "tr":
            self.rows.setdefault(self.table, []).append([])
        elif tag == "data" and "td" in self.open:
            self.rows[self.table][-1].append(float(dict(attrs)["value"] or "nan"))

    def of(self, name: str) -> list[list[float]]:
        return [row for row in self.rows.get(name, []) if row]


def test_all_that_was_asked_for_is_on_the_page(files: list[Path]) -> None:
    text = overview_html(overview(files, calibrations=(table(),)))
    page = Tables(text)
    assert {attrs["id"] for tag, attrs in page.tags if tag == "h2"} == {
        *("systems", "tests", "curves", "tokens", "samples", "settings")
    }
    shown = "".join(page.text)
    for name in ("alone", "pair, 0.5", "handing back", "no gate"):
        assert name in shown
    for what in ("Holm-corrected", "Calibration on word_problems", "Kinds of tokens", "Tokens most often deferred"):
        assert what in shown
    curves = [tag for tag, attrs in page.tags if attrs.get("class") == "curve"]
    # Each is there twice, for wide screens and for phones.
    assert len(curves) == 2 * (
        3 + 4
    )  # two of the systems, one calibration; a gate's histogram for all but "no gate" ...
    assert shown.count("The gate") == 4  # ... and but the base alone, which deferred nothing
    assert [tag for tag, _ in page.tags].count("polyline") == 2 * 3  # the pair's by rate and by cost, the calibration's
    # The base alone is a line in both curves of the systems, and the calibration has its two ends.
    levels = [attrs for _, attrs in page.tags if attrs.get("class") == "level"]
    assert len(levels) == 2 * (2 + len(curve_chart(table()).levels)) and "alone: " in shown
    assert [tag for tag, _ in page.tags].count("article") == 6 * len(files)
    assert "6 of 24 texts, drawn by seed 0" in shown and text.count('<span class="back">') == 1
    assert "transformers" in shown and '"word_problems' not in shown


def test_curves_of_two_checkpoints_say_whose_they_are(files: list[Path]) -> None:
    two = overview(files[:1], calibrations=(table(), table()), calibrated=("runs/a", "runs/<b>"))
    headings = re.findall("<h3>(Calibration.*?)</h3>", overview_html(two))
    assert headings == ["Calibration of runs/a on word_problems", "Calibration of runs/&lt;b&gt; on word_problems"]


def test_the_page_needs_no_script_and_loads_nothing(files: list[Path]) -> None:
    text = overview_html(overview(files))
    without = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "<script" not in without
    for _, attrs in PageReader(without).tags:
        assert not {"src", "href", "onclick", "onload", "hidden"} & set(attrs)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text
    assert len(text) < 300_000


def test_the_numbers_shown_are_those_of_the_results(files: list[Path]) -> None:
    page = Tables(overview_html(overview(files)))
    raw = [json.loads(path.read_text()) for path in files]
    assert page.of("systems") == [
        [r["value"], *r["ci95"], r["deferral_rate"], r["changed_share"], *r["passes_per_token"].values()] for r in raw
    ]
    results = [EvalResult.load(path) for path in files]
    tests = compare_all(results[0], results[1:])
    assert page.of("tests") == [
        [t.difference, *t.ci95, t.only_second, t.only_first, t.p_value, t.holm_p] for t in tests
    ]
    deferring = [path for path, result in zip(files, results, strict=True) if result.deferral_rate]
    figures = [token_figures(read_traces(trace_path(path))) for path in deferring]
    assert page.of("classes") == [
        [
            c.tokens,
            c.deferred,
            *([c.deferred_share] if c.tokens else []),
            c.changed,
            *([c.changed_share] * bool(c.tokens)),
        ]
        for one in figures
        for c in one.classes.values()
    ]
    assert page.of("deferrals") == [
        [d.deferred, d.deferred / (d.deferred + d.own), d.deferred - d.changed, *(n for _, n in d.changed_to[:6])]
        for one in figures
        for d in one.deferrals[:15]
    ]


def test_further_metrics_have_a_column(files: list[Path]) -> None:
    one = overview(files[:1])
    result = replace(one.rival, metrics={"macro_f1": 0.25}, metrics_ci95={"macro_f1": (0.2, 0.3)})
    page = Tables(overview_html(replace(one, written=(Written(result), *overview(files[1:2]).written), rival=result)))
    assert 0.25 in page.of("systems")[0] and "macro f1" in "".join(page.text)
    assert 0.25 not in page.of("systems")[1]


def test_nothing_a_model_wrote_can_break_the_page(files: list[Path], tmp_path: Path) -> None:
    [fine] = overview(files[1:2]).written
    [trace, *_] = fine.samples
    pieces = tuple(NASTY for _ in trace.generation.pieces)
    steps = tuple(step._replace(author=1, base_token_id=-1) for step in trace.generation.steps)
    generation = replace(trace.generation, pieces=pieces, steps=steps, model_names=(NASTY, NASTY), text=NASTY)
    asked = ({"role": NASTY, "content": NASTY},) * 2
    nasty = Trace(NASTY, generation, asked, pieces, 0.0, NASTY, NASTY)
    passes = {NASTY: 3}
    result = replace(
        fine.result, name=NASTY, task=NASTY, metric=NASTY, forward_passes=passes, settings={NASTY: NASTY}, commit=NASTY
    )
    system = Written(result, token_figures([nasty]), (nasty,))
    broken = Written(replace(result, name=NASTY + "2"), missing=NASTY)
    named = table().model_copy(update={"task": NASTY, "metric": NASTY})
    page = Overview(NASTY, (system, broken), result, (named,), {NASTY: 1.0})
    write_overview(page, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert [tag for tag, _ in PageReader(text).tags].count("script") == 1
    assert "\x1b" not in text and "\u202e" not in text and "<script>alert" not in text


def test_two_assistants_have_two_colours() -> None:
    row = {
        **{"name": "both", "task": "t", "task_version": 1, "metric": "exact_match", "value": 0.5, "ci95": (0.1, 0.9)},
        **{"num_examples": 2, "deferral_rate": 7 / 9, "tokens": 9, "written_by": {}, "changed_tokens": 5},
        **{"changed_share": 5 / 9, "abstained": 0, "forward_passes": {"base": 9, "a": 2, "b": 4}, "no_answer": 0},
        **{"finish_reasons": {}, "equations_right": 0, "equations_shown": 0, "seconds": 1.0, "seed": 0},
        **{"settings": {"models": ["base", "a", "b"], "params.deferral": "threshold"}, "commit": None, "versions": {}},
        **{"ids": ("x", "y"), "scores": (1.0, 0.0)},
    }
    result = EvalResult(**row)  # type: ignore[arg-type]
    text = overview_html(Overview("t", (Written(result, token_figures(TRACES), tuple(TRACES)),), result))
    page = PageReader(text)
    assert '<code class="a1">␣Paris</code>' in text and '<code class="a2">␣Rome</code>' in text
    bars = [
        attrs["fill"] or "" for tag, attrs in page.tags if tag == "rect" and "height" in attrs and "rx" not in attrs
    ]
    assert len(bars) == 2 * 3 and len(set(bars)) == 3  # for wide screens and for phones
    assert "not known" in "".join(page.text) and "Paired tests" not in "".join(page.text)


def test_without_traces_the_page_says_so(files: list[Path], tmp_path: Path) -> None:
    for name in ("alone.json", "handing_back.json", "handing_back.jsonl", "no_gate.json"):
        (tmp_path / name).write_bytes((files[0].parent / name).read_bytes())
    lines = (files[0].parent / "no_gate.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "no_gate.jsonl").write_text("".join(lines[:-1]))
    copies = [tmp_path / name for name in ("alone.json", "handing_back.json", "no_gate.json")]
    shown = "".join(PageReader(overview_html(overview(copies))).text)
    assert "There are no traces beside alone.json: alone.jsonl is missing." in shown
    assert "The traces in no_gate.jsonl are not those of the questions in no_gate.json." in shown
    assert "6 of 24 texts" in shown
    (tmp_path / "alone.jsonl").write_bytes((tmp_path / "handing_back.jsonl").read_bytes())
    [alone] = overview(copies[:1]).written
    assert "other settings than alone.json" in alone.missing and alone.figures is None
    (tmp_path / "alone.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(CollmError, match=r"alone\.jsonl, line 1: not a trace"):
        overview(copies[:1])


def test_traces_of_other_tools_have_no_header(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "alone.json").write_bytes(files[0].read_bytes())
    for trace in read_traces(trace_path(files[0])):
        append_trace(tmp_path / "alone.jsonl", trace)
    assert read_written(tmp_path / "alone.json", EvalResult.load(files[0])).figures is not None
    (tmp_path / "alone.jsonl").write_text("")
    assert "not those" in read_written(tmp_path / "alone.json", EvalResult.load(files[0])).missing


def test_only_the_texts_shown_are_held(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Trace] = weakref.WeakSet()
    most = 0
    real = written_module.stream_traces

    class Watched(Trace):
        __hash__ = object.__hash__

    def watched(path: Path) -> Iterator[Trace]:
        nonlocal most
        for trace in real(path):
            copy = Watched(**vars(trace))
            alive.add(copy)
            most = max(most, len(alive))
            yield copy
            del copy

    monkeypatch.setattr(written_module, "stream_traces", watched)
    found = read_written(files[1], EvalResult.load(files[1]), samples=4)
    assert len(found.samples) == 4 and 4 < most <= 4 + 3 < 24


@pytest.mark.parametrize(
    ("right", "count", "expected"), [(9, 6, (3, 3)), (10, 6, (4, 2)), (1, 6, (1, 5)), (0, 6, (0, 6)), (12, 6, (6, 0))]
)
def test_right_and_wrong_texts_are_drawn_alike(
    files: list[Path], right: int, count: int, expected: tuple[int, int]
) -> None:
    ids = tuple(f"q{i}" for i in range(12))
    scores = tuple(float(i < right) for i in range(12))
    result = replace(EvalResult.load(files[0]), ids=ids, scores=scores)
    chosen = choose(result, count, seed=3)
    assert [scores[ids.index(id)] for id in chosen] == [1.0] * expected[0] + [0.0] * expected[1]
    assert len(set(chosen)) == count and choose(result, count, seed=3) == chosen != choose(result, count, seed=4)
    assert len(choose(result, 40, seed=0)) == 12 and choose(result, 0, seed=0) == []


# ---- curves


def test_one_system_at_several_rates_is_one_curve(files: list[Path]) -> None:
    results = read_results(files)
    curves = series(results, dict(enumerate(r.deferral_rate for r in results)))
    assert [one.name for one in curves] == ["alone", "pair", "handing back", "no gate"]
    assert [len(one.points) for one in curves] == [1, 3, 1, 1]
    pair = curves[1]
    assert [point.x for point in pair.points] == sorted(result.deferral_rate for result in results[1:4])
    assert all(point.ci95 and point.told for point in pair.points)
    unlike = [replace(result, name=str(number)) for number, result in enumerate(results)]
    assert [one.name for one in series(unlike, {1: 0.0, 2: 0.1})] == ["pair"]  # the checkpoint's
    without_first = series(results, dict.fromkeys(range(1, len(results)), 1.0))
    assert [one.look for one in without_first] == [one.look for one in curves[1:]]


def test_two_systems_whose_runs_are_called_alike_are_two_names_in_the_legend(files: list[Path]) -> None:
    """As two trainings have it whose runs have the names that they get by default, with the file behind each."""
    results = read_results(files)[1:3]
    names = ["pair, rate 0.1 (a10)", "pair, rate 0.2 (a20)", "pair, rate 0.1 (b10)", "pair, rate 0.2 (b20)"]
    runs = [
        replace(result, name=name, settings={**result.settings, "identity": {"checkpoint": name[-4]}})
        for name, result in zip(names, [*results, *results], strict=True)
    ]
    curves = series(runs, dict(enumerate((0.1, 0.2, 0.1, 0.2))))
    assert [one.name for one in curves] == [", ".join(names[:2]), ", ".join(names[2:])]
    assert [one.name for one in series([runs[0], runs[1]], {0: 0.1, 1: 0.2})] == ["pair, rate"]


def test_a_threshold_alone_makes_no_other_system(files: list[Path]) -> None:
    result = EvalResult.load(files[1])

    def of(**settings: object) -> str:
        return family(replace(result, settings={**result.settings, **settings}))

    assert of(policy="Threshold(log_odds=inf)") == of(policy="Threshold(log_odds=-2.5e-07)") != of()
    assert of(policy="Random(rate=0.1)") != of(policy="Threshold(log_odds=0.1)")
    assert of(**{"params.deferral_rate": 0.3, "params.threshold": None}) == of()
    # As of a checkpoint with a chosen rate, whose rates are all looked up in that task's calibration.
    assert of(**{"params.deferral_rate": 0.3, "params.threshold": None, "params.task": "word_problems"}) == of()
    assert of(alone="base") != of() and of(identity={"checkpoint": "b"}) != of()
    assert of(**{"params.deferral": "random"}) != of()
    assert of(identity={}) != family(replace(result, name="b", settings={**result.settings, "identity": {}}))


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["pair, 10 %", "pair, 15 %"], "pair"),
        (["the pair at 0.1", "the pair at 0.25"], "the pair at"),
        (["pair-10", "pair-20"], "pair"),
        (["a", "b"], ""),
        (["pair"], "pair"),
        (["pair (10)", "pair (20)"], "pair"),
    ],
)
def test_a_curve_is_called_what_its_runs_have_in_common(names: list[str], name: str) -> None:
    assert common_name(names) == name


def test_cost_weighs_passes_by_model(files: list[Path]) -> None:
    result = replace(EvalResult.load(files[1]), name="pair", tokens=10, forward_passes={"base": 10, "helper": 5})
    assert cost(result, {}) == 1.5
    assert cost(result, {"helper": 4.0}) == 3.0
    assert cost(result, {"helper": 4.0, "pair/helper": 0.0, "other/base": 9.0}) == 1.0
    assert cost(replace(result, tokens=0), {}) is None


def test_charts_keep_inside_their_frame_and_marks_differ() -> None:
    lines = [Series(str(i), (Point(i / 10, 0.5 + i / 100, (0.4, 0.7), "told"),), i) for i in range(9)]
    svg = chart_svg(Chart(tuple(lines), "t", "x", "y"))
    places = [
        tuple(map(float, pair)) for pair in re.findall(r'(?:cx|translate\()="?([\d.]+)[" ]+(?:cy=")?([\d.]+)', svg)
    ]
    assert all(0 < x <= 720 and 0 < y < 340 for x, y in places)
    assert len({look(number) for number in range(40)}) == 40
    flat = chart_svg(Chart((Series("a", (Point(0.0, 0.0),)),), "t", "x", "y"))
    assert "nan" not in flat
    empty = histogram([[0, 0, 0]], ["a"], ["red"], bin_names=["1", "2"], title="t", x_label="x", y_label="y")
    assert "<rect" not in empty


# ---- what may stand on one page


def test_results_of_one_name_are_told_apart(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "again.json").write_bytes(files[0].read_bytes())
    assert [r.name for r in read_results([files[0], tmp_path / "again.json"])] == ["alone (alone)", "alone (again)"]
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "alone.json").write_bytes(files[0].read_bytes())
    here = files[0].parent.name
    assert [r.name for r in read_results([files[0], folder / "alone.json", files[1]])] == [
        *(f"alone ({here}/alone)", "alone (other/alone)", "pair, 0.9")
    ]
    with pytest.raises(CollmError, match="twice"):
        read_results([files[0], files[0]])


def test_results_of_other_questions_are_refused(files: list[Path], tmp_path: Path) -> None:
    few = system(tmp_path, "few", examples=QUESTIONS[:5])
    with pytest.raises(CollmError, match="'few' answered other questions than 'alone'"):
        read_results([files[0], few])


def test_systems_scored_by_another_rule_are_shown_but_not_tested(files: list[Path]) -> None:
    page = overview(files[:3])
    flexible = replace(page.written[2].result, task="word_problems_flexible")
    text = overview_html(replace(page, written=(*page.written[:2], replace(page.written[2], result=flexible))))
    assert len(Tables(text).of("tests")) == 1 and len(Tables(text).of("systems")) == 3
    assert "another rule says what is right: pair, 0.5." in text and "task word_problems_flexible v3" in text


def test_graded_answers_are_better_and_not_right(files: list[Path]) -> None:
    page = overview(files[:3])
    rival, lists = page.written[0].result, page.written[1].result
    part = replace(lists, scores=tuple(0.8 if score else 0.3 for score in lists.scores))
    text = overview_html(
        replace(page, written=(page.written[0], replace(page.written[1], result=part), page.written[2]))
    )
    assert ">better</th>" in text and ">sign-flip or exact McNemar p</th>" in text and "only right" not in text.lower()
    assert "(95 % interval" in compare(rival, part).summary() and "; better: " in compare(rival, part).summary()
    assert "; only right: " in compare(rival, lists).summary()


def test_groups_of_near_duplicates_are_told(tmp_path: Path) -> None:
    grouped = [replace(e, fields={**e.fields, "group": str(i // 4)}) for i, e in enumerate(QUESTIONS)]
    found = [system(tmp_path, name, examples=grouped, needed=needed) for name, needed in (("a", 3), ("b", 8))]
    shown = " ".join("".join(PageReader(overview_html(overview(found))).text).split())
    assert "24 questions of word_problems (version 3) in 6 groups of near-duplicates" in shown
    assert "a bootstrap over groups" in shown and "test keep groups of near-duplicates whole" in shown


def test_kinds_of_systems(files: list[Path]) -> None:
    result = EvalResult.load(files[1])

    def kind(**settings: object) -> str:
        return system_row(replace(result, settings={**result.settings, **settings})).kind

    assert kind() == kind(**{"params.deferral": "compose"}) == kind(**{"params.deferral": "expected_gain"}) == "joint"
    assert kind(**{"params.deferral": "random"}) == kind(**{"params.deferral": "entropy"}) == "control"
    assert kind(alone=0) == kind(models=["base"]) == kind(**{"params.deferral": "never"}) == "single"


def test_the_threshold_is_marked_where_it_is_known(files: list[Path]) -> None:
    result = EvalResult.load(files[1])

    def threshold(**settings: object) -> float | None:
        return Written(replace(result, settings={**result.settings, **settings})).threshold

    assert threshold() == pytest.approx(math.log(9)) and threshold(**{"params.threshold": None}) == 0.0
    for unknown in ({"params.deferral": "random"}, {"policy": "Never()"}, {"params.threshold": 0.0}):
        assert threshold(**unknown) is None
    assert threshold(**{"params.threshold": None, "params.deferral_rate": 0.2}) is None


def test_settings_are_told_once_where_they_are_common(files: list[Path]) -> None:
    shared, own = common_settings(read_results(files[1:3]))
    assert shared["params.deferral"] == "threshold" and shared["version of torch"]
    assert own == [{"params.threshold": "0.9"}, {"params.threshold": "0.5"}]
