"""`collm pair-info`: can these models write one text, and in what pieces?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from collm.cli.console import Command, echo_json, waiting
from collm.cli.examples import data_options, read_examples

BARE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
"""How a model without a chat template is shown messages: a recipe has to give it some template."""


@click.command("pair-info", cls=Command, short_help="In what pieces can these models write one text?")
@click.argument("base", metavar="BASE")
@click.argument("assistants", metavar="ASSISTANT...", nargs=-1, required=True)
@click.option("--data", metavar="FILE", help="Your text: examples as for training.  [default: a few samples]")
@click.option("--json", "as_json", is_flag=True, help="The figures as one JSON object.")
@data_options
def pair_info(base: str, assistants: tuple[str, ...], data: str | None, as_json: bool, **options: Any) -> None:
    """Say whether BASE and the ASSISTANTs share a tokenizer, and if not, where they can take turns.

    Models with different tokenizers change over at *cuts*: places between two bytes that no token of any of them holds
    side by side. What lies between two cuts is a chunk, which one model writes. Only tokenizers are read, no weights.

    Of your text, rows that one of the models cannot learn are counted. Each is shown them by its own chat template, or
    bare where it has none.
    """
    from collm.models.reach import require_model

    for spec in (base, *assistants):
        require_model(spec)
    examples = None if data is None else read_examples(data, options)
    with waiting("reading the tokenizers"):
        from collm.data.chunks import Reader, chunking_for
        from collm.data.formatting import Formatter, PromptFormat
        from collm.models.codec import ByteCodec
        from collm.models.loading import load_tokenizer
        from collm.models.pairing import SAMPLES, chunking, cuts_between
        from collm.models.tokenizers import difference

    specs = (base, *assistants)
    tokenizers = [load_tokenizer(spec) for spec in specs]
    names = [Path(spec).name or spec for spec in specs]
    cuts = cuts_between(tokenizers, names)
    apart = {
        spec: difference(tokenizers[0], tokenizer, (names[0], name))
        for spec, tokenizer, name in zip(assistants, tokenizers[1:], names[1:], strict=True)
    }
    figures: dict[str, Any] = {"base": base, "assistants": apart, "cuts": None if cuts is None else cuts.fingerprint}
    if cuts is None:
        if as_json:
            echo_json(figures)
        else:
            click.echo("one tokenizer: every token is a chunk, and the models take turns at each")
        return
    codecs = [ByteCodec(tokenizer, cuts, name=name) for tokenizer, name in zip(tokenizers, names, strict=True)]
    if examples is None:
        found = {name: chunking(codecs, cuts, [text]) for name, text in SAMPLES.items()}
    else:
        formatters = [
            Formatter(tokenizer, PromptFormat(chat_template=None if tokenizer.chat_template else BARE))
            for tokenizer in tokenizers
        ]
        of_base = Reader(formatters[0], codecs[0])
        others = [
            Reader(formatter, codec, of_base) for formatter, codec in zip(formatters[1:], codecs[1:], strict=True)
        ]
        found = {str(data): chunking_for(examples, [of_base, *others])}
    if as_json:
        echo_json({**figures, "texts": {name: asdict(figure) for name, figure in found.items()}})
        return
    for spec, told in apart.items():
        click.echo(f"{spec}: " + ("the base's tokenizer" if told is None else f"another tokenizer ({told})"))
    for name, figure in found.items():
        click.echo(f"{name}: {figure}")
        if figure.doubt is not None:
            click.echo(f"warning: {figure.doubt}", err=True)
