"""`collm vllm-serve`: the base of a pair on vLLM."""

from __future__ import annotations

import click

from collm.cli.console import Command


@click.command(
    "vllm-serve",
    cls=Command,
    short_help="Start vLLM on an exported checkpoint, deferral decided inside.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
    options_metavar="[OPTIONS] [ANY FLAG OF VLLM]",
)
@click.argument("export")
@click.argument("flags", nargs=-1, type=click.UNPROCESSED, metavar="")
@click.option(
    "--start-timeout",
    type=click.FloatRange(min=1),
    default=1800,
    show_default=True,
    metavar="SECONDS",
    help="How long vLLM may take until it answers.",
)
@click.pass_context
def vllm_serve(ctx: click.Context, export: str, flags: tuple[str, ...], start_timeout: float) -> None:
    """Start vLLM on EXPORT, a folder that `collm export` wrote, so that the base stops where it defers.

    Every other flag goes to vLLM: --tensor-parallel-size, --quantization, --served-model-name, ... It listens on
    127.0.0.1 if no --host is given. Once it answers, a probe makes sure that it decides; if not, it is stopped and the
    command says why. Needs vLLM in the same environment, and collm[remote].
    """
    from collm.vllm_plugin.serve import Launch, serve, vllm_version

    launch = Launch.of(export, flags)
    version = vllm_version()

    def ready(url: str, model: str) -> None:
        names = ", ".join(info.name for info in launch.info.assistants)
        click.echo(f"ready: {model} on {url}, vLLM {version}, defers to {names}")

    status = serve(launch, start_timeout, ready)
    if status:
        click.echo(f"error: vLLM ended with status {status}; its own lines say why", err=True)
    ctx.exit(min(1, abs(status)))
