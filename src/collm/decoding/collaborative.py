"""The decoders: generators without I/O that yield requests and written tokens.

A flow yields a tuple of `Query` values, an `Extend` or `MORE`, and is sent the replies; or it yields a `Step`, and is
sent `None`. It returns why the text ended. It knows no model, cache, clock or tokenizer, so one flow serves the
engine, a server and the streaming API.

A flow owns its `Text`: it alone appends tokens. Every model sees its own prompt (its own template and system prompt)
and then the completion all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

from collm.decoding.policies import Policy, decide
from collm.errors import CollmError
from collm.sampling_params import SamplingParams
from collm.types import BASE, Drafted, FinishReason, Step
from collm.values import NO_TOKEN, Answer, Draw, Extend, Fault, Foreseen, Query, Replies, Reply, Then
from collm.views import Text


class More(NamedTuple):
    """Asks for the next answer of the `Extend` that runs; any other request ends it.

    `passing`: how many deferrals the model may pass from here on, where that has changed; it is asked if need be.
    """

    passing: Callable[[], int] | None = None


MORE: Final = More()
Request = tuple[Query, ...] | Extend | More
"""`Extend` and `MORE` are sent the answer that a single query of one prefix is sent, and those behind it that the model
has found by itself meanwhile, each for the token that the one before chose."""
Flow = Generator[Request | Step, Replies | None, FinishReason]
Ask = Generator[Request, Replies | None, list[Reply]]


class ModelFailed(CollmError):
    """Raised in a flow whose model answered with a `Fault`: this text ends, the others in its batch go on."""


def required(reply: Reply) -> Answer:
    """The answer of a model without which the text cannot go on."""
    if isinstance(reply, Fault):
        raise ModelFailed(reply.reason)
    assert reply is not None, "the base never abstains"
    return reply


def ask(
    text: Text, models: Sequence[int], draw: Draw, *, num_top: int = 0, law: bool = False, then: Then | None = None
) -> Ask:
    """One reply from each of `models` for the token at the end of the text; `then` as in `Query`."""
    views = text.views
    replies = yield tuple(
        [
            Query(model, views[model], len(views[model].token_ids), 1, draw, None, num_top, law, then=then)
            for model in models
        ]
    )
    assert replies is not None and len(replies) == len(models)
    return [reply for [reply] in replies]


def ends_text(token_id: int, author: int, eos: Sequence[frozenset[int]]) -> bool:
    """A token ends the text if it is an end-of-sequence token of the base or of the model that wrote it."""
    return token_id in eos[BASE] or token_id in eos[author]


def gate_of(log_gate: tuple[float, ...] | None) -> tuple[float, ...]:
    """`Step.gate`."""
    return () if log_gate is None else tuple(map(math.exp, log_gate))


def collaborative(text: Text, params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]]) -> Flow:
    """Token by token: the base reads, the policy names who writes, that model's own law gives the token.

    The base is asked at every token, also where the policy does not need it, so that every step can say what the
    base would have written.

    Args:
        params: `max_tokens`, temperature, truncation and seed are read; stop strings are `stopping`'s affair.
        eos: end-of-sequence ids of each model, base first.
    """
    draw = params.draw
    writes_on = False
    # Passes of the base that tell more are not begun before they are asked for.
    goes_on = None if params.top_log_probs else partial(_goes_on, text, params.max_tokens, draw, eos)
    while text.length < params.max_tokens:
        replies = yield (
            MORE
            if writes_on
            else Extend(BASE, text.views[BASE], params.max_tokens - text.length, draw, policy, params.top_log_probs)
        )
        assert replies is not None
        [found] = replies
        for reply in found:
            base = required(reply)
            decision = decide(policy, base, draw, text.length)
            writers = Writers(base, decision.signal)
            writes_on = decision.authors[0] == BASE
            for candidate in decision.authors:
                if candidate == BASE:
                    break
                then = None if goes_on is None else partial(goes_on, candidate)
                [reply] = yield from ask(text, [candidate], draw, num_top=params.top_log_probs, then=then)
                if writers.settled_by(candidate, reply, params):
                    break
            if writers.answer is None and base.token_id == NO_TOKEN:
                # It stopped to defer, and nobody else has written.
                [reply] = yield from ask(text, [BASE], draw, num_top=params.top_log_probs)
                writers.base = required(reply)
            step = writers.step()
            text.append(step.token_id)
            yield step
            if ends_text(step.token_id, step.author, eos):
                return "stop"
            if not writes_on:
                break
    return "length"


def _goes_on(
    text: Text, max_tokens: int, draw: Draw, eos: Sequence[frozenset[int]], author: int, tokens: Sequence[int]
) -> Foreseen | None:
    """What the base is asked once this author's token is written."""
    [token_id] = tokens
    if ends_text(token_id, author, eos) or text.length + 1 >= max_tokens:
        return None
    view = text.views[BASE]
    return Foreseen(view, len(view.token_ids), token_id, draw)


@dataclass(slots=True)
class Writers:
    """Who writes one token: the base, until an assistant that was asked answers."""

    base: Answer
    signal: float | None = None
    author: int = BASE
    answer: Answer | None = None
    abstained: bool = False
    fault: str | None = None

    def settled_by(self, candidate: int, reply: Reply, params: SamplingParams) -> bool:
        """Take in a candidate's reply; False if it has nothing to say and the next one is to be asked."""
        if isinstance(reply, Answer):
            self.author, self.answer, self.abstained = candidate, reply, False
            return True
        if isinstance(reply, Fault):
            if params.on_assistant_error == "fail":
                raise ModelFailed(reply.reason)
            self.fault = reply.reason
        self.abstained = True
        return False

    def step(self, draft: Drafted = "", discarded: int = 0) -> Step:
        base, answer = self.base, self.answer or self.base
        return Step(
            answer.token_id,
            self.author,
            answer.log_prob,
            gate_of(base.log_gate),
            base.top_token_id,
            self.abstained,
            self.fault,
            draft,
            discarded,
            self.signal,
            top=answer.top,
        )


def single(
    model: int, text: Text, params: SamplingParams, eos: Sequence[frozenset[int]], draw: Draw | None = None
) -> Flow:
    """One model on its own, the baseline. An assistant that abstains ends the text (`"abstained"`).

    Args:
        draw: how it chooses, if not as `params` say.
    """
    own = draw or params.draw
    request: Request = Extend(model, text.views[model], params.max_tokens, own, None, params.top_log_probs)
    while text.length < params.max_tokens:
        replies = yield request
        assert replies is not None
        request = MORE
        for reply in replies[0]:
            if reply is None:
                return "abstained"
            answer = required(reply)
            text.append(answer.token_id)
            base_token_id = answer.top_token_id if model == BASE else None
            yield Step(answer.token_id, model, answer.log_prob, gate_of(answer.log_gate), base_token_id, top=answer.top)
            if ends_text(answer.token_id, model, eos):
                return "stop"
    return "length"
