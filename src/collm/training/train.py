"""A whole training run from a recipe: score, initialise, train, keep the best, save. Rerunning resumes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed

from collm.data.collate import Collator
from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.models.backbone import check_project
from collm.models.checkpoint import AssistantInfo, CheckpointInfo, load_info, save_checkpoint
from collm.models.head import DeferralHead
from collm.models.loading import is_tool, load_model, load_tokenizer, weights_fingerprint
from collm.models.tokenizers import require_same_tokenizer, shared_vocab_size, tokenizer_fingerprint
from collm.models.tools import make_tool
from collm.training import initialisation
from collm.training.dataset import ScoredSet, Writer, all_hidden, best_device, collect_hidden, load_split, scored_sets
from collm.training.gate_only import GateData, gate_figures, train_gate
from collm.training.model import BaseWithGate, LossConfig
from collm.training.recipe import ModelSection, Recipe
from collm.training.trainer import CollmTrainer, evaluation_steps, last_checkpoint

logger = logging.getLogger(__name__)

RUN = "run.json"
"""In the output folder: the recipe it belongs to, so that another recipe does not go on from its checkpoints."""


def train(recipe: Recipe, *, restart: bool = False, progress: bool = True) -> Path:
    """Run a recipe and return the checkpoint's folder, `recipe.out`.

    An interrupted run (Ctrl-C, kill -9) goes on from its last whole checkpoint when started again; a finished one is
    left as it is.

    Args:
        restart: throw away what an earlier run left in the output folder.

    Raises:
        CollmError: anything the user can put right; the message says how.
    """
    out = recipe.out
    state = PartialState()
    if state.is_main_process:
        _claim(recipe, restart)
    state.wait_for_everyone()
    if load_info(out) is not None:
        logger.info("%s is finished already (--restart trains it anew)", out)
        return out
    if recipe.tune != "gate":
        _training_arguments(recipe, 1, progress)  # a fault in them should not show only after scoring
    set_seed(recipe.training.seed)
    prepared = _prepare(recipe, state, progress)
    result = _train_gate_only(prepared, progress) if recipe.tune == "gate" else _train_model(prepared, progress)
    if state.is_main_process:
        _finish(prepared, *result)
    state.wait_for_everyone()
    return out


@dataclasses.dataclass
class _Prepared:
    """What both ways of training start from."""

    recipe: Recipe
    model: PreTrainedModel
    base: Writer
    train: ScoredSet
    validation: ScoredSet
    head: DeferralHead | None
    hidden_scale: float
    info: CheckpointInfo


def _claim(recipe: Recipe, restart: bool) -> None:
    """Make the output folder this recipe's; refuse one that belongs to another."""
    out = recipe.out
    wanted = recipe.model_dump(mode="json", exclude={"out", "cache"})
    path = out / RUN
    if restart:
        for name in ("checkpoints", "init"):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in ("collm.json", RUN, "log.jsonl"):
            (out / name).unlink(missing_ok=True)
    if path.is_file():
        found = json.loads(path.read_text())
        differing = sorted(key for key in wanted if found.get(key) != wanted[key])
        if differing:
            raise CollmError(
                f"{out} holds a run of another recipe (it differs in {', '.join(differing)}): "
                "choose another out, or pass --restart to train it anew"
            )
    elif out.is_dir() and any(name.name != "cache" for name in out.iterdir()):
        raise CollmError(f"{out} is not empty and not a collm run: choose another out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(wanted, indent=2))
        os.replace(temporary, path)
    except OSError as error:
        raise CollmError(f"could not write to {out}: {error}") from error


def _writer(name: str, section: ModelSection, base: Writer | None) -> Writer:
    """One model's tokenizer and format; an assistant's must fit the base's."""
    format = PromptFormat(**section.format.model_dump())
    if base is not None and is_tool(section.model):
        # A tool reads the base's text as it is.
        tool = make_tool(section.model, base.formatter.tokenizer)
        return Writer(name, section.model, section.dtype, base.formatter, tool, section.scores)
    tokenizer = load_tokenizer(section.model)
    if base is not None:
        require_same_tokenizer(base.formatter.tokenizer, tokenizer, ("the base", f"assistant {name!r}"))
    return Writer(name, section.model, section.dtype, Formatter(tokenizer, format), None, section.scores)


def _prepare(recipe: Recipe, state: PartialState, progress: bool) -> _Prepared:
    base = _writer("base", recipe.base, None)
    assistants = [_writer(section.name, section, base) for section in recipe.assistants]
    train_examples, validation_examples = load_split(recipe.data)
    model = load_model(recipe.base.model, dtype=recipe.base.dtype, device=best_device())
    check_project(model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    max_length = min(recipe.data.max_length, context or recipe.data.max_length)
    # One process scores and fits; the others then find it done.
    with state.main_process_first():
        sets = scored_sets(
            {"train": train_examples, "validation": validation_examples},
            base,
            assistants,
            max_length,
            recipe.cache_folder,
            base_model=model,
            progress=progress and state.is_main_process,
        )
        head, scale, figures = _initial_head(recipe, model, sets["train"], sets["validation"], progress)
    info = CheckpointInfo(
        kind=recipe.tune,
        base_model=recipe.base.model,
        base_fingerprint=weights_fingerprint(model),
        tokenizer_fingerprint=tokenizer_fingerprint(base.formatter.tokenizer),
        base_format=recipe.base.format.model_dump(exclude_none=True),
        assistants=[
            AssistantInfo(
                name=writer.name,
                spec=writer.spec,
                tokenizer_fingerprint=None if writer.tool else tokenizer_fingerprint(writer.formatter.tokenizer),
                format=section.format.model_dump(exclude_none=True),
            )
            for writer, section in zip(assistants, recipe.assistants, strict=True)
        ],
        training={"recipe": recipe.model_dump(mode="json", exclude={"out", "cache"}), "initialisation": figures},
    )
    return _Prepared(recipe, model, base, sets["train"], sets["validation"], head, scale, info)


def _initial_head(
    recipe: Recipe, model: PreTrainedModel, train: ScoredSet, validation: ScoredSet, progress: bool
) -> tuple[DeferralHead | None, float, dict[str, Any]]:
    """The gate fitted to pseudo-labels, the scale of the hidden states, and how it fares on held-out tokens.

    Kept in `out/init`, so that a resumed run and other processes use the very same one.
    """
    num_assistants = len(recipe.assistants)
    if num_assistants == 0:
        return None, 1.0, {}
    folder = recipe.out / "init"
    device = next(model.parameters()).device
    if (folder / "figures.json").is_file():
        figures = json.loads((folder / "figures.json").read_text())
        return DeferralHead.load(folder).to(device), figures["hidden_scale"], figures

    def hidden_of(scored: ScoredSet, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        if recipe.tune == "gate":  # all of them will be wanted
            return all_hidden(model, scored, recipe.cache_folder, split, progress=progress), torch.arange(scored.count)
        return collect_hidden(model, scored, limit=recipe.init.max_tokens, seed=recipe.training.seed, progress=progress)

    hidden, indices = hidden_of(train, "train")
    scale = initialisation.Standardiser.of(hidden).scale
    figures = {"method": recipe.init.method, "tokens": len(indices), "hidden_scale": scale}
    if recipe.init.method == "none":
        head = DeferralHead(hidden.shape[-1], num_assistants)
    else:
        labels = train.pseudo_labels(recipe.init.method)[indices]
        head = initialisation.fit(hidden, labels, num_assistants)
        held_out, where = hidden_of(validation, "validation")
        report = initialisation.report(
            head, held_out, validation.pseudo_labels(recipe.init.method)[where], validation.top1[where], labels
        )
        figures |= dataclasses.asdict(report)
        logger.info(
            "initial gate: pseudo-labels to defer %.1f %% of tokens; held out: precision %.2f, recall %.2f, "
            "the assistant right on %.0f %% of what it would be handed",
            100 * sum(report.label_share[1:]),
            report.precision,
            report.recall,
            100 * report.assistant_right,
        )
        if not bool((labels > 0).any()):
            logger.warning("no token is labelled to be deferred: no assistant is right where the base is wrong")
    folder.mkdir(parents=True, exist_ok=True)
    head.save(folder)
    temporary = folder / "figures.tmp"
    temporary.write_text(json.dumps(figures, indent=2))
    os.replace(temporary, folder / "figures.json")
    return head.to(device), scale, figures


def _loss_config(recipe: Recipe) -> LossConfig:
    return LossConfig(recipe.objective, recipe.deferral_cost)


def _train_gate_only(prepared: _Prepared, progress: bool) -> tuple[nn.Module, DeferralHead | None, dict[str, Any]]:
    recipe, options = prepared.recipe, prepared.recipe.training
    assert prepared.head is not None

    def gate_data(scored: ScoredSet, split: str) -> GateData:
        hidden = all_hidden(prepared.model, scored, recipe.cache_folder, split, progress=progress)
        return GateData(hidden, torch.cat([scored.base_log_probs[:, None], scored.log_probs], dim=1))

    train, validation = gate_data(prepared.train, "train"), gate_data(prepared.validation, "validation")
    log_path = recipe.out / "log.jsonl"
    log_path.unlink(missing_ok=True)

    def log(record: dict[str, float]) -> None:
        with log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    tokens_per_example = prepared.train.count / len(prepared.train.items)
    head = train_gate(
        prepared.head.cpu(),
        train,
        validation,
        _loss_config(recipe),
        learning_rate=options.gate_learning_rate,
        epochs=options.epochs,
        batch_tokens=max(1, round(options.batch_size * options.gradient_accumulation * tokens_per_example)),
        patience=options.patience or math.ceil(options.epochs),
        seed=options.seed,
        log=log,
    )
    return prepared.model, head, gate_figures(head, validation, _loss_config(recipe), prepared.info)


def _train_model(prepared: _Prepared, progress: bool) -> tuple[nn.Module, DeferralHead | None, dict[str, Any]]:
    recipe = prepared.recipe
    model: nn.Module = prepared.model
    if recipe.tune == "lora":
        model = _with_lora(recipe, prepared.model)
    tokenizer = prepared.base.formatter.tokenizer
    module = BaseWithGate(model, prepared.head, _loss_config(recipe), shared_vocab_size(tokenizer))
    if recipe.training.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    # Read by weak supervision only.
    method = "b" if recipe.init.method == "b" else "a"
    rows = prepared.train.rows(prepared.train.pseudo_labels(method))
    arguments = _training_arguments(recipe, len(rows), progress)
    trainer = CollmTrainer(
        model=module,
        args=arguments,
        train_dataset=rows,
        eval_dataset=prepared.validation.rows(prepared.validation.pseudo_labels(method)),
        data_collator=Collator(tokenizer.pad_token_id or 0),
        info=prepared.info,
        tokenizer=tokenizer,
        # The setting is for standardised hidden states; Adam's steps are of the size of the rate.
        gate_learning_rate=recipe.training.gate_learning_rate / prepared.hidden_scale,
    )
    if recipe.training.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.training.patience))
    checkpoint = last_checkpoint(Path(str(arguments.output_dir)))
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
    start = trainer.evaluate() if checkpoint is None else {}
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    end = trainer.evaluate()
    if trainer.is_world_process_zero():
        lines = [json.dumps(record) + "\n" for record in trainer.state.log_history]
        (recipe.out / "log.jsonl").write_text("".join(lines))
    figures = {
        "before": start,
        "after": end,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
    }
    return module.model, module.head, figures


def _with_lora(recipe: Recipe, model: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    section = recipe.lora
    config = LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _training_arguments(recipe: Recipe, num_rows: int, progress: bool) -> TrainingArguments:
    options = recipe.training
    world_size = PartialState().num_processes
    step_size = options.batch_size * options.gradient_accumulation * world_size
    every = evaluation_steps(num_rows, step_size, options.epochs, options.evaluations)
    values: dict[str, Any] = {
        "output_dir": str(recipe.out / "checkpoints"),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.schedule,
        "warmup_steps": options.warmup,
        "weight_decay": options.weight_decay,
        "bf16": options.bf16,
        "use_cpu": best_device() == "cpu",
        "seed": options.seed,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 1,  # beside the best one
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "logging_steps": max(1, every // 10),
        "report_to": "none",
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for key in recipe.trainer:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise CollmError(f"trainer.{key} is not one of transformers' TrainingArguments{hint}")
    try:
        return TrainingArguments(**{**values, **recipe.trainer})
    except (ValueError, TypeError) as error:
        raise CollmError(f"the recipe's training settings do not work: {error}") from error


def _finish(prepared: _Prepared, model: nn.Module, head: DeferralHead | None, figures: dict[str, Any]) -> None:
    """Write the checkpoint and drop what was only needed to resume."""
    info = prepared.info
    info.training["figures"] = figures
    if info.kind == "full":
        info.base_fingerprint = weights_fingerprint(model)
    save_checkpoint(prepared.recipe.out, info, model, head, prepared.base.formatter.tokenizer)
    shutil.rmtree(prepared.recipe.out / "checkpoints", ignore_errors=True)
