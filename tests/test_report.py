"""The views: nothing a model writes can break them, and they say who wrote what."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from test_trace import sample

from collm.models.info import CalibrationRow, CalibrationTable
from collm.report.axes import BOTTOM
from collm.report.chart import Chart, Level, Point, Series, bounds, chart_svg
from collm.report.html import Page, html_report, write_html
from collm.report.labels import Words, shortened, width_of
from collm.report.pages import source
from collm.report.plots import curve_chart, curve_csv, save_curve, save_png
from collm.report.systems import SystemRow, systems_table
from collm.report.terminal import coloured, legend, plain, print_generation, print_traces, summary
from collm.report.trace import Trace, trace_from_dict, trace_to_dict
from collm.types import Generation, Step, Usage

NASTY = '</span></script><script>alert("x")</script>&amp;\x1b[31m\u202e'


def generation(*tokens: tuple[str, int], names: tuple[str, ...] = ("base", "calc")) -> Generation:
    gate = tuple(1 / len(names) for _ in names)
    steps = tuple(Step(i, author, -0.25, gate, i if author == 0 else i + 1) for i, (_, author) in enumerate(tokens))
    pieces = tuple(piece for piece, _ in tokens)
    return Generation("".join(pieces), steps, pieces, "stop", 3, names, Usage(forward_passes=(len(steps), 1)))


WRITTEN = generation(("56 * 9", 0), (" =", 0), (" 5", 1), ("04", 1), ("\n", 0), ("#### 504", 0), ("<|im_end|>", 0))


def table() -> CalibrationTable:
    points = [
        (0.0, 0.0, math.inf, 0.17),
        (0.1, 0.098, 2.0, 0.3),
        (0.5, 0.2, -math.inf, 0.2),
        (1.0, 0.2, -math.inf, 0.2),
    ]
    rows = [
        CalibrationRow(
            target_rate=target,
            achieved_rate=rate,
            threshold=0.5,
            log_odds=odds,
            metric_value=value,
            ci95=(value - 0.05, value + 0.05),
        )
        for target, rate, odds, value in points
    ]
    return CalibrationTable(task="word_problems", metric="exact_match", seed=0, num_prompts=20, rows=rows, best=1)


class PageReader(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def tokens(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.tags if "t" in (attrs.get("class") or "").split()]


def test_the_page_tells_author_gate_log_prob_and_the_base_token() -> None:
    trace = Trace("q1", WRITTEN, "What is 56 * 9?", (None, None, " 6", "03", None, None, None), 1.0, "504", "504")
    page = PageReader(html_report([trace]))
    tokens = page.tokens()
    assert len(tokens) == 7
    assert tokens[0] == {"class": "t", "data-l": "-0.25", "data-g": "0.5 0.5", "style": "--g:0.500"}
    assert tokens[2]["class"] == "t a1 changed" and tokens[2]["data-a"] == "1" and tokens[2]["data-b"] == " 6"
    assert tokens[6]["class"] == "t special"
    [article] = [attrs for tag, attrs in page.tags if tag == "article"]
    assert json.loads(article["data-models"] or "") == ["base", "calc"]
    assert "right" in (article["class"] or "")
    assert "#### 504" in "".join(page.text)


def test_a_chunk_tells_its_tokens() -> None:
    pieces = ["\u202eG", "r\ufffd", '\ufffd"<', "\n"]
    data = [b"\xe2\x80\xaeG", b"r\xc3", b'\xb6"<', b"\n"]
    chunk = Step(5, 1, -1.0, token_ids=(5, 6, 7, 8), data=b"".join(data), token_lengths=tuple(map(len, data)))
    assert list(chunk.token_pieces) == pieces
    single = Step(5, 0, -1.0, token_ids=(5,), data=b"a", token_lengths=(1,))
    text = b"".join(data).decode()
    written = Generation(text + "a", (chunk, single), (text, "a"), "stop", 1, ("base", "calc"))
    trace = Trace("a", written, "p")
    assert trace_from_dict(json.loads(json.dumps(trace_to_dict(trace)))).generation.steps == written.steps
    [many, one] = PageReader(html_report([trace])).tokens()
    assert many["data-c"] == "4" and json.loads(many["data-k"] or "") == ["\\x202eG", *pieces[1:]]
    assert "data-c" not in one and "data-k" not in one


def test_the_page_loads_nothing_and_escapes_everything() -> None:
    nasty = generation((NASTY, 1), (NASTY, 0), names=("base", NASTY))
    trace = Trace(NASTY, nasty, ({"role": NASTY, "content": NASTY},) * 2, (NASTY, None), 0.0, NASTY, NASTY)
    text = html_report(
        [trace], Page(NASTY, NASTY, (SystemRow(NASTY, 0.5, None, NASTY, note=NASTY),), NASTY, footer=NASTY)
    )
    page = PageReader(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "\x1b" not in text and "\u202e" not in text
    for _, attrs in page.tags:
        assert not {"src", "href", "onclick", "onload"} & set(attrs)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text
    assert page.tokens()[0]["data-b"] == NASTY.replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")


def test_the_page_has_table_curve_and_a_limit() -> None:
    rows = (SystemRow("alone", 0.2, (0.1, 0.3), "single", 0.0), SystemRow("pair", 0.4, (0.3, 0.5), "joint", 0.1, 0.05))
    text = html_report([sample(), sample(id="b")], Page(systems=rows, curve=table(), max_samples=1))
    page = PageReader(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("article") == 1 and "first 1 of 2" in text
    assert tags.count("polyline") == 2  # for wide screens and for phones
    assert "prefers-color-scheme: dark" in text
    [best] = re.findall(r'<tr class="best">(.*?)</tr>', text, re.DOTALL)
    assert "pair" in best and "30.0% to 50.0%" in re.sub("<[^>]*>", "", best)


def test_the_gate_view_is_offered_where_there_is_a_gate() -> None:
    without = replace(WRITTEN, steps=tuple(step._replace(gate=()) for step in WRITTEN.steps))
    assert 'data-view="gate"' in html_report([Trace("a", WRITTEN, "p")])
    page = html_report([Trace("a", without, "p")])
    assert 'data-view="gate"' not in page and "data-g=" not in page


def test_an_empty_report_and_empty_generations_are_pages(tmp_path: Path) -> None:
    PageReader(html_report([]))
    write_html([Trace("a", Generation("", (), (), "stop", 1, ("base",)), "p")], tmp_path / "x" / "page.html")
    assert "0 tokens" in (tmp_path / "x" / "page.html").read_text()


def test_an_assistants_newline_is_seen_in_both_views() -> None:
    written = generation(("a", 0), ("\n", 1), ("b", 0))
    assert "↵</span>\n</span>" in html_report([Trace("a", written, "p")])
    assert coloured(written).plain == "a↵\nb"
    assert coloured(generation(("a\nb", 0))).plain == "a\nb"


def test_plain_text_brackets_what_assistants_wrote() -> None:
    assert plain(WRITTEN) == "56 * 9 =[ 504]\n#### 504<|im_end|>"
    assert plain(generation(("a", 2), ("b", 1), names=("base", "x", "y"))) == "[2:a][1:b]"


def terminal(colour: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=colour, color_system="truecolor" if colour else None, width=80), stream


def test_a_terminal_gets_colours_and_a_pipe_gets_none() -> None:
    console, stream = terminal(colour=True)
    print_generation(WRITTEN, console)
    assert "\x1b[" in stream.getvalue() and "48;2;230;159;0" in stream.getvalue()
    console, stream = terminal(colour=False)
    print_generation(WRITTEN, console)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("56 * 9 =[ 504]\n#### 504<|im_end|>\nwritten by: base  [...] calc\n")


@pytest.mark.parametrize("colour", [True, False])
def test_a_models_text_cannot_steer_the_terminal(colour: bool) -> None:
    console, stream = terminal(colour)
    print_traces(
        [Trace("[red]x\x1b]0;", generation(("\x1b[2J\x07[bold]", 1)), "\x1b[2J", score=0.0, gold="4")], console
    )
    told = re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
    assert "\x1b" not in told and "\x07" not in told
    assert "\\x1b[2J\\x07[bold]" in told and "[red]x" in told and "wrong, gold 4" in told


def test_texts_of_two_systems_each_have_their_own_legend() -> None:
    """`generate --trace` appends: the colour of a calculator is that of a specialist in the next text."""
    calc, expert = generation(("a", 1)), generation(("b", 1), names=("base", "expert"))
    traces = [Trace("q1", calc, "p"), Trace("q2", calc, "p"), Trace("q3", expert, "p")]
    console, stream = terminal(colour=False)
    print_traces(traces, console)
    told = stream.getvalue()
    assert told.index("q2") < told.index("[...] calc") < told.index("q3") < told.index("[...] expert")
    assert told.count("written by:") == 2
    text = html_report(traces)
    legends = re.findall(r'<div class="legend">(.*?)</div>', text, re.DOTALL)
    assert [("calc" in one, "expert" in one) for one in legends] == [(True, False), (True, False), (False, True)]
    other = replace(calc, model_names=("other", "calc"))
    assert "not what\nthe base would have" in html_report([traces[0], Trace("q4", other, "p")])
    # The base alone is the first model of the pair.
    alone = Trace("q5", generation(("a", 0), names=("base",)), "p")
    assert html_report([alone, traces[0]]).count('<div class="legend">') == 1


def test_a_score_between_right_and_wrong_is_told_as_what_it_is() -> None:
    """Of a list, F1: 0.8 is not wrong, and a mean of 0.6 says nothing of how many are right."""
    scores = (1.0, 0.8, 0.0)
    text = html_report([Trace(f"q{i}", WRITTEN, "p", (), score, "a", "b") for i, score in enumerate(scores)])
    assert re.findall(r'<article class="sample card ([a-z]+)', text) == ["right", "partly", "wrong"]
    assert re.findall(r'<span class="chip">(.*?)</span>', text) == ["✓ right", "score 0.80", "✗ wrong"]
    assert "<b>60.0%</b><span>mean score</span>" in text and 'data-filter="partly"' in text
    plain = html_report([Trace("q", WRITTEN, "p", (), 0.0, "a", "b")])
    assert "<span>answered right</span>" in plain and "partly" not in re.sub(r"<script>.*", "", plain, flags=re.DOTALL)


def test_a_gate_that_is_nearly_sure_is_not_certain() -> None:
    """The panel says `> 99.9 %` of what is below 1: rounded to four digits it was 100.0 %."""
    steps = (Step(0, 1, -0.25, (1e-6, 1 - 1e-6), 0), Step(1, 0, -0.25, (0.98765432, 0.01234568), 1))
    written = replace(generation(("a", 1), ("b", 0)), steps=steps)
    sure, other = PageReader(html_report([Trace("q", written, "p")])).tokens()
    assert sure["data-g"] == "1e-06 0.999999" and other["data-g"] == "0.9877 0.01235"


def test_long_lines_are_not_broken_in_a_pipe() -> None:
    console, stream = terminal(colour=False)
    print_generation(generation(("x" * 300, 0)), console, with_legend=False)
    assert stream.getvalue() == "x" * 300 + "\n"


def test_legend_and_summary_name_models_and_figures() -> None:
    assert "calc" in legend(("base", "calc")).plain
    told = summary(WRITTEN)
    assert "7 tokens, 28.6% deferred, 2 changed" in told and "base 7, calc 1" in told


def test_the_systems_table_shows_every_row() -> None:
    console, stream = terminal(colour=False)
    console.print(systems_table([SystemRow("a [b]", 0.123, (0.1, 0.2), deferral_rate=0.5), SystemRow("c", 0.9)]))
    told = stream.getvalue()
    assert "a [b]" in told and "12.3%" in told and "10.0% to 20.0%" in told and "50.0%" in told and "90.0%" in told


def test_the_curve_as_csv_reads_back() -> None:
    rows = list(csv.DictReader(io.StringIO(curve_csv(table()))))
    assert [float(row["log_odds"]) for row in rows] == [math.inf, 2.0, -math.inf, -math.inf]
    assert [row["best"] for row in rows] == ["0", "1", "0", "0"]
    assert float(rows[1]["ci95_high"]) == pytest.approx(0.35)


def test_the_curve_as_svg_has_one_dot_per_threshold_inside_the_picture() -> None:
    root = ElementTree.fromstring(chart_svg(curve_chart(table())))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    dots = [circle for circle in root.iter("circle") if circle.find("title") is not None]
    assert len(dots) == 3
    assert all(0 < float(dot.attrib["cx"]) < width and 0 < float(dot.attrib["cy"]) < height for dot in dots)
    xs = [float(dot.attrib["cx"]) for dot in dots]
    assert xs == sorted(xs) and xs[0] < xs[1] < xs[2]
    assert "best: 30.0%" in "".join(root.itertext())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_curves_can_be_drawn(value: float, tmp_path: Path) -> None:
    row = CalibrationRow(target_rate=0, achieved_rate=0, threshold=1, log_odds=math.inf, metric_value=value)
    flat = CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=[row], best=0)
    ElementTree.fromstring(chart_svg(curve_chart(flat)))
    assert (tmp_path / "curve.csv") in save_curve(flat, tmp_path)


def test_curve_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    written = save_curve(table(), tmp_path)
    assert [path.name for path in written] == ["curve.csv", "curve.svg", "curve.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    ElementTree.parse(written[1])
    assert len(list(tmp_path.iterdir())) == 3


def test_the_interval_of_a_single_point_is_drawn(tmp_path: Path) -> None:
    """A rival calibrated for one rate: the legend of the PNG told of an interval, and there was none."""
    pytest.importorskip("matplotlib")
    pictures = []
    for number, ci95 in enumerate([(0.2, 0.4), (0.2, 0.35), None]):
        other = Point(0.1, 0.2, None)  # it keeps the axes as they are
        save_png(
            Chart((Series("a", (Point(0.2, 0.3, ci95), other, Point(0.3, 0.4))),), "t", "x", "y"), tmp_path / "a.png"
        )
        pictures.append((tmp_path / "a.png").read_bytes())
        assert number == 0 or pictures[-1] != pictures[-2]


def test_the_coloured_text_and_its_panel_stand_alone() -> None:
    """Other pages take these two files as they are: every colour they use is theirs, every element they make."""
    style, script = source("tokens.css"), source("tokens.js")
    used, set_here = (set(re.findall(pattern, style)) for pattern in (r"var\((--[\w-]+)", r"(--[\w-]+):"))
    assert used - set_here <= {"--g"}  # a token's own, set on its element
    assert "getElementById" not in script and "collmTokens" in script
    assert 'id="tip"' not in html_report([sample()])


def test_stacked_tables_name_their_cells() -> None:
    rows = (SystemRow("alone", 0.2, (0.1, 0.3), "single", 0.0), SystemRow("pair", 0.4, (0.3, 0.5), "joint", 0.1, 0.05))
    page = PageReader(html_report([sample()], Page(systems=rows, curve=table())))
    cells = [attrs for tag, attrs in page.tags if tag == "td" and attrs.get("class") == "num"]
    assert cells and all(attrs.get("data-label") for attrs in cells)


def test_a_curve_has_its_ends_as_lines_in_every_picture(tmp_path: Path) -> None:
    rows = [
        CalibrationRow(target_rate=0, achieved_rate=0, threshold=1, log_odds=math.inf, metric_value=0.2),
        CalibrationRow(target_rate=0.1, achieved_rate=0.1, threshold=0.5, log_odds=0.0, metric_value=0.5),
        CalibrationRow(target_rate=1, achieved_rate=0.3, threshold=0, log_odds=-math.inf, metric_value=0.4),
    ]
    made = CalibrationTable(task="t", metric="exact_match", seed=0, num_prompts=9, rows=rows)
    assert {(level.name, level.y) for level in curve_chart(made).levels} == {
        ("base alone", 0.2),
        ("always asking", 0.4),
    }
    svg = chart_svg(curve_chart(made))
    assert svg.count('class="level"') == 2 and "base alone: 20.0%" in svg
    # A level above all points is inside the picture.
    high = Chart((Series("a", (Point(0.1, 0.2),)),), "t", "x", "y", levels=(Level("b", 0.9),))
    assert bounds(high.series, levels=high.levels)[1][-1] >= 0.9


@pytest.mark.parametrize("width", [360, 720])
@pytest.mark.parametrize(
    "levels",
    [(0.0, 0.01), (0.04, 0.0), (0.97, 1.0), (0.0, 0.02, 0.05), (0.5, 0.52), (1.0,), (0.0,), (0.3, 0.3, 0.9, 0.91)],
)
def test_names_in_a_chart_lie_on_no_line_and_on_no_other_name(levels: tuple[float, ...], width: int) -> None:
    rising = tuple(Point(x / 10, min(1.0, x / 8), note="best: 100.0%" if x == 10 else "") for x in range(11))
    named = tuple(Level(f"system {i} alone", y) for i, y in enumerate(levels))
    root = ElementTree.fromstring(chart_svg(Chart((Series("pair", rising),), "t", "x", "y", levels=named), width))
    words = [(e, 11) for e in root.iter("text") if e.get("class") == "name"]
    words += [(e, 12) for e in root.iter("text") if e.get("font-weight") == "600"]
    assert len(words) == len(levels) + 1
    boxes = [
        Words((e.text or "",), float(e.attrib["x"]), float(e.attrib["y"]), e.attrib["text-anchor"], size).box
        for e, size in words
    ]
    lines = [float(e.attrib["d"].split()[1].split("H")[0]) for e in root.iter("path") if e.get("class") == "level"]
    for number, box in enumerate(boxes):
        assert box.left >= 0 and box.right <= width and box.top >= 0 and box.bottom <= 340 - BOTTOM
        assert not any(box.meets(other) for other in boxes[:number])
        assert number == len(levels) or not any(box.top < y < box.bottom for y in lines), "a name on a line"
    # From top to bottom, names stand as their lines do.
    by_name = {e.text: float(e.attrib["y"]) for e, _ in words[:-1]}
    heights = [by_name[f"system {i} alone: {y:.1%}"] for i, y in sorted(enumerate(levels), key=lambda it: -it[1])]
    assert heights == sorted(heights)


def test_a_long_name_keeps_its_figure() -> None:
    assert shortened("an assistant, alone", ": 1.0%", 400) == "an assistant, alone: 1.0%"
    short = shortened("a" * 90, ": 1.0%", 200)
    assert short.endswith("a\u2026: 1.0%") and width_of(short) <= 200 < width_of(short + "aa")
