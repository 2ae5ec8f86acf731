"""Who wrote which token, in a terminal: coloured by author, or in brackets where there is no colour."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.style import Style
from rich.table import Table
from rich.text import Text

from collm.colours import colour, printable
from collm.report.tokens import TokenFigures
from collm.report.trace import Trace
from collm.types import BASE, Generation, Step

# Background colours that black text stands out on and that colour-blind readers can tell apart (Okabe and Ito 2008).


def author_style(author: int) -> Style:
    """How tokens of this author look: the base plain, assistants on a colour of their own."""
    return Style() if author == BASE else Style(color="#000000", bgcolor=colour(author))


def token_text(piece: str, step: Step) -> Text:
    """One token as it is written, for streaming as well; a token that changed what the base had written is bold.

    An assistant's newline is shown as a mark followed by a real newline: a colour on a line's end is not visible.
    """
    style = author_style(step.author) + Style(bold=step.changed, underline=step.changed)
    text = Text()
    for part in re.split(r"(\n)", printable(piece)):
        if part == "\n":
            text.append("↵" if step.deferred else "", style + Style(dim=True))
            text.append("\n")
        else:
            text.append(part, style)
    return text


def coloured(generation: Generation) -> Text:
    """The whole text, special tokens shown, coloured by author."""
    text = Text()
    for step, piece in zip(generation.steps, generation.pieces, strict=True):
        text.append_text(token_text(piece, step))
    return text


def plain(generation: Generation) -> str:
    """The text with assistants' tokens in brackets, for pipes and files: `56 * 9 = [504]`, with several assistants
    `[2:504]`."""
    brackets = Brackets(len(generation.model_names))
    pairs = zip(generation.steps, generation.pieces, strict=True)
    return "".join([brackets.push(piece, step) for step, piece in pairs]) + brackets.end()


class Brackets:
    """Around what assistants write, token by token, where there is no colour: opened and closed as authors change."""

    def __init__(self, num_models: int) -> None:
        self._several = num_models > 2
        self._author = BASE

    def push(self, piece: str, step: Step) -> str:
        """What a token adds."""
        before = "" if step.author == self._author else self.end() + self._open(step.author)
        return before + printable(piece)

    def end(self) -> str:
        """What closes the text."""
        closing = "" if self._author == BASE else "]"
        self._author = BASE
        return closing

    def _open(self, author: int) -> str:
        self._author = author
        return "" if author == BASE else f"[{author}:" if self._several else "["


def in_colour(console: Console) -> bool:
    """Whether a console shows colours; where it does not, there are brackets."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def legend(model_names: Sequence[str], colour: bool = True) -> Text:
    """Which colour (or bracket) stands for which model."""
    text = Text().append("written by: ", "dim" if colour else None)
    for author, name in enumerate(model_names):
        text.append("  " if author else "")
        shown = printable(name)
        if colour:
            text.append(f" {shown} ", author_style(author))
        else:
            mark = f"[{author}:...]" if len(model_names) > 2 else "[...]"
            text.append(shown if author == BASE else f"{mark} {shown}")
    if len(model_names) > 1 and colour:
        text.append("   ")
        text.append("changed", "bold underline")
        text.append(" = the base would have written another token", "dim")
    return text


def summary(generation: Generation) -> str:
    """One line of figures: tokens and who wrote them, and what they cost."""
    usage = generation.usage
    passes = ", ".join(
        f"{name} {count}" for name, count in zip(generation.model_names, generation.forward_passes, strict=False)
    )
    unanswered = sum(step.abstained for step in generation.steps)
    faults = sum(step.fault is not None for step in generation.steps)
    parts = [
        f"{generation.length}, {generation.deferral_rate:.1%} deferred, "
        f"{generation.changed_tokens} changed, {unanswered} deferrals without an answer"
        + (f" ({faults} by a failing assistant)" if faults else "")
        + f", finished by {generation.finish_reason}"
        + (f" ({printable(generation.error)})" if generation.error is not None else ""),
        f"forward passes: {printable(passes)}" if passes else "",
        f"{usage.drafted} drafted, {usage.accepted} accepted" if usage.drafted else "",
        f"{usage.tokens_per_second:.1f} tokens/s, the first after {usage.first_token_seconds:.2f} s"
        if usage.seconds
        else "",
    ]
    return "; ".join(part for part in parts if part)


def print_generation(generation: Generation, console: Console | None = None, *, with_legend: bool = True) -> None:
    """Print a generation to a terminal in colour, to a pipe (or with `NO_COLOR`) with brackets."""
    console = console or Console()
    colour = in_colour(console)
    body = coloured(generation) if colour else Text(plain(generation))
    console.print(body, soft_wrap=True, highlight=False)
    if with_legend:
        console.print(legend(generation.model_names, colour), soft_wrap=True, highlight=False)
        console.print(Text(summary(generation), style="dim" if colour else ""), soft_wrap=True, highlight=False)


def print_table(table: Table, console: Console | None = None) -> None:
    """Print a table, in a terminal within its width; to a file or a pipe as wide as it is, with nothing cut off."""
    console = console or Console()
    if not console.is_terminal:
        wide = console.options.update(max_width=10_000)
        console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def question_of(trace: Trace) -> str:
    """What was asked, in one string: the prompt, or the last message of the user."""
    if isinstance(trace.prompt, str):
        return trace.prompt
    asked = [message["content"] for message in trace.prompt if message["role"] == "user"]
    return asked[-1] if asked else ""


def verdict_of(score: float, gold: str | None) -> str:
    """Right, wrong, or something between, as in F1 of a list."""
    if score == 1:
        return "right"
    return f"{'wrong' if score == 0 else f'score {score:.2f}'}, gold {gold}"


def print_traces(traces: Iterable[Trace], console: Console | None = None) -> None:
    """Print samples: question, coloured answer, verdict; the legend below those of one system, mostly at the end."""
    console = console or Console()
    names: tuple[str, ...] = ()
    for trace in traces:
        if names and trace.generation.model_names != names:
            console.print(legend(names, in_colour(console)), soft_wrap=True, highlight=False)
            console.print()
        verdict = "" if trace.score is None else verdict_of(trace.score, trace.gold)
        head = Text(f"{printable(trace.id)}  ", style="bold")
        head.append(verdict, "green" if trace.score == 1 else "red")
        console.print(head, soft_wrap=True, highlight=False)
        console.print(Text(printable(question_of(trace)), style="dim"), soft_wrap=True, highlight=False)
        print_generation(trace.generation, console, with_legend=False)
        console.print()
        names = trace.generation.model_names
    if names:
        console.print(legend(names, in_colour(console)), soft_wrap=True, highlight=False)


def classes_table(figures: TokenFigures) -> Table:
    """Which kinds of tokens assistants wrote, and changed."""
    table = Table(title=f"{figures.tokens} {figures.unit}s of {figures.texts} texts", title_justify="left")
    table.add_column(f"kind of {figures.unit}")
    for heading in (f"{figures.unit}s", "deferred", "share", "changed", "share"):
        table.add_column(heading, justify="right")
    for name, counts in figures.classes.items():
        deferred, changed = f"{counts.deferred_share:.1%}", f"{counts.changed_share:.1%}"
        if not counts.tokens:
            deferred = changed = ""
        table.add_row(name, str(counts.tokens), str(counts.deferred), deferred, str(counts.changed), changed)
    return table
