"""`collm run`: scores, training, calibration, evaluation and report of one recipe; started again, it goes on."""

from __future__ import annotations

import gc
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from collm.calibration import calibrate, store_table, trained_state, write_curve
from collm.evaluation.evaluate import evaluate
from collm.evaluation.overview import Overview, write_overview
from collm.evaluation.result import EvalResult, result_path
from collm.evaluation.written import read_written
from collm.identity.comparing import NAMED
from collm.llm import CollaborativeLM
from collm.llm.deferral import METHODS, rate_of
from collm.models.info import CalibrationTable, Chosen, load_info
from collm.models.specs import is_tool
from collm.sampling_params import SamplingParams
from collm.training.folder import held
from collm.training.made_from import first_day
from collm.training.recipe import Recipe, parse_recipe
from collm.training.train import train
from collm.training.writers import formatter_of
from collm.types import told_rate
from collm.workflow.checking import Asked

logger = logging.getLogger(__name__)

CALIBRATION, EVALUATION, FINE_TUNED, REPORT = "calibration", "evaluation", "base_alone", "report.html"
"""What a run leaves in the checkpoint's folder."""
PAIR = "pair"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    `rival`: the pair, which the others are tested against; or the base, if it is alone. `chosen`: who writes from now
    on where nobody says otherwise.
    """

    results: list[EvalResult]
    files: list[Path]
    rival: EvalResult
    table: CalibrationTable | None
    chosen: Chosen | None
    report: Path


@dataclass(frozen=True)
class Way:
    """One way of answering the test questions."""

    name: str
    params: SamplingParams
    alone: str | None = None

    @property
    def file(self) -> str:
        return re.sub(r"\W+", "_", self.name).strip("_") + ".jsonl"


def run(recipe: Recipe, asked: Asked, *, restart: bool = False, progress: bool = True) -> Outcome:
    """All steps of a recipe that has `task`, `calibration` and `evaluation`; each goes on where it was stopped.

    Args:
        asked: from `check_run`.
        restart: throw away what an earlier run of the recipe left.

    Raises:
        CollmError: anything the user can put right.
    """
    # To the end: whoever trained the pair anew meanwhile would get answers of two pairs into one report.
    with held(recipe.out):
        if restart:
            for name in (CALIBRATION, EVALUATION, FINE_TUNED):
                shutil.rmtree(recipe.out / name, ignore_errors=True)
            (recipe.out / REPORT).unlink(missing_ok=True)
        return _run(recipe, asked, restart, progress)


def _run(recipe: Recipe, asked: Asked, restart: bool, progress: bool) -> Outcome:
    assert recipe.evaluation is not None
    steps = _Steps(2 + bool(recipe.assistants) + recipe.evaluation.fine_tuned_base)
    out = recipe.out
    steps.begin(f"scores and training, in {out}")
    train(recipe, restart=restart, progress=progress)
    fine_tuned = None
    if recipe.evaluation.fine_tuned_base:
        fine_tuned = base_alone(recipe)
        steps.begin(f"the base alone on the same data, in {fine_tuned.out}")
        train(fine_tuned, progress=progress)
    table = None
    answers: list[Path] = []
    if recipe.assistants:
        steps.begin(f"calibration on {len(asked.calibration)} questions, in {out / CALIBRATION}")
        with _loaded(recipe, str(out), _assistants(recipe)) as llm:
            table = _calibrated(recipe, asked, llm, progress)
            steps.begin(f"evaluation on {len(asked.test)} questions, in {out / EVALUATION}")
            answers += _answered(recipe, asked, llm, _ways_of_pair(recipe, table), str(out), progress)
            control = _at_random(recipe, table, answers[-1])
            answers += _answered(recipe, asked, llm, control, str(out), progress)
    else:
        steps.begin(f"evaluation on {len(asked.test)} questions, in {out / EVALUATION}")
    others = [] if recipe.tune == "gate" else [("base as it came", recipe.base.model)]
    if fine_tuned is not None:
        others.append(("base fine-tuned alone", str(fine_tuned.out)))
    elif not recipe.assistants:
        others.append(("base fine-tuned", str(out)))
    first = []
    for name, spec in others:
        with _loaded(recipe, spec) as llm:
            if spec == recipe.base.model:  # a plain model does not know how the recipe shows it its prompts
                llm.formatters = (formatter_of(llm.tokenizer, recipe.base, first_day(out)),)
            way = Way(name, replace(_params(recipe), deferral="never"))
            first += _answered(recipe, asked, llm, [way], spec, progress)
    return _reported(recipe, [*first, *answers], table)


def base_alone(recipe: Recipe) -> Recipe:
    """The recipe of the fairest rival: the base, fine-tuned in the same way on the same data, without assistants."""
    values = recipe.model_dump(mode="json")
    values |= {"objective": "sft", "assistants": [], "target_rate": None, "deferral_cost": 0.0}
    values |= {"out": str(recipe.out / FINE_TUNED), "cache": str(recipe.cache_folder)}
    values["base"] |= {"scores": None, "validation_scores": None}
    values |= dict.fromkeys(("task", "calibration", "evaluation"))
    return parse_recipe(values)


class _Steps:
    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def begin(self, what: str) -> None:
        self.at += 1
        logger.info("step %d of %d: %s", self.at, self.count, what)


def _assistants(recipe: Recipe) -> list[str]:
    """Placed as the recipe says; tools are found by themselves."""
    return [f"{a.name}={a.model}" for a in recipe.assistants if not is_tool(a.model)]


class _loaded:
    """A system for the length of a block; its memory is free afterwards."""

    def __init__(self, recipe: Recipe, spec: str, assistants: list[str] | None = None) -> None:
        self.settings: dict[str, Any] = {"dtype": recipe.generation.dtype, "device": recipe.generation.device}
        self.spec, self.assistants, self.recipe = spec, assistants or [], recipe

    def __enter__(self) -> CollaborativeLM:
        logger.info("loading %s", self.spec)
        self.llm = CollaborativeLM.from_pretrained(self.spec, self.assistants, **self.settings)
        return self.llm

    def __exit__(self, *_: object) -> None:
        self.llm.close()
        del self.llm
        gc.collect()


def _params(recipe: Recipe) -> SamplingParams:
    return SamplingParams(max_tokens=recipe.generation.max_tokens, seed=recipe.training.seed)


def _calibrated(recipe: Recipe, asked: Asked, llm: CollaborativeLM, progress: bool) -> CalibrationTable:
    section, out = recipe.calibration, recipe.out
    assert section is not None
    trained = trained_state(out)
    table = calibrate(
        llm,
        asked.task,
        asked.calibration,
        signal=section.signal,
        target_rates=section.rates,
        rounds=section.rounds,
        params=_params(recipe),
        batch_size=recipe.generation.batch_size,
        out=out / CALIBRATION,
        identity=_identity(recipe, str(out)),
        progress=progress,
    )
    store_table(out, table, chosen=_chosen_rate(recipe, table), trained=trained)
    write_curve(table, out / CALIBRATION)
    info = load_info(out)
    assert info is not None
    llm.info = llm.info.model_copy(update={"calibration": info.calibration, "chosen": info.chosen})
    return table


def _chosen_rate(recipe: Recipe, table: CalibrationTable) -> float:
    """The rate at which the pair writes from now on: the only one that the recipe wants, or the best one found."""
    assert recipe.evaluation is not None and table.best is not None
    rates = recipe.evaluation.rates
    return rates[0] if len(rates) == 1 else rate_of(table.rows[table.best])


def _ways_of_pair(recipe: Recipe, table: CalibrationTable) -> Iterator[Way]:
    """The models of a pair alone, and the pair: at the wanted rates, or at the one that calibration found best."""
    section, signal = recipe.evaluation, table.signal
    assert section is not None and table.best is not None
    plain = _params(recipe)
    yield Way("base alone" if recipe.tune == "gate" else "base of the pair, alone", plain, alone="base")
    for assistant in recipe.assistants:
        if not is_tool(assistant.model):
            yield Way(f"{assistant.name} alone", plain, alone=assistant.name)
    best = table.rows[table.best]
    if not section.rates and best.achieved_rate == 0:
        logger.warning(
            "on the calibration data no rate did better than the base of the pair alone, so that `pair` below defers "
            "nothing. Look at %s, and at the summary of the training above",
            recipe.out / CALIBRATION / "curve.svg",
        )
    for rate in section.rates or [_chosen_rate(recipe, table)]:
        name = PAIR if len(section.rates) < 2 else f"{PAIR}, {told_rate(rate)}"
        yield Way(name, replace(plain, deferral=METHODS[signal], deferral_rate=rate, task=table.task))


def _at_random(recipe: Recipe, table: CalibrationTable, pair: Path) -> list[Way]:
    """The control of the last evaluation of the pair: as often an assistant is asked, but at random places. (A tool
    abstains at most of these, so that it writes less.)"""
    assert recipe.evaluation is not None
    found = EvalResult.load(pair)
    asked = found.asked_rate
    if not recipe.evaluation.at_random or not asked or table.signal == "random":
        return []
    params = replace(_params(recipe), deferral="random", threshold=round(min(1.0, asked), 4))
    return [Way("asked as often, at random", params)]


def _answered(
    recipe: Recipe, asked: Asked, llm: CollaborativeLM, ways: Iterable[Way], spec: str, progress: bool
) -> list[Path]:
    files = []
    for way in ways:
        file = recipe.out / EVALUATION / way.file
        evaluate(
            llm,
            asked.task,
            asked.test,
            way.params,
            alone=way.alone,
            batch_size=recipe.generation.batch_size,
            out=file,
            name=way.name,
            identity=_identity(recipe, spec),
            progress=progress,
        )
        files.append(result_path(file))
    return files


def _identity(recipe: Recipe, spec: str) -> dict[str, Any]:
    """Names, for people: what decides the answers is read from the models."""
    return {NAMED: {"checkpoint": spec, "assistants": [a.model for a in recipe.assistants]}}


def _reported(recipe: Recipe, files: list[Path], table: CalibrationTable | None) -> Outcome:
    results = [EvalResult.load(file) for file in files]
    # An assistant may be called "pair", too: then "pair alone" is among them.
    pairs = [result for result in results if result.name == PAIR or result.name.startswith(f"{PAIR}, ")]
    rival = pairs[0] if pairs else results[-1]
    seed = recipe.training.seed
    overview = Overview(
        title=f"{recipe.task}: {', '.join(['base', *(a.name for a in recipe.assistants)])}",
        written=tuple(read_written(file, result, seed=seed) for file, result in zip(files, results, strict=True)),
        rival=rival,
        calibrations=() if table is None else (table,),
        seed=seed,
    )
    report = recipe.out / REPORT
    write_overview(overview, report)
    info = load_info(recipe.out)
    return Outcome(results, files, rival, table, None if info is None else info.chosen, report)
