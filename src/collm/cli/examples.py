"""Examples that a command reads, and which of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from collm.cli.options import together

if TYPE_CHECKING:
    from collm.data.examples import Example
    from collm.evaluation.task import Task
    from collm.llm import CollaborativeLM

data_options = together(
    click.option("--split", default="train", show_default=True, help="Of a Hugging Face dataset."),
    click.option("--skip-bad", is_flag=True, help="Leave out rows that cannot be read or shown; say how many."),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N examples."),
)


def read_examples(source: str, options: Mapping[str, Any]) -> list[Example]:
    from collm.data.examples import load_examples

    own = {key: options[key] for key in ("split", "skip_bad", "last_turn") if key in options}
    examples = load_examples(source, **own)
    return examples[: options["limit"]]


def askable(llm: CollaborativeLM, examples: list[Example], options: Mapping[str, Any], task: Task) -> list[Example]:
    """With `--skip-bad`, the examples whose questions all models can be shown."""
    from collm.data.encoding import usable

    return usable(examples, llm.formatters, skip_bad=options["skip_bad"], question=task.question)
