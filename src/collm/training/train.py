"""A whole training run from a recipe: score, initialise, train, keep the best, save. Rerunning resumes."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

from collm.data.collate import Collator
from collm.data.scoring import openings_of
from collm.files import write_text
from collm.gate import log_gate
from collm.models.backbone import rope_switches
from collm.models.checkpoint import save_checkpoint
from collm.models.devices import best_device
from collm.models.head import DeferralHead
from collm.models.hub import write_card
from collm.models.info import load_info
from collm.models.tokenizers import shared_vocab_size
from collm.training.arguments import rows_per_step, training_arguments
from collm.training.batching import evened
from collm.training.dataset import ScoredSet
from collm.training.folder import claimed
from collm.training.gate_only import GateData, gate_figures, train_gate
from collm.training.hidden import all_hidden
from collm.training.launching import require_launcher
from collm.training.lora import with_lora
from collm.training.model import BaseWithGate, LossConfig
from collm.training.preparation import Prepared, prepare
from collm.training.progress import Teller, Telling
from collm.training.rates import TokenTable, at_rates
from collm.training.recipe import Recipe
from collm.training.reporting import Reports, keep_logs
from collm.training.resuming import SaveByTime, has_ended, last_checkpoint
from collm.training.trainer import CollmTrainer
from collm.training.watch import Watch

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=2)
"""How long processes wait for the one that encodes and scores; they would give up after ten minutes."""


def train(recipe: Recipe, *, restart: bool = False, progress: bool = True) -> Path:
    """Run a recipe and return the checkpoint's folder, `recipe.out`.

    An interrupted run (Ctrl-C, kill -9) goes on from its last whole checkpoint when started again; a finished one is
    left as it is.

    Args:
        restart: throw away what an earlier run left in the output folder.

    Raises:
        CollmError: anything the user can put right; the message says how.
    """
    state = PartialState(cpu=best_device() == "cpu", timeout=PATIENCE)
    with claimed(recipe, restart) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        return _run(recipe, state, progress)


def _run(recipe: Recipe, state: PartialState, progress: bool) -> Path:
    out = recipe.out
    if load_info(out) is not None:
        logger.info("%s is finished already (--restart trains it anew)", out)
        return out
    if recipe.tune != "gate":
        require_launcher(state)
    training_arguments(recipe, 1)  # a fault in them should not show only after scoring
    set_seed(recipe.training.seed)
    prepared = prepare(recipe, state, progress)
    if recipe.tune != "gate":
        _train_model(prepared, progress)
    elif state.is_main_process:
        head, figures = _train_gate_only(prepared, progress)
        prepared.info.training["figures"] = figures
        save_checkpoint(out, prepared.info, prepared.model, head, prepared.tokenizer)
    state.wait_for_everyone()
    if state.is_main_process:
        write_card(out)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # what was only needed to resume
    state.wait_for_everyone()
    return out


def _loss_config(recipe: Recipe) -> LossConfig:
    return LossConfig(recipe.objective, recipe.deferral_cost, recipe.target_rate)


def _train_gate_only(prepared: Prepared, progress: bool) -> tuple[DeferralHead, dict[str, Any]]:
    recipe, options = prepared.recipe, prepared.recipe.training
    assert prepared.head is not None

    def gate_data(scored: ScoredSet, split: str) -> GateData:
        hidden = all_hidden(prepared.model, scored, recipe.cache_folder, split, progress=progress)
        log_probs = torch.cat([scored.base_log_probs[:, None], scored.log_probs], dim=1)
        return GateData(hidden, log_probs, None if prepared.chunks is None else scored.labelled_tokens)

    validation = gate_data(prepared.validation, "validation")
    if recipe.objective == "weak_supervision":
        # With the base frozen, its objective is what the initialisation has minimised.
        head = prepared.head
        figures = gate_figures(head, validation, LossConfig(), prepared.info)
        return head, {**figures, **_at_rates(prepared, head, validation)}
    train = gate_data(prepared.train, "train")
    log_path = recipe.out / "log.jsonl"
    log_path.unlink(missing_ok=True)

    epochs = math.ceil(options.epochs)
    watch = Watch(None, _label_share(prepared), recipe.target_rate)
    reports = Reports(training_arguments(recipe, len(prepared.train.items)), recipe.out, prepared.head)

    def log(record: dict[str, float]) -> None:
        with log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        reports.log(int(record["epoch"]), record)
        told = f"loss {record['loss']:.4f}, held out {record['eval_loss']:.4f}, mean gate {record['eval_deferred']:.3f}"
        teller.step(record["epoch"], told + (f", price {record['price']:.3f}" if "price" in record else ""))

    tokens_per_example = prepared.train.count / len(prepared.train.items)
    with Teller("epoch", enabled=progress) as teller:
        teller.begin(epochs)
        head = train_gate(
            prepared.head,
            train,
            validation,
            _loss_config(recipe),
            learning_rate=options.gate_learning_rate,
            epochs=options.epochs,
            batch_tokens=max(1, round(options.batch_size * options.gradient_accumulation * tokens_per_example)),
            patience=options.patience or epochs,
            seed=options.seed,
            log=log,
        )
    reports.end()
    figures = gate_figures(head, validation, _loss_config(recipe), prepared.info)
    watch.look(sum(value for key, value in figures.items() if key.startswith("eval_gate/")), None)
    return head, {**figures, **_at_rates(prepared, head, validation)}


def _label_share(prepared: Prepared) -> float | None:
    shares = prepared.info.training["initialisation"].get("label_share")
    return None if shares is None else sum(shares[1:])


@torch.inference_mode()
def _at_rates(prepared: Prepared, head: DeferralHead, data: GateData) -> dict[str, Any]:
    """As `CollmTrainer.evaluate_rates`, for a base that is as it was."""
    scored = prepared.validation
    gates = torch.cat([log_gate(head(part.hidden)).cpu() for part in data.parts(head.weight.device)])
    found = at_rates(
        TokenTable(scored.base_log_probs, scored.base_top1, gates, scored.log_probs, scored.top1), labelled=data.count
    )
    accuracy = float(scored.base_top1.float().mean())
    return {"eval_base_accuracy": accuracy, "rates": [dataclasses.asdict(rate) for rate in found]}


def _train_model(prepared: Prepared, progress: bool) -> None:
    recipe = prepared.recipe
    model: nn.Module = prepared.model
    if recipe.tune == "lora":
        model = with_lora(recipe.lora, prepared.model)
    tokenizer = prepared.tokenizer
    size, chunks = shared_vocab_size(tokenizer), prepared.chunks
    openings = None if chunks is None else openings_of(prepared.model, chunks, size)
    module = BaseWithGate(model, prepared.head, _loss_config(recipe), size, openings)
    if recipe.training.gradient_checkpointing:
        module.gradient_checkpointing_enable()
    # Read by weak supervision only.
    method = "b" if recipe.init.method == "b" else "a"
    rows = evened(
        prepared.train.rows(prepared.train.pseudo_labels(method)), rows_per_step(recipe), rope_switches(prepared.model)
    )
    arguments = training_arguments(recipe, len(rows))
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
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SaveByTime(recipe.training.save_minutes * 60))
    keep_logs(trainer.callback_handler.callbacks, recipe.out)
    if recipe.training.patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.training.patience))
    checkpoint = last_checkpoint(Path(str(arguments.output_dir)))
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        trainer.ended = has_ended(checkpoint)
    if recipe.target_rate is not None:
        info = load_info(checkpoint) if checkpoint else None
        num_steps = math.ceil(len(rows) / rows_per_step(recipe) * recipe.training.epochs)
        trainer.follow(recipe.target_rate, num_steps, info.training.get("price") if info else None)
    with Teller("step", enabled=progress and trainer.is_world_process_zero()) as teller:
        watch = Watch(None, _label_share(prepared), recipe.target_rate)
        telling = Telling(teller, watch)
        trainer.add_callback(telling)
        start = _before(trainer, recipe, resumed=checkpoint is not None)
        watch.base_nll = start.get("eval_base_nll")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.remove_callback(telling)  # the best checkpoint is told of in the summary
    end, rates = trainer.evaluate_rates()
    if trainer.is_world_process_zero():
        lines = [json.dumps(record) + "\n" for record in trainer.state.log_history]
        (recipe.out / "log.jsonl").write_text("".join(lines))
    prepared.info.training["figures"] = {
        "before": start,
        "after": end,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "rates": [dataclasses.asdict(rate) for rate in rates],
    }
    trainer.save_model(str(recipe.out))


def _before(trainer: CollmTrainer, recipe: Recipe, *, resumed: bool) -> dict[str, float]:
    """Held-out figures before the first step, which a run that is resumed finds in its folder."""
    path = recipe.out / "init" / "before.json"
    if resumed:
        found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        return found
    figures = trainer.evaluate()
    if trainer.is_world_process_zero():
        write_text(path, json.dumps(figures))
    return figures
