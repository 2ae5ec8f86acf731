"""`collm init`: a recipe that runs, from flags or from questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.console import Command
from collm.cli.options import TASK_HELP
from collm.cli.param_types import OUTPUT_FILE
from collm.errors import CollmError, nearest

if TYPE_CHECKING:
    from collm.workflow.presets import Wanted

PARTS = ("train", "calibration", "test")
ASSISTANT_HELP = "Folder, hub id, .gguf file, or calculator. Repeat it for several.  [default: calculator, for tool]"


@click.command(cls=Command, short_help="Write a recipe that runs, for one's own pair.")
@click.argument("recipe", type=OUTPUT_FILE, default="recipe.yaml")
@click.option(
    "--preset",
    type=click.Choice(("specialist", "larger", "tool")),
    help="The kind of assistant: a specialist, a larger model, or a tool.",
)
@click.option("--base", metavar="SPEC", help="The model that learns when to ask: folder, hub id or .gguf file.")
@click.option("--assistant", "assistants", multiple=True, metavar="[NAME=]SPEC", help=ASSISTANT_HELP)
@click.option("--data", metavar="FILE", help="Examples (JSONL), split here into train, calibration and test parts.")
@click.option("--train", metavar="DATA", help="Instead of --data: training examples.")
@click.option("--calibration", metavar="DATA", help="Instead of --data: examples to choose the rate on.")
@click.option("--test", metavar="DATA", help="Instead of --data: examples to judge by.")
@click.option("--task", metavar="TASK", help=TASK_HELP)
@click.option("--out", metavar="DIR", help="Where the pair goes.  [default: runs/NAME of the recipe]")
@click.option("--tune", type=click.Choice(("lora", "full", "gate")), default="lora", show_default=True)
@click.option(
    "--target-rate",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="RATE",
    help="Share of tokens the assistants may write at most.  [default: of the preset]",
)
@click.option("--like", metavar="NAME", help="Instead: a copy of a shipped recipe, such as word_problems/pair.")
@click.option("--force", is_flag=True, help="Replace a recipe that is there.")
def init(recipe: Path, like: str | None, force: bool, **given: Any) -> None:
    """Write RECIPE (YAML; recipe.yaml if no name is given) for a pair of one's own, which `collm run RECIPE` runs.

    What no option tells is asked for on a terminal, and is a usage error elsewhere. Models and data are looked at, so
    that the recipe runs; --data splits one file into three, by a hash of the questions.
    """
    if recipe.exists() and not force:
        raise click.UsageError(f"{recipe} is there already: give another name, or --force to replace it")
    if like is not None:
        _copy(recipe, like)
        return
    asked = _asked(dict(given)) if interactive() else given
    _require(asked)
    if asked["tune"] == "lora":
        from collm.training.checking import require_packages

        require_packages(("accelerate", "peft"))
    parts = [_data_folder(recipe) / f"{name}.jsonl" for name in PARTS] if asked["data"] else []
    for part in parts:  # somebody's own, or of another recipe: pair.yaml and pair.yml have one folder
        if part.exists() and not force:
            raise click.UsageError(f"{part} is there already: give the recipe another name, or --force to replace it")
    with _all_or_nothing([*parts, recipe]):
        notes = _write(recipe, asked)
    if parts:
        click.echo(f"{asked['data']} split into {', '.join(map(str, parts))}", err=True)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"written to {recipe}; next: collm run {shlex.quote(str(recipe))}")


def _write(recipe: Path, asked: dict[str, Any]) -> list[str]:
    """The recipe and its data, looked at; what there is to be said about them."""
    from collm.files import write_text
    from collm.training.recipe import load_recipe
    from collm.workflow.checking import check_run
    from collm.workflow.presets import recipe_text

    wanted, notes = _wanted(recipe, asked)
    write_text(recipe, recipe_text(wanted, shlex.quote(str(recipe))))
    check_run(load_recipe(recipe))
    return notes


@contextmanager
def _all_or_nothing(paths: list[Path]) -> Iterator[None]:
    """Files that are written in the block are as they were before where it fails; so are folders that it makes."""
    before = {path: path.read_bytes() if path.is_file() else None for path in paths}
    new = {path.parent for path in paths if not path.parent.exists()}
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if content is not None:
                path.write_bytes(content)
            elif path.is_file():
                path.unlink()
        for folder in new:
            with suppress(OSError):  # something of others lies in it
                folder.rmdir()
        raise


def _data_folder(recipe: Path) -> Path:
    return recipe.parent / f"{recipe.stem}-data"


def interactive() -> bool:
    """Is there somebody to be asked?"""
    return sys.stdin.isatty()


def _copy(recipe: Path, like: str) -> None:
    from collm.files import write_text
    from collm.text import read_text
    from collm.workflow.presets import shipped

    known = shipped()
    if like not in known:
        hint = nearest(like, known, f"there are {', '.join(known)}")
        raise click.UsageError(f"--like {like}: there is no such recipe; {hint}")
    write_text(recipe, read_text(known[like]))
    click.echo(f"written to {recipe}; next: collm train {shlex.quote(str(recipe))}")


def _require(given: dict[str, Any]) -> None:
    """Raises UsageError for what is missing, or given twice."""
    lacking = [f"--{name}" for name in ("preset", "base", "task") if not given[name]]
    if not given["assistants"] and given["preset"] != "tool":
        lacking.append("--assistant")
    parts = [name for name in PARTS if given[name]]
    if given["data"] and parts:
        raise click.UsageError(f"--data is split into all three parts: leave out --{parts[0]}, or --data")
    if not given["data"] and len(parts) < 3:
        lacking.append("--data (or --train, --calibration and --test)")
    if lacking:
        raise click.UsageError(
            f"{', '.join(lacking)} missing, as in: collm init --preset tool --base HuggingFaceTB/SmolLM2-135M-Instruct "
            "--data examples.jsonl --task exact_match (on a terminal, collm init asks)"
        )


def _asked(given: dict[str, Any]) -> dict[str, Any]:
    """What the options leave open, from questions."""
    from collm.workflow.presets import KNOWN

    def ask(name: str, question: str, default: str | None = None) -> None:
        if not given[name]:
            given[name] = click.prompt(question, default=default, err=True)

    if not given["preset"]:
        for preset in KNOWN.values():
            click.echo(f"  {preset.name:<11} {preset.told}", err=True)
        choice = click.Choice(list(KNOWN))
        given["preset"] = click.prompt("What is the assistant?", type=choice, default="specialist", err=True)
    ask("base", "The model that learns when to ask (folder, hub id or .gguf file)")
    if not given["assistants"]:
        default = "calculator" if given["preset"] == "tool" else None
        given["assistants"] = (click.prompt("The assistant (folder, hub id or .gguf file)", default=default, err=True),)
    if not any(given[name] for name in ("data", *PARTS)):
        ask("data", 'Examples, one a line, {"messages": [...], "answer": ...} (docs/recipes.md, Data)')
    ask("task", "What an answer is worth: a task of docs/tasks.md, or MODULE:FUNCTION", default="exact_match")
    return given


def _wanted(recipe: Path, given: dict[str, Any]) -> tuple[Wanted, list[str]]:
    """What the recipe is made for, its data split, and what there is to be said about them."""
    from collm.evaluation.shipped import get_task
    from collm.llm.sources import matched
    from collm.models.reach import require_model
    from collm.models.specs import is_tool
    from collm.workflow.presets import Wanted
    from collm.workflow.splitting import look, split

    task = get_task(given["task"])
    task.require()
    require_model(given["base"])
    sources = list(given["assistants"] or ["calculator"])
    infos, specs = matched(sources, [])
    assistants = [(info.name, str(spec)) for info, spec in zip(infos, specs, strict=True)]
    for name, spec in assistants:
        if is_tool(spec) != (given["preset"] == "tool"):
            kind = "a tool" if is_tool(spec) else "no tool (there is: calculator)"
            raise CollmError(
                f"--preset {given['preset']}: {spec} is {kind}; take another preset, or another --assistant"
            )
        if not is_tool(spec):
            require_model(spec)
        if name == "base":
            raise CollmError(f"--assistant {spec}: give it a name other than base, as in --assistant helper={spec}")
    if given["data"]:
        parts = {name: str(path) for name, path in split(Path(given["data"]), _data_folder(recipe)).items()}
    else:
        parts = {name: given[name] for name in PARTS}
    notes = look(task, **parts)
    wanted = Wanted(
        preset=given["preset"],
        base=given["base"],
        assistants=tuple(assistants),
        task=given["task"],
        out=given["out"] or f"runs/{recipe.stem}",
        target_rate=given["target_rate"],
        tune=given["tune"],
        **parts,
    )
    return wanted, notes
