"""A run's output folder: whose it is, and that one process at a time works in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from collm import files
from collm.errors import CollmError
from collm.files import write_text
from collm.models.hub import CHECKPOINT
from collm.models.info import load_info
from collm.training.made_from import DAY, FILES, MADE_FROM, RUN, begun, confirm_finished, first_day, load_run
from collm.training.recipe import AFTER_TRAINING, Recipe

OURS = (MADE_FROM, FILES, DAY)
LOCK, OWN_TEXTS = ".lock", "own_texts.jsonl"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """For the length of the block the folder of a run, or of one to be, is this process's. Ask before removing there.

    Raises:
        CollmError: it holds something else, or another process works in it.
    """
    if out.is_dir() and not (out / RUN).is_file() and {path.name for path in out.iterdir()} - {"cache", LOCK}:
        raise CollmError(f"{out} is not empty and not a collm run: choose another out")
    with files.claimed(out, folder=True):
        yield


@contextmanager
def claimed(recipe: Recipe, restart: bool) -> Iterator[None]:
    """Make the output folder this recipe's and, for the length of the block, this process's.

    Raises:
        CollmError: the folder belongs to another recipe or to something else, or another process works in it.
    """
    with held(recipe.out):
        _claim(recipe, restart)
        yield


def _claim(recipe: Recipe, restart: bool) -> None:
    out, path = recipe.out, recipe.out / RUN
    wanted: dict[str, Any] = _identity(recipe)
    if restart:
        for name in ("checkpoints", "init", "tensorboard"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (*CHECKPOINT, RUN, "log.jsonl", OWN_TEXTS):
            for old in out.glob(name):
                old.unlink()
    run = load_run(out)
    found = _with_defaults({key: value for key, value in run.items() if key not in OURS}, out)
    differing = sorted(key for key in wanted if found.get(key) != wanted[key])
    # Own texts that were written on the first day may lie in the cache, though nothing else is begun.
    kept: dict[str, Any] = {DAY: date.today().isoformat() if differing else first_day(out)}
    if path.is_file() and begun(out):
        if differing:
            raise CollmError(
                f"{out} holds a run of another recipe (it differs in {', '.join(differing)}): "
                "choose another out, or pass --restart to train it anew"
            )
        kept |= {key: run[key] for key in OURS if key in run}
        if load_info(out) is not None:
            confirm_finished(recipe)
    write_text(path, json.dumps({**wanted, **kept}, indent=2))


def _identity(recipe: Recipe) -> dict[str, Any]:
    # Without what changes nothing about the training.
    left_out: dict[str, Any] = dict.fromkeys(("out", "cache", *AFTER_TRAINING), True)
    left_out |= {"training": {"save_minutes": True}, "own_texts": {"batch_size": True, "device": True}}
    return recipe.model_dump(mode="json", exclude=left_out)


def _with_defaults(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """A recipe kept by an earlier version, with the keys that there were not at the time."""
    try:
        return _identity(Recipe.model_validate({**found, "out": out}))
    except ValidationError:
        return found
