"""The report page: one HTML file without any outside resource, tokens coloured by who wrote them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from collm.files import write_text
from collm.models.checkpoint import CalibrationTable
from collm.report.plots import curve_svg
from collm.report.systems import SystemRow, percent
from collm.report.terminal import printable
from collm.report.trace import Trace
from collm.types import BASE, Step

NUM_COLOURS = 6
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>|\[(?:CLS|SEP|PAD|UNK)\]")
# The page can load nothing, wherever it is opened and whatever a model wrote.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Page:
    """What stands on a page besides the samples.

    `lead`: a sentence or two under the title. `systems`: rows of the comparison table. `curve`: a calibration whose
    rate/quality curve is drawn. `footer`: how the figures were made (command, commit, seed).
    """

    title: str = "Who wrote which token"
    lead: str = ""
    systems: tuple[SystemRow, ...] = ()
    metric: str = "exact match"
    curve: CalibrationTable | None = None
    max_samples: int = 200
    footer: str = ""


def html_report(traces: Sequence[Trace], page: Page | None = None) -> str:
    """A whole page; the figures at its top count all traces, the first `max_samples` are shown."""
    page = page or Page()
    sections = [f"<h1>{_text(page.title)}</h1>"]
    if page.lead:
        sections.append(f'<p class="lead">{_text(page.lead)}</p>')
    if traces:
        sections.append(_tiles(traces))
    if page.systems:
        sections.append(f'<h2>Systems</h2><div class="card">{_systems(page.systems, page.metric)}</div>')
    if page.curve is not None:
        told = (
            f"Each point is one threshold, run on {page.curve.num_prompts} calibration prompts of "
            f"{_text(page.curve.task)}; the band is the 95 % interval."
        )
        card = f'<div class="card">{curve_svg(page.curve)}<p class="more">{told}</p></div>'
        sections.append(f"<h2>Quality against deferral rate</h2>{card}")
    if traces:
        sections.append("<h2>Samples</h2>" + _tools(traces))
        sections.extend(_sample(trace) for trace in traces[: page.max_samples])
        if len(traces) > page.max_samples:
            sections.append(f'<p class="more">The first {page.max_samples} of {len(traces)} samples are shown.</p>')
    if page.footer:
        sections.append(f"<footer>{_text(page.footer)}</footer>")
    resources = files("collm.report")
    css = resources.joinpath("page.css").read_text(encoding="utf-8")
    script = resources.joinpath("page.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_text(page.title)}</title>\n<style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(sections)
        + f'\n</main><div id="tip" role="tooltip"></div>\n<script>\n{script}</script></body></html>\n'
    )


def write_html(traces: Sequence[Trace], path: str | Path, page: Page | None = None) -> None:
    """Write `html_report` to a file, whole or not at all."""
    write_text(Path(path), html_report(traces, page))


def _text(text: str) -> str:
    return escape(printable(text))


def _author_class(author: int) -> str:
    return "" if author == BASE else f"a{(author - 1) % NUM_COLOURS + 1}"


def _tiles(traces: Sequence[Trace]) -> str:
    steps = [step for trace in traces for step in trace.generation.steps]
    total = max(1, len(steps))
    scores = [trace.score for trace in traces if trace.score is not None]
    tiles = [(str(len(traces)), "texts"), (f"{len(steps):,}", "tokens")]
    if scores:
        tiles.insert(0, (f"{sum(scores) / len(scores):.1%}", "answered right"))
    tiles.append((f"{sum(step.deferred for step in steps) / total:.1%}", "tokens written by assistants"))
    tiles.append((f"{sum(step.changed for step in steps) / total:.1%}", "tokens they changed"))
    cells = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{cells}</div>'


def _systems(rows: Sequence[SystemRow], metric: str) -> str:
    best = max(row.value for row in rows)
    top = max([1e-9, *(row.ci95[1] if row.ci95 else row.value for row in rows)])
    lines = []
    for row in rows:
        interval = "" if row.ci95 is None else f"{row.ci95[0]:.1%} to {row.ci95[1]:.1%}"
        kind = f'<span class="kind">{_text(row.kind)}</span>' if row.kind else ""
        note = f'<span class="kind">{_text(row.note)}</span>' if row.note else ""
        numbers = (percent(row.value), interval, percent(row.deferral_rate), percent(row.changed_share))
        cells = "".join(f'<td class="num">{cell}</td>' for cell in numbers)
        mark = ' class="best"' if row.value == best else ""
        name = f"<td>{_text(row.name)}{kind}{note}</td>"
        lines.append(f'<tr{mark}>{name}<td class="bar">{_bar(row, top)}</td>{cells}</tr>')
    numeric = (_text(metric.replace("_", " ")), "95 % interval", "deferred", "changed")
    heads = "<th>system</th><th></th>" + "".join(f'<th class="num">{head}</th>' for head in numeric)
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _bar(row: SystemRow, top: float) -> str:
    whisker = ""
    if row.ci95 is not None:
        low, high = (100 * value / top for value in row.ci95)
        whisker = (
            f'<path d="M{low:.2f} 8H{high:.2f}M{low:.2f} 4.5V11.5M{high:.2f} 4.5V11.5" fill="none" '
            'stroke="var(--ink)" stroke-width="1.4" vector-effect="non-scaling-stroke"/>'
        )
    colour = "var(--accent)" if row.kind == "joint" else "var(--muted)"
    bar = f'<rect x="0" y="3" width="{100 * row.value / top:.2f}" height="10" rx="1" fill="{colour}" opacity=".45"/>'
    shape = 'viewBox="-0.5 0 101 16" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="bar" {shape}>{bar}{whisker}</svg>'


def _tools(traces: Sequence[Trace]) -> str:
    """Legend and switches; they stay in sight."""
    names = max((trace.generation.model_names for trace in traces), key=len)
    steps = [step for trace in traces for step in trace.generation.steps]
    keys = [f'<span><span class="key">{_text(names[BASE])}</span></span>']
    for author, name in enumerate(names[1:], 1):
        keys.append(f'<span><span class="key {_author_class(author)}">{_text(name)}</span></span>')
    if any(step.changed for step in steps):
        keys.append('<span class="changed">bold: changed</span>')
    if any(step.abstained for step in steps):
        keys.append('<span><span class="back">handed back</span></span>')
    keys.append('<span class="gatekey">chance of deferring 0 %<i class="ramp"></i>100 %</span>')
    gated = any(step.gate for step in steps)
    views = _buttons("view", [("author", "Author"), ("gate", "Gate")]) if gated else ""
    filters = [("all", "All")]
    if any(trace.score is not None for trace in traces):
        filters += [("right", "Right"), ("wrong", "Wrong")]
    filters.append(("haschanged", "Changed"))
    switches = f'<div class="switches">{_buttons("filter", filters)}{views}</div>'
    return f'<div class="tools"><div class="legend">{"".join(keys)}</div>{switches}</div>'


def _buttons(what: str, choices: Sequence[tuple[str, str]]) -> str:
    made = [
        f'<button type="button" data-{what}="{value}" aria-pressed="{str(index == 0).lower()}">{label}</button>'
        for index, (value, label) in enumerate(choices)
    ]
    return f'<div class="group">{"".join(made)}</div>'


def _sample(trace: Trace) -> str:
    generation = trace.generation
    classes, verdict = ["sample", "card"], ""
    if trace.score is not None:
        classes.append("right" if trace.score == 1 else "wrong")
        answer = "no answer found" if trace.answer is None else f"answer {_text(trace.answer)}"
        expected = "" if trace.score == 1 else f", expected {_text(trace.gold or '')}"
        mark = "✓ right" if trace.score == 1 else "✗ wrong"
        verdict = f'<span class="chip">{mark}</span><span>{answer}{expected}</span>'
    if generation.changed_tokens:
        classes.append("haschanged")
    figures = f"{generation.completion_tokens} tokens, {generation.deferral_rate:.0%} deferred"
    bases = trace.base_pieces or (None,) * len(generation.steps)
    tokens = zip(generation.steps, generation.pieces, bases, strict=True)
    written = "".join(_token(step, piece, base) for step, piece, base in tokens)
    models = escape(json.dumps([printable(name) for name in generation.model_names]))
    return (
        f'<article class="{" ".join(classes)}" data-models="{models}"><header>{verdict}'
        f'<span class="id">{_text(trace.id)}</span><span class="figures">{figures}</span></header>'
        f'{_asked(trace)}<p class="written">{written}</p></article>'
    )


def _asked(trace: Trace) -> str:
    if isinstance(trace.prompt, str):
        return f'<div class="asked">{_text(trace.prompt)}</div>'
    several = len(trace.prompt) > 1
    return "".join(
        '<div class="asked">'
        + (f'<span class="role">{_text(message["role"])}</span>' if several else "")
        + f"{_text(message['content'])}</div>"
        for message in trace.prompt
    )


def _token(step: Step, piece: str, base: str | None) -> str:
    classes = ["t", _author_class(step.author)]
    classes += ["changed"] * step.changed + ["back"] * step.abstained
    if _SPECIAL.fullmatch(piece.strip()):
        classes.append("special")
    data = [f'data-l="{step.log_prob:.5g}"'] if math.isfinite(step.log_prob) else []
    if step.author != BASE:
        data.append(f'data-a="{step.author}"')
    if step.gate:
        data.append(f'data-g="{" ".join(f"{gate:.4g}" for gate in step.gate)}"')
        data.append(f'style="--g:{1 - step.gate[0]:.3f}"')
    if step.changed and base is not None:
        data.append(f'data-b="{_text(base)}"')
    shown = _text(piece)
    if "\n" in shown and step.deferred:
        data.append(f'data-p="{shown}"')
        shown = shown.replace("\n", '<span class="nl">↵</span>\n')
    return f'<span class="{" ".join(filter(None, classes))}" {" ".join(data)}>{shown}</span>'
