"""How likely given texts are: the exact marginal over who writes, or one model's own likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from collm.decoding.baselines import law_of
from collm.errors import CollmError
from collm.gate import log_posterior, token_nll
from collm.models.local import LocalModel
from collm.types import BASE
from collm.values import Answer, Fault, LanguageModel, Query, Reply
from collm.views import View

TokenIds = tuple[int, ...]

LAWS = 512
"""Tokens whose laws over the vocabulary exist at a time, for each model."""


@dataclass(frozen=True, slots=True)
class GivenText:
    """A completion to be scored, and what stands before it in the eyes of each model, base first."""

    prompts: tuple[TokenIds, ...]
    completion: TokenIds

    def __post_init__(self) -> None:
        assert self.completion and all(self.prompts), self


@dataclass(frozen=True, slots=True)
class Likelihood:
    """`log_prob`: natural log of P(completion | prompt). `greedy`: every token is the most probable one of its law.

    `credit`: for each model the expected number of tokens that it wrote, the sum of P(Z = z | token, prefix).
    """

    log_prob: float
    greedy: bool
    credit: tuple[float, ...]

    @property
    def tokens(self) -> int:
        return round(sum(self.credit))


def likelihoods(
    models: Sequence[LanguageModel], texts: Sequence[GivenText], *, alone: int | None = None, batch_size: int = 16
) -> Iterator[Likelihood]:
    """The likelihood of each text, in order, under `log sum_z P(Z = z | prefix) P_z(token | prefix)` of every token.

    Where an assistant abstains, the gate is renormalised over the models that answer: the law of `compose` and of
    `sampled` decoding at temperature 1. (Training's loss does not renormalise, and so bounds it from above.)

    Args:
        models: the base first; its predictions must carry a gate unless `alone` is given.
        alone: the number of a model whose own law is taken instead. A tool gives probability 0 to what it does not say.
        batch_size: texts in a forward pass.

    Raises:
        CollmError: a model cannot answer.
    """
    asked = range(len(models)) if alone is None else [alone]
    for number in asked:
        model = models[number]
        if isinstance(model, LocalModel):
            model.reserve(batch_size)
    views: dict[tuple[int, int], View] = {}
    found: list[list[NDArray[np.float64]]] = [[] for _ in texts]
    greedy = [True] * len(texts)
    at = 0
    for batch in _batches(texts, batch_size):
        answers = {z: _predict(models[z], z, texts, batch, views, law=len(asked) > 1) for z in asked}
        for row, (i, start, end) in enumerate(batch):
            gold = texts[i].completion[start:end]
            laws = [{z: answers[z][row][t] for z in asked} for t in range(end - start)]
            found[i].append(_joint(laws, len(models), alone))
            greedy[i] = greedy[i] and all(_is_first(token, law, alone) for token, law in zip(gold, laws, strict=True))
        while at < len(texts) and sum(map(len, found[at])) == len(texts[at].completion):
            yield _summed(np.concatenate(found[at]), greedy[at])
            for z in asked:
                models[z].release(views.pop((at, z)))
            found[at], at = [], at + 1


Piece = tuple[int, int, int]
"""Tokens `start` to `end` of the completion of a text, given by its number."""


def _batches(texts: Sequence[GivenText], batch_size: int) -> Iterator[list[Piece]]:
    """Pieces in order, at most one of each text in a batch, so that caches hold what stands before it."""
    batch: list[Piece] = []
    room = LAWS
    for i, text in enumerate(texts):
        start = 0
        while start < len(text.completion):
            wanted = min(LAWS, len(text.completion) - start)
            if batch and (len(batch) == batch_size or room < wanted or batch[-1][0] == i):
                yield batch
                batch, room = [], LAWS
            batch.append((i, start, start + wanted))
            start, room = start + wanted, room - wanted
    if batch:
        yield batch


def _predict(
    model: LanguageModel,
    number: int,
    texts: Sequence[GivenText],
    batch: Sequence[Piece],
    views: dict[tuple[int, int], View],
    *,
    law: bool,
) -> list[list[Answer | None]]:
    """For each piece, what the model says of each of its tokens; None where it abstains."""
    queries = []
    for i, start, end in batch:
        prompt, completion = texts[i].prompts[number], texts[i].completion
        view = views.setdefault((i, number), View(prompt + completion[:-1]))
        length = len(prompt) + end - 1
        queries.append(Query(number, view, length, end - start, given=completion[start:end], law=law))
    return [[_usable(reply) for reply in replies] for replies in model.predict(queries)]


def _usable(reply: Reply) -> Answer | None:
    if isinstance(reply, Fault):
        raise CollmError(f"the likelihood cannot be computed: {reply.reason}")
    return reply


Laws = dict[int, Answer | None]


def _weights(laws: Laws, num_models: int, alone: int | None) -> list[float]:
    """`[1+K]` log P(Z = z), -inf for the models that abstain; not normalised."""
    if alone is not None:
        return [0.0 if z == alone else -np.inf for z in range(num_models)]
    base = laws[BASE]
    assert base is not None and base.log_gate is not None, "the marginal needs a base with a gate"
    return [weight if laws[z] is not None else -np.inf for z, weight in enumerate(base.log_gate)]


def _joint(laws: Sequence[Laws], num_models: int, alone: int | None) -> NDArray[np.float64]:
    """For each token `[1+1+K]`: its log-probability, then P(Z = z | token)."""
    log_gate = torch.tensor([_weights(law, num_models, alone) for law in laws], dtype=torch.float64)
    log_gate = log_gate.log_softmax(dim=-1)
    log_probs = torch.full_like(log_gate, -torch.inf)
    for t, law in enumerate(laws):
        for z, answer in law.items():
            if answer is not None and answer.given_log_prob is not None:
                log_probs[t, z] = answer.given_log_prob
    posterior = log_posterior(log_gate, log_probs).exp()
    return torch.cat([-token_nll(log_gate, log_probs)[:, None], posterior], dim=1).numpy()


def _is_first(token: int, laws: Laws, alone: int | None) -> bool:
    """Whether the token is the most probable one of its law."""
    present = {z: law for z, law in laws.items() if law is not None}
    tops = {law.top_token_id for law in present.values()}
    if len(tops) < 2:  # what all find most probable is most probable in any mixture of them
        return token in tops
    weights = _weights(laws, len(laws), alone)
    device = law_of(present[BASE]).device
    joint = torch.stack([weights[z] + law_of(law).to(device) for z, law in present.items()])
    return int(joint.logsumexp(dim=0).argmax()) == token


def _summed(tokens: NDArray[np.float64], greedy: bool) -> Likelihood:
    total = tokens.sum(axis=0)
    return Likelihood(float(total[0]), greedy, tuple(float(share) for share in total[1:]))
