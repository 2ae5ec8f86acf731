"""Who writes the next token. A policy reads what the base predicts and names the models to ask, in order.

The first one that does not abstain writes. The base never abstains and always comes last, so that a tool that has
nothing to say hands the token back. What a policy draws is keyed by (seed, sample, position). `Threshold`,
`ExpectedGain`, `Sampled` and `Always` read the gate; the baselines `ByEntropy`, `ByTopProbability` and `Random` do
without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from collm.noise import uniforms
from collm.types import BASE
from collm.values import Answer, Draw


class Decision(NamedTuple):
    """`authors`: the models to ask for a token, in order; ends with `BASE`.

    `signal`: the number that exceeded a threshold or did not, where that is not the gate's; calibration reads it.
    """

    authors: tuple[int, ...]
    signal: float | None = None


class Policy(Protocol):
    @property
    def needs_gate(self) -> bool:
        """Without a gate, the base's `log_gate` is `None` and such a policy cannot be used."""
        ...

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        """Who is to be asked for the token at `position` of the completion; `draw` keys what is drawn."""
        ...


def log_odds(log_gate: Sequence[float]) -> float:
    """`log P(Z != base) - log P(Z = base)`: what a threshold is compared with.

    Log-odds, for a probability close to 1 is rounded to it (sigmoid(17) in float32, sigmoid(7) in bfloat16). The
    order of the assistants changes nothing, not even the last digit.
    """
    highest = max(log_gate[1:])
    if highest == -math.inf:
        return -math.inf
    if len(log_gate) == 2:  # the same in a third of the time; tokens are asked about while a device waits
        return highest - log_gate[BASE]
    deferral = highest + math.log(math.fsum(math.exp(value - highest) for value in log_gate[1:]))
    return deferral - log_gate[BASE]


def to_log_odds(probability: float) -> float:
    """`log(p / (1 - p))`; 0 and 1 give -inf and inf."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability) - math.log1p(-probability)


def to_probability(log_odds: float) -> float:
    """The inverse of `to_log_odds`."""
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def log_share(log_gate: Sequence[float]) -> float:
    """`log P(Z != base)` of a gate that need not be normalised."""
    return -float(np.logaddexp(0.0, -log_odds(log_gate)))


def by_gate(log_gate: Sequence[float]) -> list[int]:
    """The assistants in the order in which they are asked: the largest gate first; of equals, the first."""
    return sorted(range(1, len(log_gate)), key=lambda z: -log_gate[z])


def asked_while(exceeds: Callable[[Sequence[float]], bool], log_gate: Sequence[float]) -> tuple[int, ...]:
    """The assistants in the order of their gates, each as long as `exceeds` holds for what is left; then the base.

    What is left is the log-gate of the base and of the assistants not asked so far, base first: as if those that were
    asked, and abstained, did not exist.
    """
    if len(log_gate) == 2:  # the same in a third of the time
        return (1, BASE) if exceeds(log_gate) else (BASE,)
    order = by_gate(log_gate)
    left = [log_gate[BASE], *(log_gate[z] for z in order)]
    asked = 0
    while asked < len(order) and exceeds(left):
        asked += 1
        del left[1]
    return (*order[:asked], BASE)


def decide(policy: Policy, base: Answer, draw: Draw, position: int) -> Decision:
    """Who is to be asked for a token: as the policy says, unless the base has tested it where its logits are.

    There it may have read what its answer does not tell (`UNKNOWN`); to whom it defers is the gate's affair anyway.
    """
    decision = policy.decide(base, draw, position)
    if decision.signal is not None and math.isnan(decision.signal):
        decision = decision._replace(signal=None)
    if base.defers is None or base.defers == (decision.authors[0] != BASE):
        return decision
    if not base.defers:
        return decision._replace(authors=(BASE,))
    assert base.log_gate is not None, "only a gate can be tested elsewhere"
    return decision._replace(authors=(by_gate(base.log_gate)[0], BASE))


def defers(policy: Policy, base: Answer, draw: Draw, position: int) -> bool:
    """Whether `decide` names somebody else first: quicker than that where no more is asked, token by token."""
    if base.defers is not None:
        return base.defers
    if isinstance(policy, Random):
        return uniforms(draw.seed, draw.sample, position, "deferral", 2)[0] < policy.rate
    if isinstance(policy, Threshold) and base.log_gate is not None:
        return log_odds(base.log_gate) > policy.log_odds
    return policy.decide(base, draw, position).authors[0] != BASE


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

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        assert base.log_gate is not None
        return Decision(asked_while(lambda left: log_odds(left) > self.log_odds, base.log_gate))


@dataclass(frozen=True, slots=True)
class ExpectedGain:
    """Defer where `log P(Z != base) + log(1 - max_x P_base(x))` exceeds `log_gain` (strictly); to whom: as `Threshold`.

    The gate is fitted to the marginal likelihood, which does not care who writes what both models would write, so that
    it may be high where nothing is gained: a poor order to spend a small deferral rate in. The base's doubt, 1 - max p
    (Chow 1970), says where something may be gained, but not whether this assistant knows better, which confidence alone
    cannot tell (Jitkrittum et al. 2023, arXiv 2307.02764). Their product is the probability that the base's choice is
    wrong where an assistant is wanted, if the two are independent.
    """

    log_gain: float
    needs_gate: bool = True

    @classmethod
    def of_probability(cls, threshold: float) -> ExpectedGain:
        return cls(-to_nats(threshold))

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        assert base.log_gate is not None
        error = log_error(base.top_log_prob)
        authors = asked_while(lambda left: log_share(left) + error > self.log_gain, base.log_gate)
        return Decision(authors, log_share(base.log_gate) + error)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Draw Z from the gate; where the drawn model abstains, draw again among the others.

    Drawn as an exponential race (the order of E_z / P(Z = z)), whose first runner is distributed as the gate and
    whose first runner among any subset as the gate renormalised over that subset. So the text is an exact draw from
    the marginal, renormalised over the models that answer.
    """

    needs_gate: bool = True

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        assert base.log_gate is not None
        noise = uniforms(draw.seed, draw.sample, position, "author", len(base.log_gate))
        race = [math.log(-math.log(u)) - gate for u, gate in zip(noise, base.log_gate, strict=True)]
        order = sorted(range(len(race)), key=race.__getitem__)
        return Decision(tuple(order[: order.index(BASE) + 1]))


@dataclass(frozen=True, slots=True)
class Random:
    """Defer each token with probability `rate` to a uniformly drawn assistant, whatever the gate says: a control.

    Its signal is `-log u` of the uniform number `u` drawn, which exceeds `-log rate` with probability `rate`.
    """

    rate: float
    num_assistants: int
    needs_gate: bool = False

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        uniform, whom = uniforms(draw.seed, draw.sample, position, "deferral", 2)
        authors = (1 + int(whom * self.num_assistants), BASE) if uniform < self.rate else (BASE,)
        return Decision(authors, to_nats(uniform))


@dataclass(frozen=True, slots=True)
class ByEntropy:
    """Defer where the entropy of the base's law exceeds `nats` (strictly): the base's own doubt instead of a gate.

    To the assistant with the largest gate, and on to the next where it abstains; without a gate, to one drawn evenly.
    """

    nats: float
    num_assistants: int
    needs_gate: bool = False

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        doubt = base.entropy
        return Decision(_assistants(base, self.num_assistants, draw, position) if doubt > self.nats else (BASE,), doubt)


@dataclass(frozen=True, slots=True)
class ByTopProbability:
    """Defer where `-log p` exceeds `nats` (strictly), p being the largest probability of the base's law.

    Compared as a logarithm, for probabilities near 1 are rounded to it. To whom: as `ByEntropy`.
    """

    nats: float
    num_assistants: int
    needs_gate: bool = False

    @classmethod
    def of_probability(cls, threshold: float, num_assistants: int) -> ByTopProbability:
        """Defers where the largest probability lies below `threshold`."""
        return cls(to_nats(threshold), num_assistants)

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        doubt = -base.top_log_prob
        return Decision(_assistants(base, self.num_assistants, draw, position) if doubt > self.nats else (BASE,), doubt)


def log_error(top_log_prob: float) -> float:
    """`log(1 - p)` of a largest probability p, given as its logarithm: that the choice is wrong, as the model sees it.

    At least `log 2**-24`, for float32 cannot tell smaller ones from 0.
    """
    return math.log(max(-math.expm1(top_log_prob), 2.0**-24))


def to_nats(probability: float) -> float:
    """`-log p`; inf for 0."""
    return -math.log(probability) if probability else math.inf


def _assistants(base: Answer, num_assistants: int, draw: Draw, position: int) -> tuple[int, ...]:
    if base.log_gate is not None:
        return (*by_gate(base.log_gate), BASE)
    [whom] = uniforms(draw.seed, draw.sample, position, "author")
    return (1 + int(whom * num_assistants), BASE)


@dataclass(frozen=True, slots=True)
class Never:
    needs_gate: bool = False

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        return Decision((BASE,))


@dataclass(frozen=True, slots=True)
class Always:
    """Defer every token to the assistant with the largest gate, and on to the next where it abstains; without a gate,
    to the first."""

    needs_gate: bool = False

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        return Decision((1, BASE) if base.log_gate is None else (*by_gate(base.log_gate), BASE))
