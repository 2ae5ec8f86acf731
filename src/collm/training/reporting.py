"""TensorBoard, Weights & Biases and the like, by transformers' own callbacks: for runs of the gate alone, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from collm.errors import CollmError


def reporters(arguments: TrainingArguments) -> list[TrainerCallback]:
    """The callbacks of `report_to`.

    Raises:
        CollmError: an unknown name, or a package that is not installed.
    """
    try:
        return [make() for make in get_reporting_integration_callbacks(arguments.report_to)]
    except (ValueError, RuntimeError, ImportError) as error:
        wanted = ", ".join(arguments.report_to) if isinstance(arguments.report_to, list) else arguments.report_to
        raise CollmError(
            f"trainer.report_to {wanted}: {error}. Install the package (pip install), or leave it out"
        ) from error


def keep_logs(callbacks: Iterable[TrainerCallback], out: Path) -> None:
    """TensorBoard's files lie in `out/tensorboard`: its own place would be among the checkpoints, which are removed."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / "tensorboard")


class Reports:
    """What a run without a Trainer logs, given to the callbacks."""

    def __init__(self, arguments: TrainingArguments, out: Path, model: nn.Module) -> None:
        self.callbacks = reporters(arguments)
        keep_logs(self.callbacks, out)
        self.arguments, self.model = arguments, model
        self.state = TrainerState(is_local_process_zero=True, is_world_process_zero=True)
        self._tell("on_train_begin")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.state.global_step = step
        self._tell("on_log", logs=dict(figures))

    def end(self) -> None:
        self._tell("on_train_end")

    def _tell(self, event: str, **more: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.arguments, self.state, TrainerControl(), model=self.model, **more)
