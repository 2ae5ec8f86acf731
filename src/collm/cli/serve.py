"""`collm serve`: a system behind the OpenAI API."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.asking import sampling_params, writer_options
from collm.cli.console import Command, waiting
from collm.cli.param_types import EXISTING
from collm.cli.system import check_llm, load_llm, model_options
from collm.errors import CollmError

if TYPE_CHECKING:
    from collm.llm import CollaborativeLM
    from collm.sampling_params import SamplingParams
    from collm.serving.limits import Access

KEY_VARIABLE = "COLLM_API_KEY"
EXAMPLES = "examples.txt"
DRAWING = {"max_tokens": 256, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "stop": ()}
"""A request says these itself."""


@click.command(cls=Command, short_help="Serve a system over the OpenAI API, with a page to try it on.")
@click.argument("checkpoint")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes any free one.")
@click.option("--name", metavar="NAME", help="What requests call the pair.  [default: the checkpoint's name]")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help=f"A key that requests must carry; repeat it for several. Better from {KEY_VARIABLE}, or a file.",
)
@click.option("--api-key-file", type=EXISTING, metavar="FILE", help="Keys, one a line.")
@click.option("--allow-host", "hosts", multiple=True, metavar="HOST", help="A name that this server goes by, too.")
@click.option("--allow-origin", "origins", multiple=True, metavar="URL", help="A site whose pages may ask (CORS).")
@click.option(
    "--max-num-seqs", type=click.IntRange(min=1), default=16, show_default=True, help="Texts written at a time."
)
@click.option(
    "--max-queue",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Texts that may wait; more are refused, with the time after which to ask again.",
)
@click.option("--max-model-len", type=click.IntRange(min=2), metavar="N", help="Bounds a text, prompt included.")
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0.1),
    default=600,
    show_default=True,
    metavar="SECONDS",
    help="How long a request may take.",
)
@click.option(
    "--pass-timeout",
    type=click.FloatRange(min=0.1),
    default=120,
    show_default=True,
    metavar="SECONDS",
    help="How long one pass of a model may take; then its texts end with an error.",
)
@click.option(
    "--examples",
    type=EXISTING,
    metavar="FILE",
    help="Questions that the page offers, one a line.  [default: examples.txt in the checkpoint]",
)
@writer_options
@model_options
def serve(checkpoint: str, **options: Any) -> None:
    """Serve CHECKPOINT and its assistants to any client of the OpenAI API.

    Requests name the model that is to write: the pair, or one of its models alone. Who writes is settled by the options
    below, unless a request says otherwise (field "collm"; docs/serving.md). It listens on this machine alone unless
    --host says otherwise; SIGTERM and Ctrl-C finish what is being written.
    """
    from collm.models.specs import is_url, server_name
    from collm.serving.server import address, bind, listen, log_to_stderr, run

    defaults = sampling_params({**options, **DRAWING})
    access = _access(options)
    examples = _examples(checkpoint, options["examples"])
    listening = bind(options["host"], options["port"])
    _require_servable(checkpoint, options, defaults)
    llm = load_llm(
        checkpoint,
        options,
        max_num_seqs=options["max_num_seqs"],
        max_model_len=options["max_model_len"],
        timeout=options["pass_timeout"],
    )

    from collm.serving.app import make_app
    from collm.serving.limits import Limits

    name = options["name"] or (server_name(checkpoint) if is_url(checkpoint) else Path(checkpoint).name or checkpoint)
    if name in llm.model_names:
        name = f"{name}-pair"
    llm.warm_up()
    limits = Limits(max_queue=options["max_queue"], request_timeout=options["request_timeout"])
    app = make_app(llm, name, defaults=defaults, limits=limits, access=access, examples=examples)
    # What is loaded stays: a collection of garbage that looked through all of it would halt every text meanwhile.
    gc.collect()
    gc.freeze()
    log_to_stderr()
    listen(listening)  # whoever reads the next line may ask
    _tell(llm, name, defaults, address(listening), bool(access.api_keys))
    run(app, listening)


def _access(options: dict[str, Any]) -> Access:
    """Who may ask, as the options have it."""
    from collm.serving.limits import LOOPBACK, Access

    keys = [*options["api_keys"]]
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    if options["api_key_file"] is not None:
        found = options["api_key_file"].read_text(encoding="utf-8").split()
        if not found:
            raise CollmError(f"{options['api_key_file']} holds no key")
        keys += found
    host = options["host"].strip("[]")
    # Whoever listens on an address of the network goes by names that only they know.
    local = host in LOOPBACK
    hosts = (*LOOPBACK, host, *map(str.lower, options["hosts"])) if local or options["hosts"] else ()
    return Access(tuple(keys), hosts, tuple(options["origins"]))


def _examples(checkpoint: str, given: Path | None) -> list[str]:
    """Questions that show what the pair is good for."""
    from collm.text import read_text

    own = Path(checkpoint) / EXAMPLES
    file = given or (own if own.is_file() else None)
    lines = [] if file is None else read_text(file).splitlines()
    return [line.strip() for line in lines if line.strip()]


def _require_servable(checkpoint: str, options: dict[str, Any], defaults: SamplingParams) -> None:
    """Tell what is wrong before the weights are loaded: models must be able to share a text."""
    from collm.llm.sources import matched
    from collm.models.specs import is_tool, is_url, split_spec

    found = check_llm(checkpoint, options, defaults)
    with waiting(f"loading {checkpoint}"):
        from collm.models.loading import load_tokenizer
        from collm.models.pairing import cuts_between
    pairs = zip(*matched(options["assistants"], found.info.assistants), strict=True)
    specs = {each.name: str(source) for each, source in pairs}
    # A server is compared when it is asked.
    own = {name: s for name, s in specs.items() if not is_tool(split_spec(s)[0]) and not is_url(split_spec(s)[0])}
    cuts_between([load_tokenizer(found.base), *map(load_tokenizer, own.values())], ["base", *own])


def _tell(llm: CollaborativeLM, name: str, defaults: SamplingParams, url: str, guarded: bool) -> None:
    """What is served."""
    import resource

    from collm.llm.deferral import settled

    tables = ", ".join(f"{table.task} ({table.signal})" for table in llm.info.calibration)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    base, *assistants = llm.model_names
    click.echo(f"base         {base}")
    click.echo(f"assistants   {', '.join(assistants) or 'none'}")
    click.echo(f"calibration  {tables or 'none: requests give a threshold, not a deferral rate'}")
    if assistants:
        click.echo(f"deferral     {_by_default(settled(defaults, llm.info.chosen))}, where a request does not say")
    click.echo(f"memory       {memory:.1f} GB")
    click.echo(f"models       {', '.join((name, *llm.model_names))}")
    click.echo(f"listening    {url}{'' if guarded else ' (no API key)'}")


def _by_default(params: SamplingParams) -> str:
    rate, threshold = params.deferral_rate, params.threshold
    dial = "" if rate is None and threshold is None else f" {threshold:g}" if rate is None else f", rate {rate:.1%}"
    return f"{params.deferral}{dial}"
