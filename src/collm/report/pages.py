"""HTML pages from templates: one file without any outside resource, whatever is filled in escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from collm.colours import printable
from collm.report.chart import key_svg
from collm.report.samples import author_class, tokens_html
from collm.report.systems import SystemRow, further_metrics, percent

SCRIPTS, STYLES = ("tokens.js", "page.js"), ("page.css", "tokens.css")
"""What a page is given. `tokens.js` and `tokens.css` are the coloured text and its panel; they stand alone."""


def render(template: str, **context: Any) -> str:
    """The page that a template of this package makes of `context`.

    Values are escaped, with control characters shown, unless they are `Markup`; an unknown name is an error.
    """
    return _environment().get_template(template).render(context)


def source(name: str) -> str:
    """A file of `templates/`, for pages that are made elsewhere."""
    return files("collm.report").joinpath("templates", name).read_text(encoding="utf-8")


def visible(piece: str) -> str:
    """A token with its white space shown."""
    return piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def p_value(value: float | None) -> str:
    """Three significant digits; `< 1e-6` for what is smaller."""
    return "" if value is None else "< 1e-6" if value < 1e-6 else f"{value:.3g}"


def reach(rows: Sequence[SystemRow]) -> float:
    """How far the bars of a table of systems reach: its largest value, with its interval."""
    return max([1e-9, *(row.ci95[1] if row.ci95 else row.value for row in rows)])


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "percent": percent,
        "points": lambda value: f"{100 * value:+.1f}",
        "p_value": p_value,
        "visible": visible,
        "words": lambda name: str(name).replace("_", " "),
        "compact": lambda value: json.dumps([printable(item) for item in value]),
    }
    environment.globals |= {
        "css": Markup("\n".join(map(source, STYLES))),
        "script": Markup("\n".join(map(source, SCRIPTS))),
        "author_class": author_class,
        "tokens_html": tokens_html,
        "further_metrics": further_metrics,
        "reach": reach,
        "key_svg": lambda number: Markup(key_svg(number)),
    }
    return environment


def _shown(value: Any) -> Any:
    """What the templates fill in, before it is escaped."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)
