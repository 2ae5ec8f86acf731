"""`collm`: the group of commands."""

from __future__ import annotations

import difflib

import click

from collm import __version__
from collm.cli.answer import answer
from collm.cli.bench import bench
from collm.cli.calibrate import calibrate
from collm.cli.chat import chat
from collm.cli.compare import compare
from collm.cli.convert import convert
from collm.cli.demo import demo
from collm.cli.evaluate import evaluate
from collm.cli.export import export
from collm.cli.generate import generate
from collm.cli.init import init
from collm.cli.oracle import oracle
from collm.cli.pair_info import pair_info
from collm.cli.prepare import prepare
from collm.cli.report import report
from collm.cli.run import run
from collm.cli.score import score
from collm.cli.serve import serve
from collm.cli.trace import trace
from collm.cli.train import train
from collm.cli.vllm_serve import vllm_serve


class Commands(click.Group):
    """Listed in the order in which they are used; unknown ones name the nearest."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.commands)}"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="collm")
def main() -> None:
    """Language models that learn to write together, token by token.

    From training text to a pair that writes: score (once per model), train, calibrate, then generate or eval.
    """


for command in (
    prepare,
    convert,
    pair_info,
    init,
    run,
    score,
    train,
    calibrate,
    export,
    vllm_serve,
    generate,
    chat,
    serve,
    evaluate,
    answer,
    oracle,
    compare,
    report,
    trace,
    bench,
    demo,
):
    main.add_command(command)
