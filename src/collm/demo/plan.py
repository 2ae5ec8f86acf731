"""How much the demo does: sizes of models, texts and runs, and what they are called."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from collm.demo.corpus import Sizes

BASE, FACTS, ARITHMETIC = "base", "facts", "arithmetic"
EXPERTS = (FACTS, ARITHMETIC)
TASK = "exact_match"


@dataclass(frozen=True)
class Schedule:
    """One training run."""

    epochs: float
    learning_rate: float
    batch_size: int = 32
    evaluations: int = 2


@dataclass(frozen=True)
class Plan:
    """The whole demo.

    The settings were found on the world of seed 0, its test questions in sight; every other seed makes a world with
    other people and questions, on which nothing was tried out.
    """

    sizes: Sizes = Sizes()
    base_hidden_size: int = 96
    """The base copies names and numbers into forms, which takes more than an expert's one subject."""
    expert_hidden_size: int = 64
    layers: int = 2
    base: Schedule = Schedule(5, 3e-3)
    """The base's first training, on fiction. After three epochs it copied numbers of questions wrongly on some
    processors."""
    facts: Schedule = Schedule(18, 5e-3)
    drill: Schedule = Schedule(20, 5e-3, batch_size=96)
    """The arithmetic expert's first training, on bare sums: a lesson of its own, or it takes far longer. Large batches
    of many sums: with fewer it learnt to carry on some processors and not on others, whose sums of floats differ in
    their last bits."""
    arithmetic: Schedule = Schedule(6, 3e-3, batch_size=64)
    """And its second, on everything: sums in running text, too."""
    tuning: Schedule = Schedule(3, 1e-3, evaluations=3)
    """Fine-tuning on the questions, alike for the base alone and for all that write together."""
    gate_learning_rate: float = 3e-3
    rates: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Deferral rates of the joint system's curve."""
    few_rates: tuple[float, ...] = (0.0, 0.1, 0.2)
    """And those among which the other systems find their best: no assistant is worth more."""
    rounds: int = 1
    max_tokens: int = 28
    """The longest answer has 22."""
    batch_size: int = 100

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what tells this plan from another."""
        return asdict(self)


@dataclass(frozen=True)
class System:
    """A row of the table: who writes, trained how. `checkpoint` is a folder in `models/`."""

    name: str
    kind: str
    checkpoint: str
    assistants: tuple[str, ...] = ()
    objective: str = "sft"
    like: str | None = field(default=None)
    """Defer at random, as often as that system does."""

    @property
    def alone(self) -> str | None:
        """Which of the three models this is, fine-tuned or not, where it needs none of the others."""
        return None if self.assistants else self.checkpoint if self.checkpoint in EXPERTS else BASE


BOTH = "both assistants"
SYSTEMS = (
    System("base, fine-tuned alone", "single", "base-alone"),
    System("facts expert alone", "single", FACTS),
    System("arithmetic expert alone", "single", ARITHMETIC),
    System("weak supervision, both", "control", "weak", EXPERTS, "weak_supervision"),
    System("random deferral, both", "control", BOTH.replace(" ", "-"), EXPERTS, "marginal", like=BOTH),
    System("facts assistant", "joint", "with-facts", (FACTS,), "marginal"),
    System("arithmetic assistant", "joint", "with-arithmetic", (ARITHMETIC,), "marginal"),
    System(BOTH, "joint", BOTH.replace(" ", "-"), EXPERTS, "marginal"),
)
