"""`collm generate`: one answer, coloured by the model that wrote each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from collm.cli.asking import decoding_options, sampling_params
from collm.cli.console import Command, echo_json, read_stdin
from collm.cli.options import alone_option
from collm.cli.param_types import OUTPUT_FILE
from collm.cli.system import check_llm, load_llm, model_options
from collm.errors import CollmError
from collm.text import require_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from collm.llm import Chunk
    from collm.llm.checking import Outline
    from collm.types import Generation, Message


@click.command(cls=Command, short_help="Write an answer, coloured by author.")
@click.argument("checkpoint")
@click.argument("prompt")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="The prompt is text to be continued, not a user's message.")
@click.option("--stream", is_flag=True, help="Show tokens as they are written.")
@click.option("--plain", is_flag=True, help="The text alone, without colours, legend and figures.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, tokens, authors, gates, deferral rate.")
@click.option("--svg", type=OUTPUT_FILE, metavar="FILE", help="Also draw the coloured text into a file.")
@click.option("--trace", type=OUTPUT_FILE, metavar="FILE", help="Also append it to a trace file, for `collm trace`.")
@alone_option
@decoding_options
@model_options
def generate(checkpoint: str, prompt: str, system: str | None, raw: bool, **options: Any) -> None:
    """Let the models of CHECKPOINT answer PROMPT together ("-" reads it from standard input).

    CHECKPOINT may be a plain model, too; it has no gate, so --deferral is then never, always or a baseline.
    """
    if options["as_json"] and (options["stream"] or options["plain"]):
        raise click.UsageError("--json goes with neither --stream nor --plain")
    if raw and system is not None:
        raise click.UsageError("--system needs a chat template; it cannot go with --raw")
    params = sampling_params(options)
    question = read_stdin().rstrip("\n") if prompt == "-" else prompt
    if not question:
        raise click.UsageError("the prompt is empty")
    require_text(question, "the prompt")
    require_text(system or "", "the system prompt")
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages: list[Message] = [*before, {"role": "user", "content": question}]
    request = question if raw else messages

    outline = check_llm(checkpoint, options, params)
    if not raw:
        _require_template(outline, outline.has_chat_template)
    llm = load_llm(checkpoint, options, params)
    if not raw and outline.has_chat_template is None:  # of a hub id, say, it is known only now
        _require_template(outline, bool(llm.tokenizer.chat_template))
    if options["stream"]:
        chunks = llm.stream(request, params, alone=options["alone"])
        generation = _show_stream(chunks, llm.model_names, options["plain"])
    else:
        [generation] = llm.generate_batch([request], params, alone=options["alone"])
    _show(generation, options)
    _keep(generation, request, question, options)
    if generation.error is not None:
        raise CollmError(generation.error)


def _require_template(outline: Outline, there: bool | None) -> None:
    if there is False:
        raise CollmError(
            f"{outline.base} has no chat template, which a question needs: with --raw the models continue PROMPT as it "
            "stands"
        )


def _show_stream(chunks: Iterable[Chunk], names: Sequence[str], plain: bool) -> Generation:
    """Print tokens as they come: coloured on a terminal, with brackets elsewhere, or the text alone."""
    from rich.console import Console

    from collm.colours import printable
    from collm.report.terminal import Brackets, in_colour, token_text

    console, brackets = Console(), Brackets(len(names))
    coloured = in_colour(console)
    generation = None
    for chunk in chunks:
        if plain:
            click.echo(printable(chunk.text), nl=False)
        elif chunk.step is not None and coloured:
            console.print(token_text(chunk.piece, chunk.step), end="", soft_wrap=True, highlight=False)
        elif chunk.step is not None:
            click.echo(brackets.push(chunk.piece, chunk.step), nl=False)
        else:  # the rest of a character that the last token began
            click.echo(printable(chunk.piece), nl=False)
        generation = chunk.generation or generation
    click.echo(brackets.end())
    assert generation is not None, "the last chunk carries the generation"
    return generation


def _show(generation: Generation, options: dict[str, Any]) -> None:
    """What is still to be shown: all of it, or after streaming the legend and the figures."""
    from rich.console import Console

    from collm.report.terminal import in_colour, legend, print_generation, summary
    from collm.report.trace import generation_to_dict

    if options["as_json"]:
        figures = {"deferral_rate": generation.deferral_rate}
        echo_json({**generation_to_dict(generation), **figures})
    elif options["plain"]:
        if not options["stream"]:
            click.echo(generation.text)
        if not generation.text:
            click.echo(f"nothing was written: finished by {generation.finish_reason}", err=True)
    elif options["stream"]:
        console = Console(stderr=True)
        console.print(legend(generation.model_names, in_colour(Console())), soft_wrap=True, highlight=False)
        console.print(summary(generation), soft_wrap=True, highlight=False, markup=False)
    else:
        print_generation(generation)


def _keep(generation: Generation, request: str | list[Message], question: str, options: dict[str, Any]) -> None:
    """Write the files that were asked for."""
    from collm.files import write_text
    from collm.report.picture import generation_svg
    from collm.report.trace import Trace, append_trace

    if options["svg"] is not None:
        write_text(options["svg"], generation_svg(generation, question))
    if options["trace"] is not None:
        prompt = request if isinstance(request, str) else tuple(request)
        append_trace(options["trace"], Trace(id=question[:60], generation=generation, prompt=prompt))
