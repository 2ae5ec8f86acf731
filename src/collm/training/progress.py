"""A line for what the Trainer logs as a dictionary."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def say(line: str) -> None:
    """Progress goes to stderr, as everywhere."""
    print(line, file=sys.stderr, flush=True)


def figures_line(logs: Mapping[str, float], prefix: str = "") -> str:
    """Means per token, in words: `loss 0.107; nll: base alone 0.280, together 0.107; mean gate: calculator 0.134`.

    Args:
        prefix: of the keys: "eval_" for held-out figures.
    """
    own = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    gates = {key.removeprefix("gate/"): value for key, value in own.items() if key.startswith("gate/")}
    parts = [f"loss {own['loss']:.4f}"]
    if gates:
        parts.append(f"nll: base alone {own['base_nll']:.4f}, together {own['nll']:.4f}")
        parts.append("mean gate: " + ", ".join(f"{name} {value:.3f}" for name, value in gates.items()))
    return "; ".join(parts)


class ProgressLines(TrainerCallback):
    """Says how far training is, what it costs per token, and how long it will take."""

    def __init__(self) -> None:
        self._begin, self._first, self._lowest = time.monotonic(), 0, math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        if "eval_loss" in logs:
            when = f"after step {state.global_step}" if state.global_step else "before training"
            best = "; the lowest so far" if state.global_step and logs["eval_loss"] < self._lowest else ""
            self._lowest = min(self._lowest, logs["eval_loss"])
            say(f"held out {when}: {figures_line(logs, 'eval_')}{best}")
        elif "loss" in logs:
            say(f"step {state.global_step} of {state.max_steps}: {figures_line(logs)}; {self._time_left(state)}")

    def _time_left(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        minutes = (time.monotonic() - self._begin) / max(1, done) * left / 60
        return f"{minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
