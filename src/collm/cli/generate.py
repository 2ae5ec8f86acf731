"""`collm generate`: one answer, coloured by the model that wrote each token."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from collm.cli.console import Command
from collm.cli.options import OUTPUT, decoding_options, load_llm, model_options, sampling_params

if TYPE_CHECKING:
    from collm.types import Message


@click.command(cls=Command, short_help="Write an answer, coloured by author.")
@click.argument("checkpoint")
@click.argument("prompt")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="The prompt is text to be continued, not a user's message.")
@click.option("--stream", is_flag=True, help="Show tokens as they are written.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: text, tokens, authors, gates.")
@click.option("--svg", type=OUTPUT, metavar="FILE", help="Also draw the coloured text into a file.")
@click.option("--trace", type=OUTPUT, metavar="FILE", help="Also append it to a trace file, for `collm trace`.")
@decoding_options
@model_options
def generate(checkpoint: str, prompt: str, system: str | None, raw: bool, **options: Any) -> None:
    """Let the models of CHECKPOINT answer PROMPT together ("-" reads it from standard input)."""
    if options["stream"] and options["as_json"]:
        raise click.UsageError("give --stream or --json, not both")
    if raw and system is not None:
        raise click.UsageError("--system needs a chat template; it cannot go with --raw")
    params = sampling_params(options)
    text = click.get_text_stream("stdin").read().rstrip("\n") if prompt == "-" else prompt
    if not text:
        raise click.UsageError("the prompt is empty")
    system_message: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    request: str | list[Message] = text if raw else [*system_message, {"role": "user", "content": text}]

    from collm.report.trace import generation_to_dict

    llm = load_llm(checkpoint, options)
    generation = llm.generate(request, params)
    if options["as_json"]:
        click.echo(json.dumps(generation_to_dict(generation), ensure_ascii=False))
