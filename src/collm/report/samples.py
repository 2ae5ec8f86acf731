"""Tokens as HTML: who wrote each, how sure the gate was, and what the base would have written."""

from __future__ import annotations

import json
import math

from markupsafe import Markup, escape

from collm.colours import printable
from collm.report.tokens import is_special
from collm.report.trace import Trace
from collm.types import BASE, Step

NUM_COLOURS = 6


def author_class(author: int) -> str:
    """The CSS class that colours what this author wrote; the base has none."""
    return "" if author == BASE else f"a{(author - 1) % NUM_COLOURS + 1}"


def text(value: str) -> Markup:
    """Text for a page: nothing in it is markup, no control character reorders it."""
    return escape(printable(value))


def tokens_html(trace: Trace) -> Markup:
    """The written text, one `span.t` for each token."""
    generation = trace.generation
    bases = trace.base_pieces or (None,) * len(generation.steps)
    tokens = zip(generation.steps, generation.pieces, bases, strict=True)
    return Markup("").join(_token(step, piece, base) for step, piece, base in tokens)


def _chance(gate: float) -> str:
    """Four digits, or as many as tell it from 1: the panel says `> 99.9 %` of what is not certain."""
    return f"{gate:.4g}" if gate < 0.9999 else repr(gate)


def _token(step: Step, piece: str, base: str | None) -> Markup:
    classes = ["t", author_class(step.author)]
    classes += ["changed"] * step.changed + ["back"] * step.abstained
    if is_special(piece):
        classes.append("special")
    data = [f'data-l="{step.log_prob:.5g}"'] if math.isfinite(step.log_prob) else []
    if step.author != BASE:
        data.append(f'data-a="{step.author}"')
    if step.gate:
        data.append(f'data-g="{" ".join(map(_chance, step.gate))}"')
        data.append(f'style="--g:{1 - step.gate[0]:.3f}"')
    if len(step.token_ids) > 1:
        data.append(f'data-c="{len(step.token_ids)}"')
        if step.token_lengths:
            pieces = json.dumps([printable(each) for each in step.token_pieces], ensure_ascii=False)
            data.append(f'data-k="{escape(pieces)}"')
    if step.changed and base is not None:
        data.append(f'data-b="{text(base)}"')
    shown = str(text(piece))
    if "\n" in shown and step.deferred:
        data.append(f'data-p="{shown}"')
        shown = shown.replace("\n", '<span class="nl">↵</span>\n')
    return Markup(f'<span class="{" ".join(filter(None, classes))}" {" ".join(data)}>{shown}</span>')
