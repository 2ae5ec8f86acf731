"""Options that several commands share, and what is made of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from collm.cli.console import waiting
from collm.errors import CollmError, nearest
from collm.evaluation.task import TASKS
from collm.files import require_place
from collm.sampling_params import Deferral, OnAssistantError, SamplingParams
from collm.text import require_text

if TYPE_CHECKING:
    from collm.data.examples import Example
    from collm.data.formatting import PromptFormat
    from collm.evaluation.task import Task
    from collm.llm import CollaborativeLM
    from collm.llm.checking import Outline

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "bfloat16", "float16")
EXISTING = click.Path(exists=True, path_type=Path)


class Output(click.Path):
    """A place for what is written; one that cannot be written is a usage error at once."""

    def __init__(self, folder: bool | None = None) -> None:
        super().__init__(path_type=Path)
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        try:
            require_place(path, folder=self.folder)
        except CollmError as error:
            self.fail(str(error), param, ctx)
        return path


OUTPUT, OUTPUT_FILE, OUTPUT_FOLDER = Output(), Output(folder=False), Output(folder=True)


class JsonObject(click.ParamType):  # type: ignore[type-arg]
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is no JSON ({error})", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return found


class Named(click.Choice[str]):
    """A choice among many names: whoever misspells one is told the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = nearest(str(value), map(str, self.choices))
            self.fail(f"{error.message.rstrip('.')}{hint and '; '}{hint or '.'}", param, ctx)


class Device(click.ParamType):  # type: ignore[type-arg]
    """A name that torch has for a device; others than the usual ones are judged by torch itself."""

    name = "device"
    USUAL = ("auto", "cpu", "cuda", "mps", "xpu")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, number = str(value).partition(":")
        hint = "" if kind in self.USUAL else nearest(kind, self.USUAL)
        if hint or not kind.isidentifier() or (colon and not number.isdecimal()):
            self.fail(f"there is no device {value!r}; {hint or 'use cpu, cuda, cuda:1, mps or auto'}", param, ctx)
        return str(value)


class CacheSize(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, or a share of the memory."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            # 1 is a token, and 1.0 might be meant as all of the memory: it is neither.
            found: int | float = int(value) if str(value).isdecimal() else float(value)
        except ValueError:
            found = 0
        if isinstance(found, int) and found >= 1:
            return found
        if not 0 < found < 1:
            self.fail(f"{value!r} is neither a number of tokens nor a share below 1, as 0.3", param, ctx)
        return found


def _together(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


machine_options = _together(
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

format_options = _together(
    click.option("--system", metavar="TEXT", help="System prompt for conversations that have none."),
    click.option(
        "--chat-template", type=EXISTING, metavar="FILE", help="Jinja template instead of the tokenizer's own."
    ),
    template_kwargs_option,
    date_option,
)

model_options = _together(
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

alone_option = click.option(
    "--alone", metavar="NAME", help="Only this model writes: base, or an assistant's name (a baseline)."
)

recipe_argument = click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
changes_argument = click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")

TASK_HELP = f"What answers are worth: {', '.join(TASKS)}; or MODULE:FUNCTION, of your own."
task_option = click.option("--task", required=True, metavar="TASK", help=TASK_HELP)

unsandboxed_option = click.option(
    "--unsandboxed",
    is_flag=True,
    help="Run the programs of mbpp without a sandbox: as you, with your files and your network.",
)

batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Texts written at once."
)

data_options = _together(
    click.option("--split", default="train", show_default=True, help="Of a Hugging Face dataset."),
    click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read or shown; say how many."),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N examples."),
)

_who = _together(
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

_drawing = _together(
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

_how = _together(
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

decoding_options = _together(_who, _drawing, _how)
writer_options = _together(_who, _how)
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
        raise click.UsageError(_as_options(str(error))) from error
    return params


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _as_options(message: str) -> str:
    """A message about `SamplingParams` in the words of the command line."""
    message = re.sub(r"\bdeferral=['\"]?(\w+)['\"]?", r"--deferral \1", message)
    message = re.sub(r"\bdeferral_rate\b", "--deferral-rate", message)
    message = message.replace("defer to; give one, or", "defer to; give one with --assistant, or")
    message = re.sub(r"\bgive it as assistant (\S+=SPEC)", r"give --assistant \1", message)
    message = re.sub(r"\bname them as NAME=SPEC", "name them: --assistant NAME=SPEC", message)
    message = re.sub(r"^task\b", "--calibration-task", message)
    return re.sub(r"(?<!--deferral )\bthreshold\b", "--threshold", message)


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
        raise CollmError(_as_options(str(error))) from None
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
    if chosen is not None and params is not None and options.get("alone") is None and not says_who(params):
        from collm.llm.deferral import told

        click.echo(f"{told(chosen)}; --deferral-rate, --threshold and --method say otherwise", err=True)
    return llm


def says_who(params: SamplingParams) -> bool:
    """Do they leave nothing of who writes to the checkpoint?"""
    return params.deferral is not None or params.deferral_rate is not None


def identity(checkpoint: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Names of a system, for people: what decides its answers is read from the models."""
    from collm.identity.comparing import NAMED

    return {
        NAMED: {"checkpoint": checkpoint, "assistants": list(options["assistants"]), "base": options["base"]},
    }


def read_examples(source: str, options: Mapping[str, Any]) -> list[Example]:
    from collm.data.examples import load_examples

    own = {key: options[key] for key in ("split", "skip_bad", "last_turn") if key in options}
    examples = load_examples(source, **own)
    return examples[: options["limit"]]


def askable(llm: CollaborativeLM, examples: list[Example], options: Mapping[str, Any], task: Task) -> list[Example]:
    """With `--skip-bad`, the examples whose questions all models can be shown."""
    from collm.data.encoding import usable

    return usable(examples, llm.formatters, skip_bad=options["skip_bad"], question=task.question)


def prompt_format(options: Mapping[str, Any]) -> PromptFormat:
    """Takes what `format_options` put into `options`."""
    from collm.data.formatting import PromptFormat
    from collm.text import read_text

    template = options["chat_template"]
    return PromptFormat(
        system_prompt=options["system"],
        chat_template=None if template is None else read_text(template),
        template_kwargs=options["template_kwargs"],
        date=options["date"],
    )


def _tell_templates(llm: CollaborativeLM, kwargs: Mapping[str, Any], day: str | None) -> None:
    """Each model's template is told what it reads; what none of them reads is refused."""
    from collm.data.formatting import Formatter, require_read

    require_read(llm.formatters, kwargs)
    if day is not None and all(formatter.day is None for formatter in llm.formatters):
        raise CollmError("--date: no chat template of this system tells the day: leave it out")
    told = {id(formatter): formatter.told(kwargs, day) for formatter in llm.formatters}
    llm.formatters = tuple[Formatter, ...](told[id(formatter)] for formatter in llm.formatters)
