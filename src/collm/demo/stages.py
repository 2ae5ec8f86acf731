"""The demo's steps, each a function of folders only, so that they can run in processes of their own.

All of it goes through the package's public interface: `train`, `score`, `calibrate`, `evaluate`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from collm.calibration import calibrate, store_table
from collm.data.examples import load_examples
from collm.data.formatting import Formatter, PromptFormat
from collm.data.scoring import score
from collm.demo.corpus import KINDS, Row, make_corpus, texts
from collm.demo.pieces import ASSISTANT_TEMPLATE, CONTEXT, make_tokenizer, write_fresh_model
from collm.demo.places import STAGES, data_file, model_folder, trace_file
from collm.demo.plan import ARITHMETIC, BASE, BOTH, EXPERTS, FACTS, TASK, Plan, Schedule, System
from collm.evaluation.evaluate import evaluate
from collm.files import write_text
from collm.llm import CollaborativeLM
from collm.models.info import CalibrationTable, load_info
from collm.models.loading import load_tokenizer
from collm.sampling_params import SamplingParams
from collm.training.recipe import parse_recipe
from collm.training.train import train

logger = logging.getLogger(__name__)

WHO = {BASE: "the base", FACTS: "the facts expert", ARITHMETIC: "the arithmetic expert"}
LESSONS = {
    "fiction": "how people ask and answer, from questions about nobody",
    FACTS: "who lives where, does what, and is how old",
    "drill": "to add",
    ARITHMETIC: "to add within a text",
}
FORMATS: dict[str, dict[str, Any]] = {BASE: {}, **{name: {"chat_template": ASSISTANT_TEMPLATE} for name in EXPERTS}}
"""How each model is shown the questions while they write together."""


def write_files(out: Path, plan: Plan, seed: int) -> None:
    """All texts, and an untrained model for each of the three."""
    corpus = make_corpus(plan.sizes, seed)
    drill = [row for row in corpus.rows[ARITHMETIC] if "prompt" in row and row["prompt"][0].isdigit()]
    statements = [row for row in corpus.rows[FACTS] if "prompt" in row]
    sums = [texts(row)[-1].partition(" ####")[0].partition("=") for row in corpus.rows["validation"]]
    held_out = [{"prompt": before + sign, "completion": result} for before, sign, result in sums if sign]
    files: dict[str, Sequence[Row]] = {
        **corpus.rows,
        "drill": drill,
        # Facts cannot be guessed: what there is to hold out is how well they were learnt.
        f"{FACTS}-validation": statements[:: 1 + len(statements) // 200],
        # As each lesson shows them: the best of its checkpoints is kept.
        "drill-validation": [{**row, "prompt": row["prompt"].rpartition(" ")[2]} for row in held_out],
        f"{ARITHMETIC}-validation": held_out,
    }
    for split, rows in files.items():
        write_text(data_file(out, split), "".join(json.dumps(row) + "\n" for row in rows))
    read = [*corpus.rows["fiction"], *corpus.rows["train"], *corpus.rows[ARITHMETIC]]
    tokenizer = make_tokenizer(text for row in read for text in texts(row))
    for number, name in enumerate((BASE, *EXPERTS)):
        write_fresh_model(
            out / STAGES / f"{name}-untrained",
            tokenizer,
            hidden_size=plan.base_hidden_size if name == BASE else plan.expert_hidden_size,
            layers=plan.layers,
            seed=seed + number,
        )


def nothing() -> None:
    """A second process gets ready while the first one writes the files."""


def run_single(out: Path, name: str, alone: Sequence[System], plan: Plan, seed: int) -> list[dict[str, Any]]:
    """One of the three models: trained, asked to score the training questions, and evaluated by itself."""
    train_single(out, name, plan, seed)
    score_training_data(out, name)
    return [line for system in alone for line in run_system(out, system, (), plan, seed)]


def _recipe(
    folder: Path, start: Path, train_file: Path, validation: Path, schedule: Schedule, seed: int, **more: Any
) -> dict[str, Any]:
    training = {
        "epochs": schedule.epochs,
        "learning_rate": schedule.learning_rate,
        "batch_size": schedule.batch_size,
        "evaluations": schedule.evaluations,
        "schedule": "cosine",
        "weight_decay": 0.1,
        "seed": seed,
        **more.pop("training", {}),
    }
    base = {"model": str(start), **more.pop("base", {})}
    data = {"train": str(train_file), "validation": str(validation), "max_length": CONTEXT}
    trainer = {
        # The usual 0.999 remembers for longer than these runs last.
        "adam_beta2": 0.98,
    }
    return {"out": folder, "base": base, "data": data, "training": training, "trainer": trainer, **more}


def train_single(out: Path, name: str, plan: Plan, seed: int) -> None:
    """The base on fiction, or an expert on its subject, from scratch."""
    plain = {"objective": "sft", "base": {"format": {"add_bos": True}}}
    steps = {
        BASE: [("fiction", plan.base)],
        FACTS: [(FACTS, plan.facts)],
        ARITHMETIC: [("drill", plan.drill), (ARITHMETIC, plan.arithmetic)],
    }[name]
    start = out / STAGES / f"{name}-untrained"
    for number, (split, schedule) in enumerate(steps, start=1):
        logger.info("%s: learning %s", WHO[name], LESSONS[split])
        folder = model_folder(out, name) if number == len(steps) else out / STAGES / f"{name}-{split}"
        validation = data_file(out, "validation" if name == BASE else f"{split}-validation")
        train(
            parse_recipe(_recipe(folder, start, data_file(out, split), validation, schedule, seed, **plain)),
            progress=False,
        )
        start = folder


def score_training_data(out: Path, name: str) -> None:
    """`collm score`, for one of the three."""
    folder = str(model_folder(out, name))
    tokenizer = load_tokenizer(folder)
    score(
        load_examples(data_file(out, "train")),
        folder,
        Formatter(tokenizer, PromptFormat(**FORMATS[name])),
        out / "scores" / name,
        completions_from=None if name == BASE else Formatter(tokenizer),
        max_length=CONTEXT,
        progress=False,
    )


def train_system(out: Path, system: System, plan: Plan, seed: int) -> None:
    """`collm train` on the questions: the base alone, or with assistants."""
    more: dict[str, Any] = {"objective": system.objective}
    if system.assistants:
        more["assistants"] = [
            {
                "name": name,
                "model": str(model_folder(out, name)),
                "format": FORMATS[name],
                "scores": str(out / "scores" / name),
            }
            for name in system.assistants
        ]
        more["base"] = {"scores": str(out / "scores" / BASE)}
        more["training"] = {"gate_learning_rate": plan.gate_learning_rate}
    train(
        parse_recipe(
            _recipe(
                model_folder(out, system.checkpoint),
                model_folder(out, BASE),
                data_file(out, "train"),
                data_file(out, "validation"),
                plan.tuning,
                seed,
                **more,
            )
        ),
        progress=False,
    )


def load_system(out: Path, system: System) -> CollaborativeLM:
    assistants = [f"{name}={model_folder(out, name)}" for name in system.assistants]
    return CollaborativeLM.from_pretrained(model_folder(out, system.checkpoint), assistants)


def calibrate_system(out: Path, system: System, plan: Plan, seed: int) -> CalibrationTable:
    """`collm calibrate` on the validation questions."""
    table = calibrate(
        load_system(out, system),
        TASK,
        load_examples(data_file(out, "validation")),
        target_rates=plan.rates if system.name == BOTH else plan.few_rates,
        seed=seed,
        rounds=plan.rounds,
        max_tokens=plan.max_tokens,
        batch_size=plan.batch_size,
        out=out / "calibration" / system.checkpoint,
        progress=False,
    )
    store_table(model_folder(out, system.checkpoint), table)
    return table


def best_rate(out: Path, system: System) -> float:
    """The deferral rate at which a calibrated system did best on the validation questions."""
    info = load_info(model_folder(out, system.checkpoint))
    assert info is not None
    [table] = info.calibration
    assert table.best is not None
    return table.rows[table.best].target_rate


def evaluate_system(out: Path, system: System, plan: Plan, seed: int, params: Mapping[str, Any]) -> dict[str, Any]:
    """`collm eval` on the test questions: the system's line in results.json."""
    examples = load_examples(data_file(out, "test"))
    result = evaluate(
        load_system(out, system),
        TASK,
        examples,
        SamplingParams(max_tokens=plan.max_tokens, seed=seed, **params),
        batch_size=plan.batch_size,
        out=trace_file(out, system),
        name=system.name,
        progress=False,
    )
    scored = list(zip(examples, result.scores, strict=True))
    by_kind = {kind: [score for example, score in scored if example.fields["kind"] == kind] for kind in KINDS}
    return {
        "name": system.name,
        "kind": system.kind,
        "exact_match": result.value,
        "ci95": list(result.ci95),
        "deferral_rate": result.deferral_rate,
        "changed_share": result.changed_share,
        "by_kind": {kind: sum(scores) / max(1, len(scores)) for kind, scores in by_kind.items()},
    }


def run_system(out: Path, system: System, followers: Sequence[System], plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Train, calibrate and evaluate one system, then those that defer at random as often as it does."""
    if system.checkpoint not in EXPERTS:
        logger.info("%s: training", system.name)
        train_system(out, system, plan, seed)
    params: dict[str, Any] = {"deferral": "never"}
    if system.assistants:
        logger.info("%s: calibrating on %d questions", system.name, plan.sizes.validation)
        calibrate_system(out, system, plan, seed)
        params = {"deferral_rate": best_rate(out, system), "task": TASK}
    logger.info("%s: answering %d questions", system.name, plan.sizes.test)
    lines = [evaluate_system(out, system, plan, seed, params)]
    _tell(lines[0])
    for follower in followers:
        at_random = {"deferral": "random", "deferral_rate": lines[0]["deferral_rate"]}
        lines.append(evaluate_system(out, follower, plan, seed, at_random))
        _tell(lines[-1])
    return lines


def _tell(line: Mapping[str, Any]) -> None:
    asked = f", {line['deferral_rate']:.1%} of the tokens by assistants" if line["deferral_rate"] else ""
    logger.info("%s: %.1f %% right%s", line["name"], 100 * line["exact_match"], asked)
