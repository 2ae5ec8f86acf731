"""What a run is made from, beyond the words of its recipe: the data, and the models' weights, where these point to.

Kept in `run.json`, beside the recipe. A run that goes on must find the same; so must one that is finished, before it
is told again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from collm.data.examples import Example, examples_fingerprint
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.evaluation.shipped import get_task
from collm.files import write_text
from collm.identity.comparing import differing
from collm.models.specs import adapter_config, is_tool, locate
from collm.training.dataset import digest, load_asked, load_split
from collm.training.recipe import Recipe

logger = logging.getLogger(__name__)

RUN = "run.json"
"""The recipe that the folder belongs to, so that another recipe does not go on from its checkpoints."""
MADE_FROM, FILES, DAY = "made_from", "files", "day"
"""What `run.json` holds besides the recipe: what the run is made from; what the models' files looked like, by name,
size and time; the day on which it began."""
OF_WEIGHTS = (".safetensors", ".gguf")


def load_run(out: Path) -> dict[str, Any]:
    """`run.json`; empty where there is none, or a damaged one."""
    try:
        found = json.loads((out / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def begun(out: Path) -> bool:
    """Is there anything that a run would go on from?"""
    return any((out / name).exists() for name in ("collm.json", "checkpoints", "init"))


def first_day(out: Path) -> str:
    """The day that templates are told which ask for it: that on which the run began, so that its prompts stay."""
    return str(load_run(out).get(DAY) or date.today().isoformat())


def data_identity(splits: Mapping[str, Sequence[Example]]) -> dict[str, str]:
    return {split: examples_fingerprint(examples) for split, examples in splits.items()}


def confirm(
    recipe: Recipe,
    splits: Mapping[str, Sequence[Example]],
    base: Mapping[str, Any],
    formatter: Formatter,
    scores: Mapping[str, Mapping[str, Any]],
    *,
    write: bool,
) -> None:
    """Refuse to go on with what was made from something else; note what a new run is made from.

    Args:
        splits: as they were loaded, and what is learnt of own texts.
        base: `local_identity` of the base.
        scores: fingerprints of each model's scores, by split: they tell its weights.
        write: this is the process that writes.

    Raises:
        CollmError: naming what differs.
    """
    from collm.identity.finding import prompts_identity

    now = {
        "data": data_identity(splits),
        "base": {**base, "prompts": prompts_identity(formatter)},
        "scores": {name: dict(by_split) for name, by_split in scores.items()},
        **_asked_identity(recipe, splits["train"]),
    }
    run = load_run(recipe.out)
    if begun(recipe.out):
        _require_same(recipe.out, run.get(MADE_FROM), now)
    if write:
        stamps = {spec: stamp(spec) for spec in _specs(recipe)}
        write_text(recipe.out / RUN, json.dumps({**run, MADE_FROM: now, FILES: stamps}, indent=2))


def confirm_finished(recipe: Recipe) -> None:
    """Refuse to tell a finished run again if its data or models have changed since.

    Models are read only where their files look otherwise than they did.

    Raises:
        CollmError: naming what differs.
    """
    run = load_run(recipe.out)
    if MADE_FROM not in run:
        return  # of an older version: it is whole, and nobody can say more of it
    there, splits = run[MADE_FROM], dict(zip(("train", "validation"), load_split(recipe.data), strict=True))
    # What is learnt of own texts follows from the rest.
    now = {"data": data_identity(splits), **_asked_identity(recipe, splits["train"])}
    kept = {key: value for key, value in there["data"].items() if key in splits}
    _require_same(recipe.out, {**{key: there[key] for key in now if key in there}, "data": kept}, now)
    if run[FILES].get(recipe.base.model) != stamp(recipe.base.model):
        from collm.identity.known import Opened

        logger.info("the files of %s have changed since: comparing weights", recipe.base.model)
        kept = {key: value for key, value in there["base"].items() if key != "prompts"}
        _require_same(recipe.out, {"base": kept}, {"base": Opened(recipe.base.model, dtype=recipe.base.dtype).identity})
    for spec, role in list(_specs(recipe).items())[1:]:
        if run[FILES].get(spec) != stamp(spec):
            logger.warning(
                "the files of %s have changed since %s was trained with it as %r (--restart trains it anew)",
                spec,
                recipe.out,
                role,
            )


def _asked_identity(recipe: Recipe, train: Sequence[Example]) -> dict[str, dict[str, str]]:
    """The questions that writers of own texts are asked, and by what their answers are judged."""
    section = recipe.own_texts
    if section is None:
        return {}
    task, asked = get_task(section.task), load_asked(recipe, train)
    answers = [str(example.fields.get("answer")) for example in asked]
    told = {"task": f"{task.name} v{task.version}", "questions": digest([examples_fingerprint(asked), answers])}
    return {"own_texts": told}


def _specs(recipe: Recipe) -> dict[str, str]:
    """The models of a run and what they are in it, the base first."""
    specs = {section.model: section.name for section in recipe.assistants}
    own = recipe.own_texts
    writers = {} if own is None or own.checkpoint is None else {own.checkpoint: "writer of own_texts"}
    return {recipe.base.model: "base", **writers, **specs}


def _require_same(out: Path, there: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    if there is None:
        raise CollmError(
            f"{out} was begun by an older collm, which did not note the data and weights it was made from: choose "
            "another out, or pass --restart to train it anew"
        )
    what = differing(there, now)
    if what:
        raise CollmError(
            f"{out} holds a run that was made from something else (it differs in {', '.join(what)}): choose another "
            "out, or pass --restart to train it anew"
        )


def stamp(spec: str, of: tuple[str, ...] = OF_WEIGHTS) -> dict[str, list[int]] | None:
    """What a model's files that end so look like: size and time of change of each; None where that cannot be told (the
    hub's, whose folder is replaced whole)."""
    if is_tool(spec):
        return {}
    try:
        place = Path(locate(spec))
        config = adapter_config(spec)
    except CollmError:
        return None
    if not place.exists():
        return None
    found = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.name.endswith(of))
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}
    if config is not None:
        base = stamp(str(config["base_model_name_or_path"]), of)
        stamps |= {f"base/{name}": told for name, told in (base or {}).items()}
    return stamps
