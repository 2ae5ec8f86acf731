"""What can be found wrong with a whole run before torch is imported or a weight is read."""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from collm.data.examples import JSON_SUFFIXES, Example, load_examples
from collm.errors import CollmError
from collm.evaluation.evaluate import near_duplicates
from collm.evaluation.shipped import get_task
from collm.evaluation.task import Task
from collm.models.reach import require_model
from collm.models.specs import is_tool
from collm.training.checking import check_recipe
from collm.training.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The questions of a run. `calibration` is empty where there is nothing to calibrate."""

    task: Task
    calibration: list[Example]
    test: list[Example]


def check_run(recipe: Recipe) -> Asked:
    """Is everything there that a run from scores to report needs?

    Raises:
        CollmError: the first thing that is not, by its key in the recipe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise CollmError(
            "collm run is one process: train with `accelerate launch -m collm train RECIPE`, then collm run goes on "
            "from there"
        )
    lacking = [key for key in ("task", "evaluation") if getattr(recipe, key) is None]
    if recipe.assistants and recipe.calibration is None:
        lacking.append("calibration")
    if lacking:
        raise CollmError(
            f"collm run wants the keys {', '.join(lacking)} in the recipe (collm init writes them; docs/recipes.md, "
            "Running a recipe); to train alone there is collm train"
        )
    assert recipe.task is not None and recipe.evaluation is not None
    task = get_task(recipe.task)
    task.require()
    check_recipe(recipe)
    if recipe.evaluation.fine_tuned_base and recipe.tune == "gate":
        raise CollmError("evaluation.fine_tuned_base: with tune: gate the base is not trained at all; leave it out")
    own = recipe.own_texts
    if own is not None and own.checkpoint is None and own.writer != "base" and recipe.evaluation.fine_tuned_base:
        raise CollmError(
            "own_texts: the base fine-tuned alone (evaluation.fine_tuned_base) learns the same texts, and knows "
            f"no assistant {own.writer!r}: give own_texts.checkpoint, a pair that has it"
        )
    for assistant in recipe.assistants:  # they write as well, even those whose scores are all given
        if not is_tool(assistant.model):
            try:
                require_model(assistant.model)
            except CollmError as error:
                raise CollmError(f"assistant {assistant.name!r}: {error}") from None
    calibration = [] if recipe.calibration is None else _examples("calibration.data", recipe.calibration.data, task)
    test = _examples("evaluation.data", recipe.evaluation.data, task)
    if recipe.calibration is not None and recipe.calibration.data == recipe.evaluation.data:
        raise CollmError("calibration.data and evaluation.data are one: a pair is not tested on what chose its rate")
    learnt = {
        key: load_examples(source, skip_bad=recipe.data.skip_bad)
        for key, source in (("data.train", recipe.data.train), ("own_texts.data", None if own is None else own.data))
        if source is not None and Path(source).suffix in JSON_SUFFIXES
    }
    parts = {**learnt, "calibration.data": calibration, "evaluation.data": test}
    for (first, a), (second, b) in itertools.combinations(parts.items(), 2):
        if second in learnt:
            continue  # the same questions may well be learnt twice
        shared = len({str(example.question) for example in a} & {str(example.question) for example in b})
        if shared:
            logger.warning(
                "%s and %s share %d questions: what was trained or tuned on says little about new ones (collm init "
                "splits a file into parts that share none)",
                first,
                second,
                shared,
            )
    return Asked(task, calibration if recipe.assistants else [], test)


def _examples(key: str, source: str, task: Task) -> list[Example]:
    try:
        found = load_examples(source)
        if not found:
            raise CollmError(f"{source} is empty")
        for example in found:
            task.gold(example)
        near_duplicates(found)
    except CollmError as error:
        raise CollmError(f"{key}: {error}") from None
    return found
