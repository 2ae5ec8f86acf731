"""`collm score`: log-probabilities of the gold tokens under one model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.console import ResumableCommand, waiting
from collm.cli.examples import data_options, read_examples
from collm.cli.options import date_option, machine_options, template_kwargs_option
from collm.cli.param_types import EXISTING, OUTPUT_FOLDER
from collm.errors import CollmError
from collm.files import claimed

if TYPE_CHECKING:
    from collm.data.formatting import PromptFormat

TOLD = 1000
"""Examples that are read before scoring to tell how fine their chunks are: enough for a share, and done in a second."""


@click.command(cls=ResumableCommand, short_help="Score gold tokens under one model (once per model).")
@click.argument("data")
@click.option(
    "--model",
    required=True,
    metavar="SPEC",
    help="The model that is asked: base or assistant; or a server of it, vllm+http://host:8000 (docs/scaling.md).",
)
@click.option("--out", required=True, type=OUTPUT_FOLDER, metavar="DIR", help="Where the scores go.")
@click.option(
    "--base",
    metavar="SPEC",
    help="The base model, whose tokenizer and chat template settle the completions' tokens; needed for tools, and "
    "for assistants with a template of their own.  [default: the model itself]",
)
@click.option(
    "--with",
    "others",
    multiple=True,
    metavar="SPEC",
    help="Other models of the system, where their tokenizers differ: then chunks are scored, which all can write "
    "(collm pair-info). Name all of them for each model's scores.",
)
@click.option("--system", metavar="TEXT", help="System prompt for conversations that have none.")
@click.option("--chat-template", type=EXISTING, metavar="FILE", help="Jinja template instead of the tokenizer's own.")
@template_kwargs_option
@date_option
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Longer is cut off.")
@click.option("--batch-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Per forward pass.")
@click.option("--last-turn", is_flag=True, help="Of conversations, score the last assistant turn alone.")
@click.option("--restart", is_flag=True, help="Throw away what an earlier, stopped run left.")
@data_options
@machine_options
def score(
    data: str, model: str, out: Path, base: str | None, others: tuple[str, ...], restart: bool, **options: Any
) -> None:
    """Score the gold tokens of DATA under one model; run it once for the base and for each assistant.

    DATA is a JSONL file with "messages", or "prompt" and "completion"; or a Hugging Face dataset (folder or hub id).
    A stopped run resumes.
    """
    from collm.models.reach import require_model
    from collm.models.specs import is_tool, is_url

    tool, served = is_tool(model), is_url(model)
    shown_by = model
    """Whose tokenizer and chat template the model has."""
    if served:
        shown_by = _of_server(model, base)
    if tool and base is None:
        raise click.UsageError(f"{model} is a tool without a tokenizer of its own: give the base model with --base")
    others = tuple(spec for spec in others if not is_tool(spec) and spec not in (base, model))
    others = tuple(_of_server(spec, base or model) if is_url(spec) else spec for spec in others)
    for spec in (base, None if tool else shown_by, *others):
        if spec is not None:
            require_model(spec)
    examples = read_examples(data, options)
    with waiting(f"scoring {data} with {model}"):
        from collm.data.chunks import Reader, chunking_of, usable_in_chunks
        from collm.data.encoding import usable
        from collm.data.formatting import Formatter, PromptFormat
        from collm.data.scores import load_info
        from collm.data.scoring import score as score_model
        from collm.data.scoring import score_tool
        from collm.models.codec import ByteCodec
        from collm.models.loading import load_context_length, load_tokenizer
        from collm.models.pairing import cuts_between, require_free_tools, tell_chunking
        from collm.models.tools import make_tool

    format = _prompt_format(options)
    base_tokenizer = None if base is None else load_tokenizer(base)
    tokenizer = base_tokenizer if tool and base_tokenizer is not None else load_tokenizer(shown_by)
    first = tokenizer if base_tokenizer is None else base_tokenizer
    cuts = cuts_between([first, tokenizer, *map(load_tokenizer, others)], [base or model, model, *others])
    formatter = Formatter(tokenizer, format)
    completions_from = None
    if base_tokenizer is not None:
        # What ends a turn is the base's affair: its own template, or where it has none the one that is given.
        own = PromptFormat() if base_tokenizer.chat_template else PromptFormat(chat_template=format.chat_template)
        completions_from = Formatter(base_tokenizer, own).told(options["template_kwargs"])
    reader = None
    if cuts is None:
        examples = usable(examples, [completions_from or formatter, formatter], skip_bad=options["skip_bad"])
    else:
        require_free_tools(cuts, [make_tool(model, tokenizer)] if tool else [])
        of_base = Reader(completions_from or formatter, ByteCodec(first, cuts, name=base or model))
        reader = of_base
        if completions_from is not None and not tool:
            reader = Reader(formatter, ByteCodec(tokenizer, cuts, name=model), of_base)
        examples = usable_in_chunks(examples, [of_base, reader], skip_bad=options["skip_bad"])
    # As training does: scores for more than the base can read would not match.
    context = load_context_length(base or shown_by)
    max_length = min(options["max_length"], context or options["max_length"])
    if cuts is not None:
        read = (of_base.read(example, max_length) for example in examples[:TOLD])
        what = "this text" if len(examples) <= TOLD else f"this text's first {TOLD:,} examples"
        tell_chunking(chunking_of(read), [name for name in (base, model, *others) if name is not None], what)
    settings: dict[str, Any] = {
        "completions_from": completions_from,
        "max_length": max_length,
        "batch_tokens": options["batch_tokens"],
        "resume": not restart,
        "chunks": reader,
    }
    with claimed(out):  # before a model is loaded in vain
        if served:
            from collm.data.served import score_served
            from collm.remote.connecting import connect

            path = score_served(examples, connect(model, tokenizer), formatter, out, **settings)
        elif tool:
            path = score_tool(examples, make_tool(model, tokenizer), formatter, out, **settings)
        else:
            path = score_model(
                examples, model, formatter, out, dtype=options["dtype"], device=options["device"], **settings
            )
    _show(load_info(path))
    click.echo(f"scores written to {path}")


def _of_server(url: str, base: str | None) -> str:
    """Raises:
    CollmError: it cannot be told what tokenizer the server's model should have.
    """
    from collm.remote.address import Address

    address = Address.parse(url)
    address.key()
    spec = address.tokenizer or base
    if spec is None:
        raise CollmError(f"{address.urls[0]}: name the model's tokenizer (tokenizer=FOLDER in the URL), or give --base")
    return spec


def _show(info: Mapping[str, Any]) -> None:
    """Is the model any good at these texts? And how long do more of them take?"""
    speed, mean, top1 = info.get("tokens_per_second"), info["mean_log_prob"], info["top1_rate"]
    chunks = f" in {info['chunks']} chunks" if "chunks" in info else ""
    figures = [f"{info['num_examples']} examples, {info['labelled_tokens']} tokens{chunks} scored"]
    if mean is not None:
        figures.append(f"mean log-probability {mean:.3f}")
    elif info.get("answered_rate") is not None:
        figures.append(f"possible to the model {info['answered_rate']:.1%}")
    if top1 is not None:
        figures.append(f"its first choice {top1:.1%}")
    if speed is not None:
        figures.append(f"{speed:,.0f} tokens/s (prompts included)")
    if "approximate" in info:
        figures.append(f"approximate: {info['approximate']}")
    click.echo("; ".join(figures))


def _prompt_format(options: Mapping[str, Any]) -> PromptFormat:
    from collm.data.formatting import PromptFormat
    from collm.text import read_text

    template = options["chat_template"]
    return PromptFormat(
        system_prompt=options["system"],
        chat_template=None if template is None else read_text(template),
        template_kwargs=options["template_kwargs"],
        date=options["date"],
    )
