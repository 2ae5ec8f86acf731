"""One law for every token, made from the laws of all models: mixtures, and the rivals that do arithmetic on laws.

Every model is asked at every token. Symbols: `p_0` is the base's law, `p_1`, ... those of the assistants.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from collm.decoding.choosing import answer_of, most_probable
from collm.decoding.collaborative import Flow, ModelFailed, ask, ends_text, gate_of, required
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import Answer, Fault, Reply
from collm.views import Text

EXPERT = 1
"""The assistant whose law is corrected by the others; it counts as the author of what comes of it."""
UNTUNED = 2
LEAST = math.log(torch.finfo(torch.float32).tiny)
"""Stands for log 0 in a law that is divided by: a token that only this model does not know stays finite."""


@dataclass(frozen=True, slots=True)
class Combined:
    """`law`: `[V]` log-probabilities of the next token. `shares`: `[V]` for each model that may be its author; the
    largest share wrote it."""

    law: Tensor
    shares: Mapping[int, Tensor]

    def author(self, token_id: int) -> int:
        return max(self.shares, key=lambda z: float(self.shares[z][token_id]))


class Combination(ABC):
    """How the laws of several models become one."""

    needs_gate: ClassVar[bool] = False
    roles: ClassVar[tuple[str, ...]] = ()
    """The base's part and that of each assistant, if it is defined for so many alone. Each must then give a law over
    the whole vocabulary at every token, which tools do not."""

    @abstractmethod
    def combine(self, present: Mapping[int, Answer]) -> Combined:
        """The law of a token from those of the models that answer, by number; the base always does."""


def combined(text: Text, params: SamplingParams, combination: Combination, eos: Sequence[frozenset[int]]) -> Flow:
    """Every model at every token, one law. `log_prob` is under that law.

    A model that fails is left out with `on_assistant_error="base"`; if the law is then not defined, the base writes.
    """
    draw = params.draw
    while text.length < params.max_tokens:
        replies = yield from ask(text, range(len(text.views)), draw, law=True)
        base = required(replies[BASE])
        present, fault = _present(replies, params)
        if combination.roles and len(present) < len(replies):
            found = _without(replies, base)
        else:
            found = combination.combine(present)
        answer = answer_of(found.law, draw, text.length)
        author = found.author(answer.token_id)
        text.append(answer.token_id)
        gate, top = gate_of(base.log_gate), most_probable(found.law, params.top_log_probs)
        yield Step(answer.token_id, author, answer.log_prob, gate, base.top_token_id, False, fault, top=top)
        if ends_text(answer.token_id, author, eos):
            return "stop"
    return "length"


def _present(replies: Sequence[Reply], params: SamplingParams) -> tuple[dict[int, Answer], str | None]:
    """The laws there are, and why one is missing if its model failed."""
    faults = [reply for reply in replies if isinstance(reply, Fault)]
    if faults and params.on_assistant_error == "fail":
        raise ModelFailed(faults[0].reason)
    present = {z: reply for z, reply in enumerate(replies) if isinstance(reply, Answer)}
    return present, faults[0].reason if faults else None


def _without(replies: Sequence[Reply], base: Answer) -> Combined:
    if None in replies:
        raise ModelFailed(
            f"assistant {replies.index(None)} abstains, and this way of decoding needs the law of every model at "
            "every token: use it with language models, not with tools"
        )
    return Combined(law_of(base), {BASE: law_of(base)})


def law_of(answer: Answer) -> Tensor:
    """The law `[V]` of an answer that was asked for it."""
    if answer.law is None:
        raise ModelFailed("this way of decoding mixes laws, and a model gave none: use models in this process")
    return answer.law


def _mixture(present: Mapping[int, Answer], log_weights: Sequence[float]) -> Combined:
    """`sum_z w_z p_z`, the weights renormalised; a model's share of a token is `w_z p_z`."""
    device = law_of(present[BASE]).device
    weights = torch.tensor(log_weights, dtype=torch.float64).log_softmax(dim=0).tolist()
    joint = {z: w + law_of(answer).to(device) for (z, answer), w in zip(present.items(), weights, strict=True)}
    return Combined(torch.stack(list(joint.values())).logsumexp(dim=0), joint)


@dataclass(frozen=True)
class Mixture(Combination):
    """`sum_z P(Z = z) p_z`, the gate renormalised over the models that answer: the marginal law itself (`compose`)."""

    needs_gate: ClassVar[bool] = True

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        log_gate = present[BASE].log_gate
        assert log_gate is not None
        return _mixture(present, [log_gate[z] for z in present])


@dataclass(frozen=True)
class UniformMixture(Combination):
    """The mean of the laws of the models that answer."""

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        return _mixture(present, [0.0] * len(present))


@dataclass(frozen=True)
class MoreConfident(Combination):
    """The law of the model whose most probable token is the most probable; the base's where others equal it."""

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        surest = max(sorted(present), key=lambda z: present[z].top_log_prob)
        return Combined(law_of(present[surest]), {surest: law_of(present[surest])})


@dataclass(frozen=True)
class Contrastive(Combination):
    """Contrastive decoding: the assistant is the expert, the base the amateur whose mistakes are to be avoided.

    `softmax((1 + beta) log p_1 - beta log p_0)` over the tokens with `p_1 >= alpha max p_1`, the others impossible:
    O'Brien and Lewis 2023, arXiv 2309.09117, algorithm 2. The cut-off and the contrast are those of Li et al. 2023,
    arXiv 2210.15097, whose objective is the limit of large beta.
    """

    alpha: float = 0.1
    beta: float = 0.5
    roles: ClassVar[tuple[str, ...]] = ("the amateur", "the expert")

    def __post_init__(self) -> None:
        if not (0 < self.alpha <= 1 and self.beta >= 0):
            raise ValueError(f"alpha must lie in (0, 1] and beta be 0 or more, not {self.alpha} and {self.beta}")

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        expert = law_of(present[EXPERT])
        amateur = law_of(present[BASE]).to(expert.device).clamp_min(LEAST)
        scores = (1 + self.beta) * expert - self.beta * amateur
        scores[expert < math.log(self.alpha) + expert.max()] = -torch.inf
        law = scores.log_softmax(dim=0)
        return Combined(law, {EXPERT: law})


@dataclass(frozen=True)
class ProxyTuning(Combination):
    """Proxy tuning: a large untuned model is steered by what tuning changed in a small one.

    `softmax(log p_1 + log p_0 - log p_2)`: assistant 1 is the large untuned model, the base the small tuned one,
    assistant 2 the small one before tuning. Liu et al. 2024, arXiv 2401.08565; its logits and our log-probabilities
    differ by a constant, which the softmax takes out.
    """

    roles: ClassVar[tuple[str, ...]] = ("the small tuned model", "the large untuned one", "the small untuned one")

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        large = law_of(present[EXPERT])
        tuned, untuned = (law_of(present[z]).to(large.device) for z in (BASE, UNTUNED))
        law = (large + tuned - untuned.clamp_min(LEAST)).log_softmax(dim=0)
        return Combined(law, {EXPERT: law})
