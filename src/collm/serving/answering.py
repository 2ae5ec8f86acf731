"""The endpoints that let models read or write."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from collm.errors import CollmError
from collm.evaluation.likelihood import Given, GivenText, scored_text, scoring
from collm.evaluation.others import Place, would_write
from collm.sampling_params import SamplingParams
from collm.serving.answers import Answer, ChatAnswer, CompletionAnswer
from collm.serving.asking import Served, params_of
from collm.serving.body import read_body
from collm.serving.desk import Desk, Order
from collm.serving.fields import ChatRequest, CompletionRequest, OthersRequest, read_fields
from collm.serving.limits import Limits
from collm.serving.metrics import Metrics
from collm.serving.prompts import chat_prompt, completion_prompts, finished_text, given_tokens, require_one_tokenizer
from collm.serving.refusals import Refusal
from collm.serving.streams import EventStream, until_gone
from collm.serving.tokens import TokenTexts, read_tokens
from collm.types import BASE

COMPLETION_TOKENS = 16
"""Of a completion that does not say, as in the OpenAI API."""


class Answering:
    """What requests for texts share."""

    def __init__(self, served: Served, limits: Limits, metrics: Metrics) -> None:
        self.served, self.llm, self.limits, self.metrics = served, served.llm, limits, metrics
        self.desk = Desk(served.llm, limits, metrics)
        self.texts = TokenTexts(served.llm)

    async def chat(self, request: Request) -> Response:
        fields = read_fields(ChatRequest, await self._body(request))
        if fields.top_logprobs is not None and not fields.logprobs:
            raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
        number = self.served.alone(fields.model)
        asked = [chat_prompt(self.llm, fields, number)]
        limit = fields.max_completion_tokens or fields.max_tokens
        params = params_of(self.served, fields, limit, fields.top_logprobs or 0, alone=number is not None)
        return await self._answer(request, ChatAnswer(self.served, self.texts, fields, asked), params, number)

    async def complete(self, request: Request) -> Response:
        fields = read_fields(CompletionRequest, await self._body(request))
        limit = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
        if not limit and not fields.echo:
            raise Refusal("max_tokens is 0: that is for echo alone", param="max_tokens")
        number = self.served.alone(fields.model)
        if fields.echo and fields.logprobs is not None and number is None and not self._has_marginal():
            raise Refusal(
                "the pair has no gate, so prompts have no likelihood under it: ask for one of its models by name",
                param="echo",
            )
        asked = completion_prompts(self.llm, fields, number)
        self.desk.require_room(len(asked) * (fields.n or 1))
        params = params_of(self.served, fields, max(1, limit), fields.logprobs or 0, alone=number is not None)
        answer = CompletionAnswer(self.served, self.texts, fields, asked)
        if fields.echo and fields.logprobs is not None:
            require_one_tokenizer(self.llm, "echo with logprobs reads a text that models with one tokenizer share")
            await until_gone(request, self._score(answer, fields.logprobs, number), self.metrics)
        return await self._answer(request, answer, params, number, writes=limit > 0)

    async def others(self, request: Request) -> Response:
        """What each model would have written at every place of a finished text: one block pass of each."""
        fields = read_fields(OthersRequest, await self._body(request))
        given = finished_text(self.llm, fields)
        found: list[Place] = []
        text = scored_text(given)
        await until_gone(request, self.desk.run(would_write(given, text, found), text), self.metrics)
        names = self.llm.model_names
        tokens = read_tokens(found, given.completion, names, self.texts)
        return JSONResponse({"object": "collm.others", "models": list(names), "tokens": tokens})

    def _has_marginal(self) -> bool:
        return self.llm.has_gate or len(self.llm.models) == 1

    async def _score(self, answer: Answer, num_top: int, number: int | None) -> None:
        """The log-probabilities of the prompts' own tokens."""
        alone = BASE if number is None and len(self.llm.models) == 1 else number
        n = answer.request.n or 1
        for i, asked in enumerate(answer.asked):
            before, given_ids = given_tokens(self.llm, asked)
            if given_ids:
                given = GivenText(before, given_ids)
                text, found = scored_text(given), list[Given]()
                await self.desk.run(scoring(given, text, found, alone=alone, num_top=num_top), text)
                for choice in answer.choices[i * n : (i + 1) * n]:
                    choice.given = found

    async def _answer(
        self, request: Request, answer: Answer, params: SamplingParams, number: int | None, *, writes: bool = True
    ) -> Response:
        n = answer.request.n or 1
        orders = [
            Order(choice.index, choice.asked.prompt, replace(params, sample=choice.index % n), number)
            for choice in answer.choices
            if writes
        ]
        self.desk.require_room(len(orders))
        self.metrics.asked(n, params.max_tokens, [each.num_tokens for each in answer.asked])
        try:
            if not answer.request.stream:
                body = await until_gone(request, answer.gathered(self.desk, orders), self.metrics)
                _note(request, answer)
                return JSONResponse(body)
            events = answer.streamed(self.desk, orders)
            assert isinstance(events, AsyncGenerator)
            first = await until_gone(request, anext(events), self.metrics)
        except CollmError as error:
            raise Refusal(str(error)) from error
        return EventStream(first, events, self.limits.stall_timeout, self.metrics, partial(_note, request, answer))

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_body(request, self.limits, self.metrics)


def _note(request: Request, answer: Answer) -> None:
    """What the log is told of a request."""
    usage = answer.usage
    request.scope["state"]["told"].update(
        model=answer.request.model or answer.served.name,
        answer=answer.id,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        choices=len(answer.choices),
    )
