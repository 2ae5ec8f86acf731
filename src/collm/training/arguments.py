"""From a recipe to transformers' `TrainingArguments`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from collm.errors import CollmError
from collm.models.devices import best_device
from collm.training.batching import evaluation_steps
from collm.training.checking import check_trainer
from collm.training.recipe import Recipe
from collm.training.reporting import reporters


def rows_per_step(recipe: Recipe) -> int:
    """Examples that make one step of the optimizer, of all processes."""
    world_size: int = PartialState(cpu=best_device() == "cpu").num_processes
    return recipe.training.batch_size * recipe.training.gradient_accumulation * world_size


def training_arguments(recipe: Recipe, num_rows: int) -> TrainingArguments:
    options = recipe.training
    every = evaluation_steps(num_rows, rows_per_step(recipe), options.epochs, options.evaluations)
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
        # Else a run that goes on would wait for a gain from the beginning.
        "restore_callback_states_from_checkpoint": True,
        "logging_steps": max(1, every // 10),
        "report_to": "none",
        "disable_tqdm": True,  # `Telling` says the same and can be read in a file
        "remove_unused_columns": False,
        "label_names": ["labels"],
        # Examples of like length make a batch: little padding.
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    check_trainer(recipe)
    try:
        arguments = TrainingArguments(**{**values, **recipe.trainer})
    except (ValueError, TypeError) as error:
        raise CollmError(f"the recipe's training settings do not work: {error}") from error
    reporters(arguments)  # a package that is missing should show now
    return arguments
