"""What training tells while it runs: on a terminal a bar with the latest figures, elsewhere a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from collm.training.watch import Watch

EVERY = 30.0
"""Seconds between two lines where there is no terminal; the first comes at once."""


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
    if "price" in own:
        parts.append(f"price {own['price']:.3f}")
    return "; ".join(parts)


class Teller:
    """Says on stderr how far a run is, its figures, and how long it will take.

    Args:
        unit: what is counted, such as "step".
        enabled: False says nothing.
    """

    def __init__(self, unit: str, *, enabled: bool = True, console: Console | None = None) -> None:
        self.unit, self.enabled = unit, enabled
        self._console = console or Console(stderr=True, soft_wrap=True)
        columns = (TextColumn(f"{unit} {{task.completed:.0f}} of {{task.total:.0f}}"), BarColumn(20))
        text = TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, TimeRemainingColumn(), text, console=self._console, transient=True)
        self._task = self._bar.add_task("", total=1.0)
        self._total = self._done = self._first = 0.0
        self._begin, self._told = time.monotonic(), -math.inf

    def __enter__(self) -> Teller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled and self._console.is_terminal:  # elsewhere it would leave an empty line
            self._bar.stop()

    def begin(self, total: float, done: float = 0) -> None:
        self._total, self._done, self._first, self._begin = total, done, done, time.monotonic()
        if self.enabled and self._console.is_terminal:
            self._bar.reset(self._task, total=total, completed=int(done))
            self._bar.start()

    def step(self, done: float, figures: str | None = None) -> None:
        """`done` of the total; `figures` where there are new ones."""
        self._done = done
        if not self.enabled:
            return
        if self._console.is_terminal:
            told = {} if figures is None else {"description": figures}
            self._bar.update(self._task, completed=done, **told)  # type: ignore[arg-type]
        elif figures is not None and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self.say(f"{self.unit} {done:.0f} of {self._total:.0f}: {figures}; {self._time_left()}")

    def say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self.enabled:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        done, left = self._done - self._first, self._total - self._done
        minutes = (time.monotonic() - self._begin) / max(1, done) * left / 60
        return f"{minutes:.0f} min left" if minutes >= 1 else "less than a minute left"


class Telling(TrainerCallback):
    """Tells what the Trainer logs, and what is doubtful about it."""

    def __init__(self, teller: Teller, watch: Watch) -> None:
        self.teller, self.watch, self._lowest = teller, watch, math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.teller.begin(state.max_steps, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.teller.step(state.global_step)

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
            self.teller.say(f"held out {when}: {figures_line(logs, 'eval_')}{best}")
            if state.global_step:
                deferred = [value for key, value in logs.items() if key.startswith("eval_gate/")]
                self.watch.look(sum(deferred) if deferred else None, logs["eval_base_nll"])
        elif "loss" in logs:
            self.teller.step(state.global_step, figures_line(logs))
