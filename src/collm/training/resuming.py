"""What an interrupted training run goes on from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from collm.models.info import load_info

STATE = "trainer_state.json"

SHARE = 0.05
"""Of the time between two checkpoints, what writing one may take."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest *whole* Trainer checkpoint: a killed run may leave a half-written one behind."""

    def whole(path: Path) -> bool:
        try:  # the Trainer writes its state last
            json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            return False
        return load_info(path) is not None

    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return next((path for path in reversed(found) if whole(path)), None)


def has_ended(checkpoint: Path) -> bool:
    """Was this the last step of the run, or the one after which it stopped for want of a gain?"""
    told = json.loads((checkpoint / STATE).read_text()).get("stateful_callbacks", {})
    return bool(told.get(TrainerControl.__name__, {}).get("args", {}).get("should_training_stop"))


class SaveByTime(TrainerCallback):
    """Checkpoints between evaluations, which may be hours apart, so that a killed run loses minutes.

    Args:
        seconds: between two checkpoints; longer where writing one takes more than `SHARE` of that.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._wait = seconds
        self._asked = self._saved = time.monotonic()
        self._evaluated = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._asked = self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._asked = time.monotonic()
        due = self._asked - self._saved >= self._wait
        if args.world_size > 1:  # all processes save, or none: by the clock of the first
            due = bool(broadcast(torch.tensor(due, dtype=torch.uint8, device=args.device)))
        control.should_save = control.should_save or due
        self._evaluated = control.should_evaluate

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        if not self._evaluated:  # else it is not writing alone that took the time
            self._wait = max(self.seconds, (self._saved - self._asked) / SHARE)
