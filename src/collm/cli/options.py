"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from collm.cli.param_types import Device, JsonObject
from collm.evaluation.shipped import TASKS

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "bfloat16", "float16")


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


machine_options = together(
    click.option(
        "--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of the models' weights."
    ),
    click.option(
        "--device",
        type=Device(),
        default="cpu",
        show_default=True,
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, mps, or auto: the GPU if there is one.",
    ),
)

template_kwargs_option = click.option(
    "--template-kwargs",
    type=JsonObject(),
    default="{}",
    metavar="JSON",
    help='Variables of the chat templates that read them, such as {"enable_thinking": false}.',
)

date_option = click.option(
    "--date",
    metavar="DAY",
    help="Told by chat templates that ask for it, as 2026-07-26.  [default: the checkpoint's, or today]",
)

alone_option = click.option(
    "--alone", metavar="NAME", help="Only this model writes: base, or an assistant's name (a baseline)."
)

recipe_argument = click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
changes_argument = click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")

TASK_HELP = f"What answers are worth: {', '.join(TASKS)}; or MODULE:FUNCTION, of your own."

unsandboxed_option = click.option(
    "--unsandboxed",
    is_flag=True,
    help="Run the programs of mbpp without a sandbox: as you, with your files and your network.",
)

batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts written at once."
)
