"""How a text is to be written, as options ask for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import click

from collm.cli.options import together
from collm.cli.param_types import Named
from collm.sampling_params import Deferral, OnAssistantError, SamplingParams
from collm.text import require_text

_who = together(
    click.option(
        "--deferral",
        "--method",
        "deferral",
        type=Named(get_args(Deferral)),
        help="What settles who writes a token; random and what follows are baselines.  [default: what collm run chose "
        "for the checkpoint, else threshold]",
    ),
    click.option(
        "--deferral-rate",
        type=click.FloatRange(0, 1),
        metavar="RATE",
        help="Share of tokens the assistants shall write; the checkpoint's calibration gives the threshold.",
    ),
    click.option(
        "--threshold",
        type=click.FloatRange(0),
        metavar="P",
        help="Defer where the gate (or the expected gain) exceeds this probability; for the baselines, the base's "
        "entropy in nats, the largest probability below which a model is in doubt, or the probability of asking.  "
        "[default: the checkpoint's rate, else 0.5, of the gate]",
    ),
    click.option(
        "--calibration-task",
        metavar="TASK",
        help="Whose calibration --deferral-rate means, if the checkpoint has several.",
    ),
)

_drawing = together(
    click.option("--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of one answer."),
    click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."),
    click.option(
        "--top-p",
        type=click.FloatRange(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Sample from the most probable tokens that hold this much.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Sample from so many tokens; 0 is all.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Fixes all random choices."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer; repeat it for several."),
)

_how = together(
    click.option(
        "--speculative/--no-speculative",
        default=None,
        help="Let models draft ahead where that saves time; the text is the same.  "
        "[default: where they have one tokenizer]",
    ),
    click.option(
        "--on-assistant-error",
        type=click.Choice(get_args(OnAssistantError)),
        default="fail",
        show_default=True,
        help="Where an assistant fails: end the text, or let the base write.",
    ),
)

decoding_options = together(_who, _drawing, _how)
writer_options = together(_who, _how)
"""Who writes, without how tokens are drawn."""


def sampling_params(options: Mapping[str, Any]) -> SamplingParams:
    """Takes what `decoding_options` put into `options`; combinations that make no sense are usage errors."""
    who = [name for name in ("threshold", "deferral_rate", "calibration_task") if options[name] is not None]
    if options.get("alone") is not None and (who or options["deferral"] is not None):
        raise click.UsageError(
            f"--alone lets one model write all of it: leave out {_option(who[0] if who else 'deferral')}, or --alone"
        )
    try:
        for stop in options["stop"]:
            require_text(stop, "--stop")
        params = SamplingParams(
            max_tokens=options["max_tokens"],
            temperature=options["temperature"],
            top_p=options["top_p"],
            top_k=options["top_k"],
            seed=options["seed"],
            stop=tuple(options["stop"]),
            deferral=options["deferral"],
            threshold=options["threshold"],
            deferral_rate=options["deferral_rate"],
            task=options["calibration_task"],
            speculative=options["speculative"],
            on_assistant_error=options["on_assistant_error"],
        )
        if who:
            from collm.llm.deferral import refuse_ignored

            refuse_ignored(params)
    except ValueError as error:
        raise click.UsageError(as_options(str(error))) from error
    return params


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def as_options(message: str) -> str:
    """A message about `SamplingParams` in the words of the command line."""
    message = re.sub(r"\bdeferral=['\"]?(\w+)['\"]?", r"--deferral \1", message)
    message = re.sub(r"\bdeferral_rate\b", "--deferral-rate", message)
    message = message.replace("defer to; give one, or", "defer to; give one with --assistant, or")
    message = re.sub(r"\bgive it as assistant (\S+=SPEC)", r"give --assistant \1", message)
    message = re.sub(r"\bname them as NAME=SPEC", "name them: --assistant NAME=SPEC", message)
    message = re.sub(r"^task\b", "--calibration-task", message)
    return re.sub(r"(?<!--deferral )\bthreshold\b", "--threshold", message)
