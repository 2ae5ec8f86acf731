"""The decoders: generators without I/O that yield requests and written tokens.

A flow yields either a tuple of `Query` values, and is sent the answers (one list for each query), or a `Step`, and is
sent `None`. It returns why the text ended. It knows no model, cache, text or clock, so one flow serves the in-process
engine, a batch, a server and the streaming API.

Every model sees its own prompt (its own template and system prompt) and then the completion all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import cast

import torch

from collm.decoding.policies import Policy
from collm.decoding.sampling import choose_token
from collm.types import BASE, Answer, FinishReason, Prediction, Query, SamplingParams, Step

Queries = tuple[Query, ...]
Replies = list[list[Answer]]
Flow = Generator[Queries | Step, Replies | None, FinishReason]
TokenIds = tuple[int, ...]
Ask = Generator[Queries, Replies | None, list[Answer]]


def _ask(prompts: Sequence[TokenIds], completion: TokenIds, models: Sequence[int]) -> Ask:
    """One answer from each of `models` for the token after `completion`."""
    replies = yield tuple(Query(model, prompts[model] + completion) for model in models)
    assert replies is not None and len(replies) == len(models)
    return [answer for [answer] in replies]


def _ends(token_id: int, author: int, eos: Sequence[frozenset[int]]) -> bool:
    """A token ends the text if it is an end-of-sequence token of the base or of the model that wrote it."""
    return token_id in eos[BASE] or token_id in eos[author]


def _gate(log_gate: tuple[float, ...] | None) -> tuple[float, ...]:
    return () if log_gate is None else tuple(math.exp(value) for value in log_gate)


def collaborative(
    prompts: Sequence[TokenIds], params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]]
) -> Flow:
    """Token by token: the base reads, the policy names who writes, that model's own law gives the token.

    The base is asked at every token, also where the policy does not need it, so that every step can say what the
    base would have written.

    Args:
        prompts: one for each model, base first.
        params: `max_tokens`, temperature, truncation and seed are read; stop strings are `stopping`'s affair.
        eos: end-of-sequence ids of each model, base first.
    """
    completion: TokenIds = ()
    while len(completion) < params.max_tokens:
        position = len(completion)
        [base] = yield from _ask(prompts, completion, [BASE])
        assert base is not None, "the base never abstains"
        answer, author, abstained = base, BASE, False
        for candidate in policy.authors(base.log_gate, params.seed, position):
            if candidate == BASE:
                break
            [reply] = yield from _ask(prompts, completion, [candidate])
            if reply is not None:
                answer, author, abstained = reply, candidate, False
                break
            abstained = True
        token_id = choose_token(answer, params, position)
        log_prob = float(answer.log_probs[token_id])
        yield Step(token_id, author, log_prob, _gate(base.log_gate), base.top_token_id, abstained)
        completion = (*completion, token_id)
        if _ends(token_id, author, eos):
            return "stop"
    return "length"


def compose(prompts: Sequence[TokenIds], params: SamplingParams, eos: Sequence[frozenset[int]]) -> Flow:
    """Every model at every token, one law: the mixture `sum_z P(Z = z) P_z`, over the models that do not abstain.

    The author of a token is the model with the largest posterior `P(Z = z | token)`; its `log_prob` is the mixture's.
    """
    completion: TokenIds = ()
    while len(completion) < params.max_tokens:
        answers = yield from _ask(prompts, completion, range(len(prompts)))
        base = answers[BASE]
        assert base is not None and base.log_gate is not None, "compose needs a base with a gate"
        mixture, joint = _mixture(answers, base.log_gate)
        token_id = choose_token(mixture, params, len(completion))
        author = max(joint, key=lambda z: joint[z][token_id])
        yield Step(token_id, author, float(mixture.log_probs[token_id]), _gate(base.log_gate), base.top_token_id, False)
        completion = (*completion, token_id)
        if _ends(token_id, author, eos):
            return "stop"
    return "length"


def _mixture(answers: Sequence[Answer], log_gate: tuple[float, ...]) -> tuple[Prediction, dict[int, torch.Tensor]]:
    """The mixture's law, and each answering model's share `log P(Z = z) + log P_z` `[V]` of it."""
    device = cast(Prediction, answers[BASE]).log_probs.device
    present = {z: answer for z, answer in enumerate(answers) if answer is not None}
    weights = torch.tensor([log_gate[z] for z in present], dtype=torch.float64).log_softmax(dim=0).tolist()
    joint = {
        z: weight + answer.log_probs.to(device) for (z, answer), weight in zip(present.items(), weights, strict=True)
    }
    log_probs = torch.stack(list(joint.values())).logsumexp(dim=0)
    return Prediction(log_probs, int(log_probs.argmax()), log_gate), joint


def single(model: int, prompts: Sequence[TokenIds], params: SamplingParams, eos: Sequence[frozenset[int]]) -> Flow:
    """One model on its own, the baseline. An assistant that abstains ends the text (`"abstained"`)."""
    completion: TokenIds = ()
    while len(completion) < params.max_tokens:
        [answer] = yield from _ask(prompts, completion, [model])
        if answer is None:
            return "abstained"
        token_id = choose_token(answer, params, len(completion))
        base_token_id = answer.top_token_id if model == BASE else None
        log_prob = float(answer.log_probs[token_id])
        yield Step(token_id, model, log_prob, _gate(answer.log_gate), base_token_id)
        completion = (*completion, token_id)
        if _ends(token_id, model, eos):
            return "stop"
    return "length"
