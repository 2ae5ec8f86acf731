"""Who wrote which token, in colour: the colours, and a generation as a notebook shows it (on light pages and dark)."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

COLOURS = ("#e69f00", "#56b4e9", "#3fbf95", "#cc9ac0", "#f0e442", "#e8804a")
"""Of assistants 1, 2, ...; what the base wrote has none. Black is legible on each."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with control characters shown, so that a model's text can neither steer a terminal nor reorder it."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}" if match[0] != "\r" else "", text)


def colour(author: int) -> str:
    return COLOURS[(author - 1) % len(COLOURS)]


def coloured_html(
    pieces: Sequence[str], authors: Sequence[int], names: Sequence[str], notes: Sequence[str], summary: str
) -> str:
    """The text with each token coloured by who wrote it, a legend, and a line of figures.

    Args:
        pieces, authors, notes: for each token its text, who wrote it (0 is the base), and what hovering shows.
        names: of all models, base first.
    """
    tokens = []
    for piece, author, note in zip(pieces, authors, notes, strict=True):
        style = "" if author == 0 else f' style="background:{colour(author)};color:#000;border-radius:2px"'
        tokens.append(f'<span{style} title="{html.escape(printable(note))}">{html.escape(printable(piece))}</span>')
    legend = [f"<span>{html.escape(printable(names[0]))}: not coloured</span>"]
    for author, name in enumerate(names[1:], start=1):
        legend.append(f'<span style="background:{colour(author)};color:#000;padding:0 .3em">{html.escape(name)}</span>')
    return (
        f'<div><pre style="white-space:pre-wrap;margin:0 0 .5em">{"".join(tokens)}</pre>'
        f'<div style="font-size:85%;opacity:.8">{" &nbsp; ".join(legend)}<br>{html.escape(summary)}</div></div>'
    )
