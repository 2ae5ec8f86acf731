"""`collm bench`: what writing together costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from collm.cli.console import ResumableCommand, waiting
from collm.cli.options import F, machine_options
from collm.cli.param_types import OUTPUT_FILE, OUTPUT_FOLDER

if TYPE_CHECKING:
    from collm.bench.pairs import Pair

KINDS = ("pair", "engine", "batch", "growth", "card")


def _list(name: str, kind: click.IntRange | click.FloatRange, default: str, help: str) -> Callable[[F], F]:
    """An option that takes several numbers, `0.1,0.2,0.5`."""

    def numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
        convert: Callable[..., float] = kind.convert
        return tuple(convert(part.strip(), param, ctx) for part in value.split(","))

    return click.option(name, callback=numbers, default=default, show_default=True, metavar="N,N,...", help=help)


@click.command(cls=ResumableCommand, short_help="Measure what writing together costs, beside its ceilings.")
@click.option(
    "--pair",
    type=click.Choice(("synthetic", "truncated", "models")),
    default="synthetic",
    show_default=True,
    help="Random models whose cost ratio and agreement are dials; the first layers of a model with all of them; "
    "any two models.",
)
@click.option("--base", metavar="SPEC", help="A model or checkpoint; of it, truncated takes the first layers.")
@click.option("--assistant", metavar="SPEC", help="Of --pair models: a model, calculator, or tiny (a random one).")
@click.option(
    "--layers", type=click.IntRange(min=1), default=6, show_default=True, help="Of --pair truncated: the base's."
)
@click.option(
    "--shape",
    type=click.Choice(("small", "cpu", "gpu")),
    default="cpu",
    show_default=True,
    help="Of --pair synthetic: a base of 1M, 16M or 1B parameters.",
)
@_list("--cost-ratio", click.FloatRange(min=1), "8", "Of --pair synthetic: assistant's pass to base's.")
@_list("--agreement", click.FloatRange(0, 1), "0.9", "Of --pair synthetic: how often both would write the same.")
@_list("--rate", click.FloatRange(0, 1), "0,0.1,0.2,0.3,0.5", "Deferral rates.")
@_list("--batch", click.IntRange(min=1), "1,4,16", "Texts written at once.")
@_list("--context", click.IntRange(min=1), "128,512,1024,2048,4096", "Prompt lengths of the growth cells.")
@click.option(
    "--only",
    type=click.Choice(KINDS),
    multiple=True,
    help="pair: together and alone; engine: against transformers; batch: one text against many; growth: long "
    "contexts; card: passes against a GPU's memory. Repeat it for several.  [default: all]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Besides one to warm up.")
@click.option("--tokens", type=click.IntRange(min=2), default=64, show_default=True, help="Written in each text.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Of each prompt.")
@click.option("--quick", is_flag=True, help="Small defaults: one pair of tiny models, few rounds; under a minute.")
@click.option("--out", type=OUTPUT_FOLDER, metavar="DIR", help="Keeps every cell as it comes; a stopped run resumes.")
@click.option("--json", "json_file", type=OUTPUT_FILE, metavar="FILE", help="All figures, raw ones included.")
@click.option("--plot", type=OUTPUT_FILE, metavar="FILE", help="A picture (.png, .svg, .pdf).")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: torch's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Fixes all random choices.")
@machine_options
def bench(out: Path | None, json_file: Path | None, plot: Path | None, threads: int | None, **options: Any) -> None:
    """Time a pair of models writing together, beside each of them alone and beside what could be reached at best.

    Everything is interleaved on the same prompts; figures are medians with 95 % intervals, and ceilings come from
    forward passes measured in the same rounds.
    """
    engine_batches = None
    if options["device"] == "auto":
        from collm.models.devices import best_device

        options["device"] = best_device()  # what is measured, and so what is asked of it
    if options["quick"]:
        quick = QUICK | (QUICK_ON_GPU if _on_gpu(options) else {})
        if _on_gpu(options):  # `generate` takes its time, and only one text at a time has a demand
            engine_batches = (1,)
        options |= {key: value for key, value in quick.items() if _left_alone(key)}
    kinds = [kind for kind in KINDS if kind != "card" or _on_gpu(options)]
    if not {*options["only"]} <= {*kinds}:
        raise click.UsageError("--only card measures a GPU: give --device cuda")
    if plot is not None:
        from collm.bench.result import check_plot

        check_plot(plot)
    pairs = _pairs(options)

    import torch

    from collm.bench.result import Kind
    from collm.bench.run import Plan, save
    from collm.bench.run import bench as run
    from collm.bench.systems import Effort
    from collm.bench.table import tables
    from collm.report.terminal import print_table

    if threads is not None:
        torch.set_num_threads(threads)
    plan = Plan(
        pairs,
        [kind for kind in get_args(Kind) if kind in (options["only"] or kinds)],
        options["batch"],
        options["rate"],
        options["context"],
        Effort(options["rounds"], options["tokens"], options["prompt_tokens"], options["seed"]),
        {key: options[key] for key in ("pair", "base", "assistant", "layers", "shape", "dtype", "device")},
        engine_batches,
        compiled=not options["quick"],
    )
    result = run(plan, out)
    if json_file is not None:
        save(result, json_file)
    if plot is not None:
        from collm.bench.plot import save_plot

        save_plot(result, plot)
    for table in tables(result):
        print_table(table)


QUICK: dict[str, Any] = {
    "pair": "synthetic",
    "shape": "small",
    "cost_ratio": (8.0,),
    "agreement": (0.9,),
    "rate": (0.3,),
    "batch": (1, 16),
    "context": (128, 1024),
    "rounds": 2,
    "tokens": 32,
    "prompt_tokens": 32,
}
"""The defaults that `--quick` changes."""


QUICK_ON_GPU: dict[str, Any] = {"shape": "gpu", "dtype": "bfloat16", "only": ("card", "pair", "engine")}
"""Those that it changes where there is a GPU, for which tiny models are no work."""


def _on_gpu(options: dict[str, Any]) -> bool:
    return str(options["device"]).startswith("cuda")


def _left_alone(name: str) -> bool:
    """Whether an option has its default."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT


def _pairs(options: dict[str, Any]) -> dict[str, Callable[[], Pair]]:
    """How to build each pair, by its name."""
    kind, base, assistant = options["pair"], options["base"], options["assistant"]
    if kind != "synthetic" and base is None:
        raise click.UsageError(f"--pair {kind} needs --base")
    if kind == "models" and assistant is None:
        raise click.UsageError("--pair models needs --assistant")
    if kind != "models" and assistant is not None:
        raise click.UsageError(f"--pair {kind} takes no --assistant")

    from collm.models.info import base_spec, load_info
    from collm.models.reach import require_model
    from collm.models.specs import is_tool

    for spec in (base, assistant):
        # `tiny` is a random model.
        if spec is not None and not (spec is assistant and (is_tool(spec) or spec == "tiny")):
            require_model(base_spec(spec, load_info(spec)))
    with waiting(f"measuring {kind} pairs"):
        from collm.bench import pairs

    where = {"dtype": options["dtype"], "device": options["device"]}
    if kind == "truncated":
        layers = options["layers"]
        return {pairs.truncated_name(base, layers): partial(pairs.truncated, base, layers, **where)}
    if kind == "models":
        return {pairs.models_name(base, assistant): partial(pairs.models, base, assistant, **where)}
    return {
        pairs.synthetic_name(ratio, agreement): partial(
            pairs.synthetic, options["shape"], ratio, agreement, seed=options["seed"], **where
        )
        for ratio in options["cost_ratio"]
        for agreement in options["agreement"]
    }
