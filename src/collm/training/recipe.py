"""The recipe: everything a training run depends on, in one YAML file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from collm.errors import CollmError, nearest
from collm.sampling_params import Signal
from collm.text import read_text


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatSection(_Section):
    """How a model is shown its prompts (`collm.data.formatting.PromptFormat`)."""

    system_prompt: str | None = None
    chat_template: str | None = None
    add_bos: bool | None = None
    template_kwargs: dict[str, Any] = {}
    date: Annotated[str | None, BeforeValidator(lambda day: str(day) if isinstance(day, date) else day)] = None
    """YAML reads 2026-07-26 as a day, not as a text."""

    def to_dict(self) -> dict[str, Any]:
        """What is set."""
        return {name: value for name, value in self.model_dump(exclude_none=True).items() if value != {}}


class ModelSection(_Section):
    model: str
    """A spec: folder, hub id, `FILE.gguf`, `pkg:PACKAGE/FILE.gguf`; for an assistant also `calculator`, or a server
    (`vllm+http://host:8000`), which is asked for scores."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    format: FormatSection = FormatSection()
    scores: Path | None = None
    """Scores of `data.train` made with `collm score`; otherwise they are made where they are needed. An assistant whose
    scores are all given is not opened."""
    validation_scores: Path | None = None
    """Scores of `data.validation`."""


class AssistantSection(ModelSection):
    name: str


class DataSection(_Section):
    train: str
    validation: str | None = None
    """Held-out text; without it `validation_share` of the training examples is held out, by a hash of their ids."""
    validation_share: float = Field(0.05, gt=0, lt=1)
    max_length: int = Field(1024, ge=2)
    skip_bad: bool = False
    last_turn: bool = False
    """Of a conversation learn the last assistant turn alone. Needed where an assistant's chat template rewrites earlier
    turns and the base's does not; where the base's does, it is so anyway."""


class InitSection(_Section):
    """Initialisation of the gate by pseudo-labels (method.md: without it training collapses to never deferring)."""

    method: Literal["a", "b", "none"] = "a"
    max_tokens: int = Field(20_000, ge=100)
    """Labelled tokens that the gate is fitted to; a random sample where there are more."""


class LoraSection(_Section):
    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"


class TrainingSection(_Section):
    epochs: float = Field(2.0, gt=0)
    batch_size: int = Field(16, ge=1)
    """Examples a step on each device."""
    gradient_accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-5, gt=0)
    gate_learning_rate: float = Field(1e-3, gt=0)
    """For standardised hidden states: it is divided by their measured standard deviation."""
    warmup: float = Field(0.04, ge=0, lt=1)
    """Share of the steps."""
    schedule: str = "linear"
    weight_decay: float = 0.0
    bf16: bool = False
    gradient_checkpointing: bool = False
    evaluations: int = Field(4, ge=1)
    """Evaluations on held-out text, evenly spread over the run; the best checkpoint among them is kept."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a gain."""
    save_minutes: float = Field(5.0, gt=0)
    """Between two checkpoints to resume from; longer where writing one takes more than a twentieth of it."""
    seed: int = 0


class CalibrationSection(_Section):
    """For `collm run`: thresholds for deferral rates (`collm calibrate`)."""

    data: str
    """Neither trained nor tested on."""
    signal: Signal = "gate"
    rates: list[float] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0]
    rounds: int = Field(2, ge=1)
    """Steps towards each rate."""

    @field_validator("rates")
    @classmethod
    def _shares(cls, rates: list[float]) -> list[float]:
        if not rates or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError("rates are one or more numbers between 0 and 1")
        return rates


class EvaluationSection(_Section):
    """For `collm run`: the pair on test data, beside its models alone (`collm eval`)."""

    data: str
    rates: list[float] = []
    """Deferral rates of the pair; none: the one that did best on the calibration data."""
    fine_tuned_base: bool = False
    """Train the base alone on the same data as well: the fairest rival, for as much time again."""
    at_random: bool = True
    """A control: the pair that defers as often, but at random places."""

    @field_validator("rates")
    @classmethod
    def _shares(cls, rates: list[float]) -> list[float]:
        if not all(0 < rate <= 1 for rate in rates):
            raise ValueError("rates are numbers above 0 and up to 1")
        return rates


class GenerationSection(_Section):
    """How texts are written in calibration and evaluation; `own_texts` has such keys of its own."""

    max_tokens: int = Field(256, ge=1)
    batch_size: int = Field(8, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"


class OwnTextsSection(GenerationSection):
    """Texts that models write themselves and a task's scorer accepts, to be learnt beside the gold ones."""

    task: str
    """Whose scorer says what is right; a shipped task, or `MODULE:FUNCTION`."""
    writer: str = "pair"
    """`pair`: who writes is drawn from the gate of `checkpoint`. Or one model alone: `base`, or an assistant's name."""
    checkpoint: str | None = None
    """Whose models write; without one they are those of the recipe, untrained, which have no gate."""
    data: str | None = None
    """Questions with what the scorer needs; without them those of the training examples."""
    samples: int = Field(8, ge=1)
    """Texts for each question."""
    seed: int = Field(0, ge=0)
    temperature: float = Field(1.0, gt=0)
    """At 1 the pair's texts are drawn exactly from the marginal."""
    keep: float = Field(1.0, ge=0, le=1)
    """The lowest score of a text that is kept."""
    max_texts: int | None = Field(None, ge=1)
    """So many of the texts that are kept, drawn by `seed`."""
    gold: bool = True
    """Whether the gold texts are learnt as well."""


AFTER_TRAINING = ("task", "calibration", "evaluation", "generation")
"""Keys that change nothing about a training run."""


class Recipe(_Section):
    out: Path
    base: ModelSection
    assistants: list[AssistantSection] = []
    data: DataSection
    own_texts: OwnTextsSection | None = None
    cache: Path | None = None
    """Where scores and hidden states are kept; recipes on the same data may share it. Default: `out/cache`."""
    init: InitSection = InitSection()
    objective: Literal["marginal", "weak_supervision", "sft"] = "marginal"
    """`marginal` is the method; `weak_supervision` the paper's baseline; `sft` trains the base alone."""
    tune: Literal["full", "lora", "gate"] = "full"
    lora: LoraSection = LoraSection()
    deferral_cost: float = Field(0.0, ge=0)
    """Price in nats of one deferred token; its expectation, the mean of 1 - gate_0, is added to the loss."""
    target_rate: float | None = Field(None, gt=0, lt=1)
    """The mean of 1 - gate_0 to train for; the price is found during training."""
    training: TrainingSection = TrainingSection()
    trainer: dict[str, Any] = {}
    """More of transformers' `TrainingArguments`, passed on as they are (report_to, deepspeed, fsdp, ...)."""
    task: str | None = None
    """For `collm run`: what answers are worth; a shipped task, or `MODULE:FUNCTION`."""
    calibration: CalibrationSection | None = None
    evaluation: EvaluationSection | None = None
    generation: GenerationSection = GenerationSection()

    @property
    def cache_folder(self) -> Path:
        return self.cache or self.out / "cache"

    def writer(self, name: str) -> ModelSection:
        """`base`, or an assistant."""
        return next((each for each in self.assistants if each.name == name), self.base)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.objective == "sft" and self.assistants:
            raise ValueError("objective sft trains the base alone: leave out the assistants")
        if self.objective != "sft" and not self.assistants:
            raise ValueError(f"objective {self.objective} needs at least one assistant (or set objective: sft)")
        if self.tune == "gate" and self.objective == "sft":
            raise ValueError("tune: gate trains no base, and objective sft nothing else")
        if self.tune == "full" and self.base.dtype != "float32":
            raise ValueError(
                f"tune: full with base.dtype {self.base.dtype} moves hardly any weight, for a step is smaller than the "
                "gap between two numbers: take base.dtype float32 with training.bf16: true, which computes in "
                "bfloat16, or tune: lora"
            )
        if self.target_rate is not None and self.deferral_cost:
            raise ValueError("target_rate finds the price, and deferral_cost gives it: leave out one of them")
        if self.target_rate is not None and self.objective != "marginal":
            raise ValueError(f"target_rate goes with objective marginal, not {self.objective}")
        if self.objective == "weak_supervision" and self.tune == "gate" and self.init.method == "none":
            raise ValueError("weak supervision of the gate alone is its initialisation, which needs init.method a or b")
        if self.data.validation is None and any(m.validation_scores for m in (self.base, *self.assistants)):
            raise ValueError(
                "validation_scores go with data.validation; what validation_share holds out is covered by scores"
            )
        names = [assistant.name for assistant in self.assistants]
        own = self.own_texts
        if own is not None and own.checkpoint is None and own.writer not in ("base", *names):
            there = ", ".join(("base", *names))
            raise ValueError(
                "own_texts: a pair writes by its gate: give checkpoint, a pair that was trained before (on the gold "
                f"texts, say), or a writer that writes alone ({there})"
                if own.writer == "pair"
                else f"own_texts: there is no writer {own.writer!r}: it is {there}; or with a checkpoint, pair"
            )
        if len(set(names)) < len(names) or "base" in names:
            raise ValueError("assistants need different names, none of them 'base'")
        return self


def _nearest(error: Any) -> str:
    """One validation error in words; for an unknown key, the nearest known one."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    section: type[BaseModel] = Recipe
    for part in error["loc"][:-1]:
        if isinstance(part, str):
            annotation: Any = section.model_fields[part].annotation
            section = annotation.__args__[0] if getattr(annotation, "__args__", None) else annotation
    known = list(section.model_fields)
    hint = nearest(str(error["loc"][-1]), known, f"known keys: {', '.join(known)}")
    return f"unknown key {where!r}; {hint}"


def parse_recipe(values: Any, source: str = "recipe") -> Recipe:
    """A checked recipe from plain values.

    Raises:
        CollmError: every fault found, an unknown key with the nearest known one.
    """
    if not isinstance(values, dict):
        raise CollmError(f"{source}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(_nearest(e) for e in error.errors())
        raise CollmError(f"{source}: {faults}") from None


def load_recipe(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file. Relative paths in it are relative to where the command is run.

    Args:
        changes: `KEY=VALUE`, as the command line takes them: see `changed`.
    """
    path = Path(path)
    if not path.exists():
        raise CollmError(f"{path}: there is no such recipe")
    try:
        values = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise CollmError(f"{path} is not valid YAML: {error}") from None
    if not changes:
        return parse_recipe(values, str(path))
    parse_recipe(values, str(path))  # a fault of the file is not one of the changes
    return parse_recipe(changed(values, changes), f"{path} with {' '.join(changes)}")


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A recipe's values with each `KEY=VALUE` put in: dots lead into sections (`training.epochs=2`), numbers into lists
    (`assistants.0.model=helper`), and a value is YAML.

    Raises:
        CollmError: a change that is none, or leads nowhere.
    """
    values = copy.deepcopy(values)
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise CollmError(f"a change of the recipe is KEY=VALUE, as in training.epochs=2, not {change!r}")
        *sections, last = key.split(".")
        place: Any = values
        for section in sections:
            place = _inside(place, section, change)
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CollmError(f"{change}: {value!r} is not valid YAML ({' '.join(str(error).split())})") from None
        if isinstance(place, list):
            _inside(place, last, change)  # it is there
            place[int(last)] = read
        elif isinstance(place, dict):
            place[last] = read
        else:
            raise CollmError(f"{change}: {'.'.join(sections)} is {place!r} and has no parts")
    return values


def _inside(place: Any, name: str, change: str) -> Any:
    """What stands under a name or number; a section that is not there is begun."""
    if isinstance(place, dict):
        if place.get(name) is None:
            place[name] = {}
        return place[name]
    if not isinstance(place, list):
        raise CollmError(f"{change}: there is nothing inside {place!r}")
    if not name.isdecimal() or int(name) >= len(place):
        there = f"0 to {len(place) - 1}" if place else "none yet"
        raise CollmError(f"{change}: {name!r} is no entry of this list, which are numbered ({there})")
    return place[int(name)]
