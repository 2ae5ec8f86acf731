"""What the docs quote is true: help pages, commands and their options, links, Python, settings of recipes."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import pytest
import yaml
from pydantic import BaseModel

from collm.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "pretrained" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(language: str) -> list[tuple[str, str]]:
    return [(page.name, text) for page in PAGES for kind, text in FENCE.findall(page.read_text()) if kind == language]


def quoted_commands() -> list[tuple[str, str]]:
    """(page, command line) for every line in a block that calls collm; continued lines are joined."""
    found = []
    for page, text in blocks("") + blocks("bash") + blocks("sh"):
        for line in text.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?collm \w", line):
                found.append((page, line.removeprefix("$ ").partition(" # ")[0]))
    return found


def test_help_pages_in_the_docs_are_the_real_ones() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "write_cli.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_quotes_commands() -> None:
    assert {"init", "run", "compare", "generate", "eval", "serve"} <= {
        shlex.split(line)[1] for page, line in quoted_commands() if page == "README.md"
    }


def test_the_readme_is_short_and_its_python_is_in_the_notebook() -> None:
    """The notebook is executed by `make site`, the README's commands by `make readme`."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    cells = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text())["cells"]
    notebook = "".join("".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code")
    [python] = [code for kind, code in FENCE.findall(text) if kind == "python"]
    lines = [line for line in python.splitlines() if line and not line.startswith("print")]
    assert lines and all(line in notebook for line in lines)


def test_examples_of_the_readme_that_lack_their_weights_are_told(tmp_path: Path) -> None:
    """`make readme` leaves those out, and only those; continued lines are one command."""
    script = runpy.run_path(str(ROOT / "docs" / "run_readme.py"))
    lines = script["commands"]((ROOT / "README.md").read_text())
    [(line, folders)] = [(line, found) for line in lines if (found := script["missing"](line, tmp_path))]
    assert line.startswith("collm generate pretrained/qwen") and len(folders) == 2
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    assert script["missing"](line, tmp_path) == []


SECTION = re.compile(r"^(?=## )", re.MULTILINE)
MEASURED = [*PAGES, *sorted((ROOT / "pretrained").glob("*/README.md")), *sorted((ROOT / "recipes").rglob("README.md"))]


@pytest.mark.parametrize("page", MEASURED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_where_qwen_is_measured_it_says_by_which_weights(page: Path) -> None:
    """They are 4-bit ones of packages, not the hub's: no figure may be taken for one of those."""
    for section in SECTION.split(page.read_text()):
        if "Qwen" in section and re.search(r"\d %", section):
            assert "Q4_K_M" in section, section.partition("\n")[0]


@pytest.mark.parametrize(("page", "line"), quoted_commands(), ids=lambda value: str(value)[:60])
def test_quoted_commands_parse(page: str, line: str) -> None:
    """Command, options and number of arguments; whether the files exist is not asked."""
    _, name, *arguments = shlex.split(line)
    command = main.commands[name]
    with click.Context(command, **command.context_settings) as ctx:
        _, left, _ = command.make_parser(ctx).parse_args(arguments)
    assert left == []


@pytest.mark.parametrize(("page", "text"), blocks("python"), ids=lambda value: str(value)[:30])
def test_quoted_python_compiles(page: str, text: str) -> None:
    compile(text, page, "exec")


@pytest.mark.parametrize(("page", "text"), blocks("yaml"), ids=lambda value: str(value)[:30])
def test_quoted_recipes_are_valid(page: str, text: str) -> None:
    from collm.training.recipe import parse_recipe

    parse_recipe(yaml.safe_load(text), page)


WORDS = {str: "text", Path: "path", int: "integer", float: "number", bool: "true/false", list[str]: "list of texts"}
WORDS |= {list[float]: "list of numbers"}


def type_in_words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(get_args(annotation))
    if get_origin(annotation) is dict:
        return "mapping"
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    if annotation in WORDS or not kinds:
        return WORDS[annotation]
    return ", or ".join(WORDS[kind] for kind in kinds)


def recipe_keys(section: type[BaseModel], prefix: str = "") -> dict[str, tuple[str, str]]:
    """Type and default of every key, sections taken apart."""
    found: dict[str, tuple[str, str]] = {}
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        # A list of sections, or one that may be left out.
        inner = next((kind for kind in get_args(annotation) if isinstance(kind, type)), annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= recipe_keys(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else json.dumps(field.default).strip('"')
            found[prefix + name] = (type_in_words(annotation), default.replace("null", "none"))
    return found


def test_the_table_of_recipe_keys_is_whole_and_true() -> None:
    from collm.training.recipe import Recipe

    told: dict[str, tuple[str, str]] = {}
    section = (ROOT / "docs" / "recipes.md").read_text().partition("## All keys")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
        keys, kind, default, meaning = row.split(" | ")
        assert meaning
        told |= dict.fromkeys(re.findall(r"`([^`]+)`", keys), (kind, default))
    assert told == recipe_keys(Recipe)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    from collm.training.recipe import load_recipe

    load_recipe(recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_task_and_format_is_documented() -> None:
    from collm.data.sources import FORMATS
    from collm.evaluation.shipped import TASKS

    page = (ROOT / "docs" / "tasks.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.MULTILINE))
    assert told == {name: str(task.version) for name, task in TASKS.items()}
    for name, task in TASKS.items():
        [row] = re.findall(rf"^\| `{name}` \| \d.*$", page, re.MULTILINE)
        words = row.lower().replace("-", "").replace(" ", "")
        assert all(metric.replace("_", "") in words for metric in (*map(str.lower, task.metrics), *task.of_all))
    formats = page.partition("| format |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", formats, re.MULTILINE) == list(FORMATS)
