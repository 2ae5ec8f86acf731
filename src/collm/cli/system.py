"""The system of the command line: its options, what can be found wrong without loading it, and the system itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from collm.cli.asking import as_options
from collm.cli.console import waiting
from collm.cli.options import date_option, machine_options, template_kwargs_option, together
from collm.cli.param_types import CacheSize
from collm.errors import CollmError
from collm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from collm.llm import CollaborativeLM
    from collm.llm.checking import Outline

model_options = together(
    click.option(
        "--assistant",
        "assistants",
        multiple=True,
        metavar="[NAME=]SPEC",
        help="An assistant: folder, hub id, .gguf file, pkg:PACKAGE/FILE.gguf, or calculator. Repeat it for several, "
        "in the order of training or by NAME. SPEC?dtype=bfloat16&device=cuda:1 places one by itself, "
        "SPEC?device_map=auto lays it over several devices, SPEC?quantization=nf4 (or int8) packs it. Or a model "
        "behind a server: vllm+http://host:8000?model=NAME, llamacpp+..., openai+... (docs/scaling.md).",
    ),
    click.option(
        "--base",
        metavar="SPEC",
        help="Where the base model lies, for a checkpoint that holds an adapter or a gate; for an export, the vLLM "
        "that serves it (vllm+http://host:8000).",
    ),
    click.option(
        "--max-cache-tokens",
        type=CacheSize(),
        metavar="N",
        help="Bounds each model's KV cache: texts at a time x their length. Below 1: a share of the memory that is "
        "free once it is loaded, which the models of a GPU divide.",
    ),
    click.option(
        "--compiled",
        is_flag=True,
        help="On a GPU: let torch compile the modules of models that have no forward pass of their own here, which "
        "takes minutes; then their passes take about a quarter less time.",
    ),
    template_kwargs_option,
    date_option,
    machine_options,
)


def check_llm(checkpoint: str, options: Mapping[str, Any], params: SamplingParams | None = None) -> Outline:
    """What can be found wrong with the system of the command line, and with what is asked of it, without loading it.

    Raises:
        CollmError: in the words of the command line.
    """
    from collm.llm.checking import check_request, outline

    try:
        found = outline(checkpoint, list(options["assistants"]), base=options["base"], dtype=options["dtype"])
        if params is not None and options.get("alone") is not None:
            check_request(found, params, options["alone"])
        elif params is not None:
            with waiting(f"loading {checkpoint}"):
                check_request(found, params)
    except CollmError as error:
        raise CollmError(as_options(str(error))) from None
    return found


def load_llm(
    checkpoint: str, options: Mapping[str, Any], params: SamplingParams | None = None, **settings: Any
) -> CollaborativeLM:
    """The system of the command line; it is told who writes by default, where `params` leave that to the checkpoint.

    Args:
        settings: further ones of `CollaborativeLM`.
    """
    with waiting(f"loading {checkpoint}"):
        from collm.llm import CollaborativeLM

        llm = CollaborativeLM.from_pretrained(
            checkpoint,
            assistants=list(options["assistants"]),
            base=options["base"],
            dtype=options["dtype"],
            device=options["device"],
            max_cache_tokens=options["max_cache_tokens"],
            compiled=options["compiled"],
            **settings,
        )
        if options["template_kwargs"] or options["date"]:
            _tell_templates(llm, options["template_kwargs"], options["date"])
    chosen = llm.info.chosen
    said = params is None or params.deferral is not None or params.deferral_rate is not None
    if chosen is not None and not said and options.get("alone") is None:
        from collm.llm.deferral import told

        click.echo(f"{told(chosen)}; --deferral-rate, --threshold and --method say otherwise", err=True)
    return llm


def _tell_templates(llm: CollaborativeLM, kwargs: Mapping[str, Any], day: str | None) -> None:
    """Each model's template is told what it reads; what none of them reads is refused."""
    from collm.data.formatting import Formatter, require_read

    require_read(llm.formatters, kwargs)
    if day is not None and all(formatter.day is None for formatter in llm.formatters):
        raise CollmError("--date: no chat template of this system tells the day: leave it out")
    told = {id(formatter): formatter.told(kwargs, day) for formatter in llm.formatters}
    llm.formatters = tuple[Formatter, ...](told[id(formatter)] for formatter in llm.formatters)


def identity(checkpoint: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a system, for people: what decides its answers is read from the models."""
    from collm.identity.comparing import NAMED

    return {
        NAMED: {"checkpoint": checkpoint, "assistants": list(options["assistants"]), "base": options["base"]},
    }
