"""`collm pair-info`: can these models write one text, and in what pieces?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from collm.cli.console import Command, echo_json, waiting
from collm.cli.options import data_options, read_examples


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
    """
    from collm.models.specs import require_model

    for spec in (base, *assistants):
        require_model(spec)
    examples = None if data is None else read_examples(data, options)
    with waiting("reading the tokenizers"):
        from collm.data.chunks import Reader
        from collm.data.encoding import usable
        from collm.data.formatting import Formatter
        from collm.models.codec import ByteCodec, NotItsText
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
        reader = Reader(Formatter(tokenizers[0]), codecs[0])
        texts: list[str] = []
        refused: list[str] = []
        for example in usable(examples, [reader.formatter], skip_bad=options["skip_bad"]):
            try:
                texts += reader.texts(example)
            except NotItsText as error:
                refused.append(str(error))
        found = {str(data): chunking(codecs, cuts, texts, refused=refused)}
    if as_json:
        echo_json({**figures, "texts": {name: asdict(figure) for name, figure in found.items()}})
        return
    for spec, told in apart.items():
        click.echo(f"{spec}: " + ("the base's tokenizer" if told is None else f"another tokenizer ({told})"))
    for name, figure in found.items():
        click.echo(f"{name}: {figure}")
        if figure.doubt is not None:
            click.echo(f"warning: {figure.doubt}", err=True)
