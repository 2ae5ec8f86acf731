"""The decoders: generators without I/O that yield requests and written tokens.

A flow yields either a tuple of `Query` values, and is sent the answers (one list for each query), or a `Step`, and is
sent `None`. It returns why the text ended. It knows no model, cache, text or clock, so one flow serves the in-process
engine, a batch, a server and the streaming API.

Every model sees its own prompt (its own template and system prompt) and then the completion all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from collm.decoding.policies import Policy
from collm.decoding.sampling import choose_token
from collm.errors import CollmError
from collm.sampling_params import SamplingParams
from collm.types import BASE, Answer, Fault, FinishReason, Prediction, Query, Step

Queries = tuple[Query, ...]
Replies = list[list[Answer]]
Flow = Generator[Queries | Step, Replies | None, FinishReason]
TokenIds = tuple[int, ...]
Ask = Generator[Queries, Replies | None, list[Answer]]


class ModelFailed(CollmError):
    """Raised in a flow whose model answered with a `Fault`: this text ends, the others in its batch go on."""


def required(answer: Answer) -> Prediction:
    """The prediction of a model without which the text cannot go on."""
    if isinstance(answer, Fault):
        raise ModelFailed(answer.reason)
    assert answer is not None, "the base never abstains"
    return answer


def ask(prompts: Sequence[TokenIds], completion: TokenIds, models: Sequence[int]) -> Ask:
    """One answer from each of `models` for the token after `completion`."""
    replies = yield tuple(Query(model, prompts[model] + completion) for model in models)
    assert replies is not None and len(replies) == len(models)
    return [answer for [answer] in replies]


def ends_text(token_id: int, author: int, eos: Sequence[frozenset[int]]) -> bool:
    """A token ends the text if it is an end-of-sequence token of the base or of the model that wrote it."""
    return token_id in eos[BASE] or token_id in eos[author]


def gate_of(log_gate: tuple[float, ...] | None) -> tuple[float, ...]:
    """`Step.gate`."""
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
        [reply] = yield from ask(prompts, completion, [BASE])
        base = required(reply)
        decision = policy.decide(base, params.seed, position)
        writers = Writers(base, decision.signal)
        for candidate in decision.authors:
            if candidate == BASE:
                break
            [reply] = yield from ask(prompts, completion, [candidate])
            if writers.settled_by(candidate, reply, params):
                break
        step = writers.step(params, position)
        yield step
        completion = (*completion, step.token_id)
        if ends_text(step.token_id, step.author, eos):
            return "stop"
    return "length"


@dataclass(slots=True)
class Writers:
    """Who writes one token: the base, until an assistant that was asked answers."""

    base: Prediction
    signal: float | None = None
    author: int = BASE
    answer: Prediction | None = None
    abstained: bool = False
    fault: str | None = None

    def settled_by(self, candidate: int, reply: Answer, params: SamplingParams) -> bool:
        """Take in a candidate's reply; False if it has nothing to say and the next one is to be asked."""
        if isinstance(reply, Prediction):
            self.author, self.answer, self.abstained = candidate, reply, False
            return True
        if isinstance(reply, Fault):
            if params.on_assistant_error == "fail":
                raise ModelFailed(reply.reason)
            self.fault = reply.reason
        self.abstained = True
        return False

    def step(self, params: SamplingParams, position: int) -> Step:
        answer = self.answer or self.base
        token_id = choose_token(answer, params, position)
        return Step(
            token_id,
            self.author,
            float(answer.log_probs[token_id]),
            gate_of(self.base.log_gate),
            self.base.top_token_id,
            self.abstained,
            self.fault,
            signal=self.signal,
        )


def single(model: int, prompts: Sequence[TokenIds], params: SamplingParams, eos: Sequence[frozenset[int]]) -> Flow:
    """One model on its own, the baseline. An assistant that abstains ends the text (`"abstained"`)."""
    completion: TokenIds = ()
    while len(completion) < params.max_tokens:
        [reply] = yield from ask(prompts, completion, [model])
        if reply is None:
            return "abstained"
        answer = required(reply)
        token_id = choose_token(answer, params, len(completion))
        base_token_id = answer.top_token_id if model == BASE else None
        log_prob = float(answer.log_probs[token_id])
        yield Step(token_id, model, log_prob, gate_of(answer.log_gate), base_token_id)
        completion = (*completion, token_id)
        if ends_text(token_id, model, eos):
            return "stop"
    return "length"
