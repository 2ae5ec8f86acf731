"""Recipes for the three kinds of assistants that people have, as commented YAML that runs as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

PresetName = Literal["specialist", "larger", "tool"]
PRESETS: tuple[PresetName, ...] = get_args(PresetName)


@dataclass(frozen=True)
class Preset:
    """`told`: what it is for, one line. `rate`: how much of the text the assistants may write at most. `signal`: what
    the threshold of the pair is for. `why_rate`, `why_signal`: comments of the recipe."""

    name: PresetName
    told: str
    rate: float
    why_rate: str
    signal: Literal["gate", "entropy"]
    why_signal: str
    rates: tuple[float, ...]
    assistant_dtype: str | None = None


SPECIALIST = Preset(
    "specialist",
    "an assistant that knows or can do something that the base cannot (facts, a language, sums)",
    0.5,
    "of the tokens at most, a bound: a specialist helps in few places",
    "gate",
    "defer where the base's gate wants it",
    (0.0, 0.1, 0.2, 0.3, 0.5, 1.0),
)
LARGER = Preset(
    "larger",
    "a larger model of the same family, better nearly everywhere, that costs more for each token",
    0.3,
    "of the tokens at most: without it a model that is better everywhere would write everything",
    "entropy",
    "defer where the base is in doubt; or gate, or expected_gain (docs/guide.md has the figures)",
    (0.0, 0.1, 0.2, 0.3, 0.4, 1.0),
    assistant_dtype="bfloat16",
)
TOOL = Preset(
    "tool",
    "a tool, such as the calculator: right wherever it answers, and silent elsewhere",
    0.3,
    "of the tokens at most, a bound: a tool is asked for in few places",
    "gate",
    "defer where the base's gate wants it; where the tool is silent, the base writes",
    (0.0, 0.05, 0.1, 0.2, 0.3, 1.0),
)
KNOWN = {preset.name: preset for preset in (SPECIALIST, LARGER, TOOL)}


@dataclass(frozen=True)
class Wanted:
    """What a recipe is made for. `assistants`: name and spec of each."""

    preset: PresetName
    base: str
    assistants: tuple[tuple[str, str], ...]
    train: str
    calibration: str
    test: str
    task: str
    out: str
    target_rate: float | None = None
    tune: Literal["lora", "full", "gate"] = "lora"


def recipe_text(wanted: Wanted, recipe: str) -> str:
    """The recipe, as YAML with comments.

    Args:
        recipe: the file that it is written to, as the command line has it.
    """
    preset = KNOWN[wanted.preset]
    if wanted.target_rate is not None:
        preset = replace(preset, rate=wanted.target_rate)
    lines = [
        f"# A base and {preset.told}.",
        f"# Made by: collm init --preset {preset.name}. All keys: docs/recipes.md",
        f"#   collm run {recipe}                     scores, training, calibration, evaluation, report; resumes",
        f"#   collm run {recipe} training.epochs=1   the same with a setting changed",
        f"out: {scalar(wanted.out)}",
        "base:",
        f"  model: {scalar(wanted.base)}",
        "assistants:",
    ]
    for name, spec in wanted.assistants:
        lines += [f"  - name: {scalar(name)}", f"    model: {scalar(spec)}"]
        if preset.assistant_dtype is not None:
            lines.append(f"    dtype: {preset.assistant_dtype}  # while it is scored; it is not trained")
    lines += [
        "data:",
        f"  train: {scalar(wanted.train)}",
        "  validation_share: 0.05     # of the training examples, held out to keep the best checkpoint",
        "  max_length: 1024           # tokens; what is longer is cut off",
        f"tune: {wanted.tune:<22} # {TUNE[wanted.tune]}",
        f"target_rate: {preset.rate:<15g} # {preset.why_rate}",
        "training:",
        *(f"  {line}" for line in TRAINING[wanted.tune]),
        "  # bf16: true               # on a GPU: compute in bfloat16",
        "task: " + scalar(wanted.task),
        "calibration:                 # the rate is chosen on these questions,",
        f"  data: {scalar(wanted.calibration)}",
        f"  signal: {preset.signal:<18} # {preset.why_signal}",
        f"  rates: {_flow(preset.rates)}",
        "evaluation:                  # and judged on these, which nothing is chosen on",
        f"  data: {scalar(wanted.test)}",
    ]
    if wanted.tune != "gate":
        lines.append("  fine_tuned_base: true      # the fairest rival: the base alone, trained on the same text")
    lines += ["generation:", "  max_tokens: 256", "  batch_size: 8"]
    return "\n".join(lines) + "\n"


TUNE = {
    "lora": "adapters and the gate; or full, or gate (the base stays as it is)",
    "full": "the whole base and the gate; or lora, or gate (the base stays as it is)",
    "gate": "the gate alone, the base stays as it is; or lora, or full",
}
TRAINING = {
    "lora": (
        "epochs: 2",
        "batch_size: 8",
        "gradient_accumulation: 2   # 16 examples a step",
        "learning_rate: 2.0e-4",
    ),
    "full": (
        "epochs: 2",
        "batch_size: 8",
        "gradient_accumulation: 2   # 16 examples a step",
        "learning_rate: 2.0e-5",
    ),
    "gate": ("epochs: 100", "patience: 10", "batch_size: 16", "gate_learning_rate: 3.0e-2"),
}


def scalar(value: Any) -> str:
    """One value as YAML writes it."""
    return yaml.safe_dump(value, width=10_000, allow_unicode=True).partition("\n")[0]


def _flow(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:g}" for value in values) + "]"


def shipped() -> dict[str, Path]:
    """The recipes of the studies by name (`word_problems/pair`): of the wheel, or of the checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "recipes", here.parents[1] / "recipes"):
        if folder.is_dir():
            return {
                path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))
            }
    return {}
