"""How likely given texts are: the exact marginal over who writes, or one model's own likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from collm.cuts import START
from collm.decoding.baselines import law_of
from collm.decoding.choosing import most_probable
from collm.decoding.collaborative import Flow, ModelFailed
from collm.errors import CollmError
from collm.gate import log_posterior, token_nll
from collm.models.local import LocalModel
from collm.types import BASE
from collm.values import Answer, Fault, LanguageModel, Query, Reply
from collm.views import Text, View

TokenIds = tuple[int, ...]

LAWS = 512
"""Tokens whose laws over the vocabulary exist at a time, for each model."""


@dataclass(frozen=True, slots=True)
class GivenText:
    """A completion to be scored, and what stands before it in the eyes of each model, base first.

    `last_byte`: where models share chunks and the completion goes on with a text, that one's last byte.
    """

    prompts: tuple[TokenIds, ...]
    completion: TokenIds
    last_byte: int = START

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


@dataclass(frozen=True, slots=True)
class Given:
    """One token of a given text: its log-probability, and the most probable ones in its place, best first."""

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


def scoring(given: GivenText, text: Text, into: list[Given], *, alone: int | None = None, num_top: int = 0) -> Flow:
    """The law of `likelihoods`, token by token, as a flow that writes nothing: for an engine that others use, too.

    Args:
        text: its views hold the prompts and all of the completion but the last token (`scored_text`).
        into: what is found, in order.
    """
    asked = range(len(text.views)) if alone is None else [alone]
    mixes = len(asked) > 1
    for start in range(0, len(given.completion), LAWS):
        gold = given.completion[start : start + LAWS]
        end = start + len(gold)
        replies = yield tuple(
            Query(
                z,
                text.views[z],
                len(given.prompts[z]) + end - 1,
                len(gold),
                given=gold,
                num_top=0 if mixes else num_top,
                law=mixes,
            )
            for z in asked
        )
        assert replies is not None
        try:
            answers = {z: [_usable(reply) for reply in own] for z, own in zip(asked, replies, strict=True)}
        except CollmError as error:
            raise ModelFailed(str(error)) from error
        laws = [{z: answers[z][t] for z in asked} for t in range(len(gold))]
        log_probs = _joint(laws, len(text.views), alone)[:, 0].tolist()
        for token_id, law, log_prob in zip(gold, laws, log_probs, strict=True):
            into.append(Given(token_id, log_prob, _top(token_id, log_prob, law, alone, num_top)))
    return "stop"


def scored_text(given: GivenText) -> Text:
    """The text that `scoring` reads."""
    return Text([prompt + given.completion[:-1] for prompt in given.prompts])


def _top(token_id: int, log_prob: float, laws: Laws, alone: int | None, num_top: int) -> tuple[tuple[int, float], ...]:
    if not num_top:
        return ()
    if alone is not None or len(laws) == 1:
        [answer] = laws.values()
        top = () if answer is None else answer.top
    else:
        top = most_probable(_mixed(laws), num_top)
    # The same number whichever way it is computed: readers compare the two.
    return tuple((each, log_prob if each == token_id else value) for each, value in top)


def _mixed(laws: Laws) -> torch.Tensor:
    """The marginal law `[V]`, float64."""
    present = {z: law for z, law in laws.items() if law is not None}
    all_weights = _weights(laws, len(laws), None)
    weights = torch.tensor([all_weights[z] for z in present], dtype=torch.float64).log_softmax(dim=0)
    device = law_of(present[BASE]).device
    joint = [
        weight + law_of(law).to(device).double() for weight, law in zip(weights.tolist(), present.values(), strict=True)
    ]
    return torch.stack(joint).logsumexp(dim=0)


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
