"""Who writes the next token. A policy reads the gate and names the models to ask, in order.

The first one that does not abstain writes. The base never abstains and always comes last, so that a tool that has
nothing to say hands the token back. A policy sees numbers only; what it draws is keyed by (seed, position).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from collm.decoding.sampling import noise
from collm.types import BASE


class Policy(Protocol):
    @property
    def needs_gate(self) -> bool:
        """Without a gate, `log_gate` is `None` and such a policy cannot be used."""
        ...

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        """The models to ask for the token at `position` of the completion; ends with `BASE`."""
        ...


def log_odds(log_gate: Sequence[float]) -> float:
    """`log P(Z != base) - log P(Z = base)`: what a threshold is compared with.

    Log-odds, for a probability close to 1 is rounded to it (sigmoid(17) in float32, sigmoid(7) in bfloat16).
    """
    highest = max(log_gate[1:])
    if highest == -math.inf:
        return -math.inf
    deferral = highest + math.log(sum(math.exp(value - highest) for value in log_gate[1:]))
    return deferral - log_gate[BASE]


def to_log_odds(probability: float) -> float:
    """`log(p / (1 - p))`; 0 and 1 give -inf and inf."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def to_probability(log_odds: float) -> float:
    """The inverse of `to_log_odds`."""
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def by_gate(log_gate: Sequence[float]) -> list[int]:
    """The assistants in the order in which they are asked: the largest gate first; of equals, the first."""
    return sorted(range(1, len(log_gate)), key=lambda z: -log_gate[z])


@dataclass(frozen=True, slots=True)
class Threshold:
    """Defer where the gate's log-odds exceed `log_odds` (strictly), to the assistant with the largest gate.

    Where it abstains, the gate is renormalised over the others and the same threshold holds for them, as if the one
    that abstained did not exist. (Log-odds do not change in renormalising: its share is left out of the sum.)
    """

    log_odds: float
    needs_gate: bool = True

    @classmethod
    def of_probability(cls, threshold: float) -> Threshold:
        return cls(to_log_odds(threshold))

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        assert log_gate is not None
        order = by_gate(log_gate)
        for asked in range(len(order)):
            left = (log_gate[BASE], *(log_gate[z] for z in order[asked:]))
            if not log_odds(left) > self.log_odds:
                return (*order[:asked], BASE)
        return (*order, BASE)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Draw Z from the gate; where the drawn model abstains, draw again among the others.

    Drawn as an exponential race (the order of E_z / P(Z = z)), whose first runner is distributed as the gate and
    whose first runner among any subset as the gate renormalised over that subset. So the text is an exact draw from
    the marginal, renormalised over the models that answer.
    """

    needs_gate: bool = True

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        assert log_gate is not None
        race = np.log(noise(seed, position, "author").exponential(size=len(log_gate))) - np.asarray(log_gate)
        order = [int(z) for z in np.argsort(race, kind="stable")]
        return tuple(order[: order.index(BASE) + 1])


@dataclass(frozen=True, slots=True)
class Random:
    """Defer each token with probability `rate` to a uniformly drawn assistant, whatever the gate says: a control."""

    rate: float
    num_assistants: int
    needs_gate: bool = False

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        rng = noise(seed, position, "deferral")
        return (1 + int(rng.integers(self.num_assistants)), BASE) if rng.random() < self.rate else (BASE,)


@dataclass(frozen=True, slots=True)
class Never:
    needs_gate: bool = False

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        return (BASE,)


@dataclass(frozen=True, slots=True)
class Always:
    """Defer every token to the assistant with the largest gate, and on to the next where it abstains; without a gate,
    to the first."""

    needs_gate: bool = False

    def authors(self, log_gate: tuple[float, ...] | None, seed: int, position: int) -> tuple[int, ...]:
        return (1, BASE) if log_gate is None else (*by_gate(log_gate), BASE)
