"""What a finished run came to, and what to do next."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.models.info import CheckpointInfo, found, load_info
from collm.models.specs import is_tool
from collm.types import Unit


def summary(folder: Path) -> list[tuple[str, str]]:
    """Lines of two columns about a checkpoint that `train` made, from its `collm.json`.

    Raises:
        CollmError: it is no checkpoint.
    """
    info = load_info(folder)
    if info is None:
        raise CollmError(f"{folder} is not a collm checkpoint; it has no collm.json")
    figures: dict[str, Any] = info.training.get("figures", {})
    before, after = figures.get("before", {}), figures.get("after", figures)
    lines = [*_own_texts(info), *_initial_gate(info)]
    if "eval_nll" in after:
        lines.append(("held-out nll per token", _nll(before, after, "eval_nll")))
    if info.assistants and "eval_base_nll" in after:
        lines.append(("of the base alone", _nll(before, after, "eval_base_nll")))
    lines += _table(before, after, figures.get("rates", []), "token" if info.cuts is None else "chunk")
    gates = [(a.name, after.get(f"eval_gate/{a.name}")) for a in info.assistants]
    if info.assistants and all(gate is not None for _, gate in gates):
        lines.append(("mean gate, held out", ", ".join(f"{name} {_number(gate):.3f}" for name, gate in gates)))
    if figures.get("best_step") is not None:
        lines.append(("kept", f"step {figures['best_step']} of {figures['steps']}, the best on held-out text"))
    return [*lines, ("checkpoint", str(folder)), ("next", next_command(folder, info))]


def next_command(folder: Path, info: CheckpointInfo) -> str:
    """Calibration, or for a base without assistants its evaluation."""
    # Assistants that are found by themselves need not be given.
    away = [a for a in found(info, folder).assistants if not is_tool(a.spec) and not Path(a.spec).exists()]
    given = "".join(f" --assistant {shlex.quote(f'{a.name}={a.spec}')}" for a in away)
    name, data = ("calibrate", "CALIBRATION.jsonl") if info.assistants else ("eval", "TEST.jsonl")
    return f"collm {name} {shlex.quote(str(folder))}{given} --task TASK --data {data}"


def _own_texts(info: CheckpointInfo) -> list[tuple[str, str]]:
    told: dict[str, Any] = info.training.get("own_texts", {})
    if not told:
        return []
    line = f"{told['learnt']} learnt; {told['accepted']} of {told['written']} by {told['writer']} accepted"
    return [("own texts", f"{line} by {told['task']}")]


def _initial_gate(info: CheckpointInfo) -> list[tuple[str, str]]:
    found: dict[str, Any] = info.training.get("initialisation", {})
    if "label_share" not in found:
        return []
    shares = [
        f"{assistant.name} {_number(share):.1%}"
        for assistant, share in zip(info.assistants, found["label_share"][1:], strict=True)
    ]
    fitted = f"precision {_number(found['precision']):.2f}, recall {_number(found['recall']):.2f}"
    return [("labelled to be deferred", ", ".join(shares)), ("initial gate, held out", fitted)]


def _table(
    before: dict[str, Any], after: dict[str, Any], rates: list[dict[str, Any]], unit: Unit
) -> list[tuple[str, str]]:
    """Held-out text: the base before and after, and the pair at a few rates."""

    def row(accuracy: Any, nll: Any) -> str:
        return f"{_number(accuracy):6.1%} of the {unit}s right, {_number(nll):.4f} nats a token"

    lines = []
    if "eval_base_accuracy" in before:
        lines.append(("base before training", row(before["eval_base_accuracy"], before["eval_base_nll"])))
    if "eval_base_accuracy" in after:
        name = "base after, alone" if lines else "base alone"
        lines.append((name, row(after["eval_base_accuracy"], after["eval_base_nll"])))
    for told in rates:
        lines.append((f"pair, {_number(told['rate']):.1%} deferred", row(told["accuracy"], told["nll"])))
    return list(dict.fromkeys(lines))  # where no higher rate is reached, the last one is told once


def _nll(before: dict[str, Any], after: dict[str, Any], key: str) -> str:
    was = f" (before training {_number(before[key]):.4f})" if key in before else ""
    return f"{_number(after[key]):.4f}{was}"


def _number(value: Any) -> float:
    """collm.json keeps what is not a finite number as a string."""
    return math.nan if value is None else float(value)
