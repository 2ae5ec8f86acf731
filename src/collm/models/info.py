"""What a checkpoint says of itself: `collm.json`, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm.errors import CollmError
from collm.files import write_text
from collm.models.specs import place_of, seen_from
from collm.models.whole import one_line
from collm.sampling_params import Signal

FORMAT_VERSION = 4
"""2: formats may hold a date and variables of templates. 3: where models lie, seen from the checkpoint.
4: the rate that was chosen."""
FILE = "collm.json"
GATE_FILE = "gate.safetensors"
Kind = Literal["full", "lora", "gate", "export"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class CalibrationRow(_Strict):
    """One point of the rate/quality curve.

    `log_odds` is the threshold eta as float32 log-odds (what decoding compares with; a probability near 1 would be
    rounded to it), `threshold` the same as a probability. `achieved_rate` counts what an assistant wrote.
    For other signals than the gate `log_odds` holds nats (for the expected gain its logarithm), and `threshold` what
    `SamplingParams.threshold` means.
    """

    target_rate: float
    achieved_rate: float
    threshold: float
    log_odds: float
    metric_value: float
    ci95: tuple[float, float] | None = None

    @property
    def wanted(self) -> str:
        """`target_rate` for people: with two digits, or with more where it has more (0.004 is not 0.00)."""
        return (
            f"{self.target_rate:.2f}" if round(self.target_rate, 2) == self.target_rate else f"{self.target_rate:.4g}"
        )


class CalibrationTable(_Strict):
    task: str
    metric: str
    seed: int
    num_prompts: int
    rows: list[CalibrationRow]
    best: int | None = None
    """Index of the row with the best metric."""
    signal: Signal = "gate"


class Chosen(_Strict):
    """Who writes where nobody says: the rate that `collm run` chose, in the calibration of that task and signal."""

    task: str
    signal: Signal
    deferral_rate: float


class AssistantInfo(_Strict):
    name: str
    spec: str
    """As it was written in the recipe."""
    place: str | None = None
    """Where it lies, seen from the checkpoint's folder."""
    tokenizer_fingerprint: str | None = None
    """None for tools, which use the base's tokenizer."""
    weights_fingerprint: str | None = None
    """Of the weights whose scores it was trained with; None for tools and in checkpoints made before it was kept."""
    format: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of `PromptFormat`: how this assistant sees the prompt."""


class CheckpointInfo(_Strict):
    """What `collm.json` holds."""

    format_version: int = FORMAT_VERSION
    kind: Kind = "full"
    base_model: str | None = None
    """Spec of the base that a `lora` or `gate` checkpoint was trained on."""
    base_place: str | None = None
    """Where that lies, seen from the checkpoint's folder."""
    base_fingerprint: str | None = None
    """Of the base's weights: before training for `lora` and `gate`, as saved for `full`."""
    tokenizer_fingerprint: str | None = None
    base_format: dict[str, Any] = Field(default_factory=dict)
    assistants: list[AssistantInfo] = Field(default_factory=list)
    cuts: str | None = None
    """Where its models may take turns, if they have different tokenizers: the fingerprint of the table (`Cuts`)."""
    calibration: list[CalibrationTable] = Field(default_factory=list)
    chosen: Chosen | None = None
    training: dict[str, Any] = Field(default_factory=dict)
    """The recipe and the figures of the run that made it."""


def same_weights(one: str, other: str) -> bool:
    """Do two fingerprints agree in any of their hashes? (Older ones have the first alone.)

    A hash tells the precision that weights were rounded to: those of a float32 checkpoint that were found in bfloat16
    do not agree with the same in float16, for these were rounded otherwise.
    """
    return any(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def load_info(folder: str | Path) -> CheckpointInfo | None:
    """The checkpoint's description; None for a plain Hugging Face folder.

    Raises:
        CollmError: a newer format, or a damaged file.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw.get("format_version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise CollmError(
                f"{path} has format version {version}; this collm reads up to {FORMAT_VERSION}: upgrade collm"
            )
        return CheckpointInfo.model_validate(raw)
    except CollmError:
        raise
    except (ValueError, AttributeError, RecursionError, ValidationError) as error:
        raise CollmError(f"{path} is damaged: {one_line(error)}") from None


def save_info(folder: str | Path, info: CheckpointInfo) -> None:
    # JSON has no infinity; pydantic writes it as a string that it reads back as a float.
    # What few checkpoints have is left out of the others.
    unset = {name for name in ("cuts", "chosen") if getattr(info, name) is None}
    write_text(Path(folder) / FILE, info.model_dump_json(indent=2, exclude=unset) + "\n")


def placed(info: CheckpointInfo, folder: str | Path) -> CheckpointInfo:
    """With the places of its models, seen from the folder that it is written to: so they are found from anywhere."""
    assistants = [a.model_copy(update={"place": place_of(a.spec, folder)}) for a in info.assistants]
    return info.model_copy(update={"assistants": assistants, "base_place": place_of(info.base_model, folder)})


def found(info: CheckpointInfo, folder: str | Path) -> CheckpointInfo:
    """With the specs of its models as they are found now, from the current folder."""
    assistants = [a.model_copy(update={"spec": seen_from(folder, a.place, a.spec)}) for a in info.assistants]
    base = None if info.base_model is None else seen_from(folder, info.base_place, info.base_model)
    return info.model_copy(update={"assistants": assistants, "base_model": base})


def moved(info: CheckpointInfo, source: str | Path, target: str | Path) -> CheckpointInfo:
    """For a copy of the checkpoint in another folder."""

    def seen(place: str | None) -> str | None:
        return None if place is None else place_of(str(Path(source).resolve() / place), target)

    assistants = [a.model_copy(update={"place": seen(a.place)}) for a in info.assistants]
    return info.model_copy(update={"assistants": assistants, "base_place": seen(info.base_place)})


def base_spec(path: str | Path, info: CheckpointInfo | None, base: str | None = None) -> str:
    """Whose weights and tokenizer the base of a checkpoint, or of a plain model, has.

    Args:
        base: another place where the base of a `lora` or `gate` checkpoint lies.

    Raises:
        CollmError: a checkpoint that was only partly written, one for servers, or one that names no base.
    """
    gate = Path(path) / GATE_FILE
    if info is None:
        if gate.is_file():
            raise CollmError(f"{path} has a {GATE_FILE} but no {FILE}: it was only partly written")
        return str(path)
    if info.kind == "export":
        raise CollmError(
            f"{path} was written by collm export, for servers (collm vllm-serve {path}); here, give the checkpoint it "
            "was made from"
        )
    if info.assistants and not gate.is_file():
        raise CollmError(f"{path} has no {GATE_FILE}: it was only partly written")
    spec = str(path) if info.kind == "full" else base or found(info, path).base_model
    if spec is None:
        raise CollmError(f"{path} does not name its base model; give it with --base")
    return spec
