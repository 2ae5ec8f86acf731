"""A coloured generation as an SVG picture, for a README or a slide."""

from __future__ import annotations

import io
import re

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from collm.colours import printable
from collm.report.terminal import coloured, legend, summary
from collm.types import Generation

# rich's picture asks for a font from a server; one that loads nothing looks the same wherever it is shown.
_FORMAT = re.sub(r"\s*@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def generation_svg(generation: Generation, question: str, *, width: int = 104) -> str:
    """The question, the answer coloured by author, the legend and one line of figures."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text(printable(question), "bold"))
    console.print()
    console.print(coloured(generation))
    console.print()
    console.print(legend(generation.model_names))
    console.print(Text(summary(generation), "dim"))
    return console.export_svg(
        title=" + ".join(map(printable, generation.model_names)), theme=DEFAULT_TERMINAL_THEME, code_format=_FORMAT
    )
