"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from collm import __version__
from collm.data.messages import require_texts
from collm.errors import CollmError
from collm.evaluation.likelihood import GivenText
from collm.llm import CollaborativeLM
from collm.sampling_params import SamplingParams
from collm.serving import playground
from collm.serving.answers import Answer, ChatAnswer, CompletionAnswer, Json
from collm.serving.asking import Served, params_of
from collm.serving.desk import Desk, Order
from collm.serving.fields import ChatRequest, CompletionRequest, read_fields
from collm.serving.guard import Guard, internal, refused
from collm.serving.limits import Access, Limits
from collm.serving.metrics import Metrics
from collm.serving.prompts import chat_prompt, completion_prompts, given_tokens
from collm.serving.refusals import ClientGone, Refusal
from collm.serving.tokens import TokenTexts
from collm.types import BASE

_log = logging.getLogger("collm.serving")
T = TypeVar("T")
COMPLETION_TOKENS = 16
"""Of a completion that does not say, as in the OpenAI API."""


def make_app(
    llm: CollaborativeLM,
    name: str,
    *,
    defaults: SamplingParams | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
) -> Starlette:
    """The server of one system.

    Args:
        name: what requests call the pair.
        defaults: who writes where a request does not say.
    """
    server = Server(Served(llm, name, defaults or SamplingParams()), limits or Limits())
    access = access or Access()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(llm.close)

    middleware = [Middleware(Guard, access=access, metrics=server.metrics)]
    if access.origins:
        cors = Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    app = Starlette(
        routes=server.routes(),
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.state.server = server
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"there is nothing at {request.url.path[:200]}", 405: "this address takes another method"}
    return refused(Refusal(what.get(error.status_code, error.detail), status=error.status_code))


class Server:
    """The endpoints, and what they share."""

    def __init__(self, served: Served, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.llm = served.llm
        self.metrics = Metrics(served.llm, served.name)
        self.desk = Desk(served.llm, limits, self.metrics)
        self.texts = TokenTexts(served.llm)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
            *playground.routes(),
        ]

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__})

    async def tell_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        self.served.alone(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> Json:
        number = self.served.alone(name)
        contexts = self.llm.context_lengths if number is None else (self.llm.context_lengths[number],)
        context = min((length for length in contexts if length is not None), default=None)
        own = {"models": list(self.llm.model_names)} if number is None else {}
        return {"id": name, "object": "model", "created": 0, "owned_by": "collm", "max_model_len": context, **own}

    async def chat(self, request: Request) -> Response:
        fields = read_fields(ChatRequest, await self._body(request))
        if fields.top_logprobs is not None and not fields.logprobs:
            raise Refusal("top_logprobs needs logprobs: true", param="top_logprobs")
        number = self.served.alone(fields.model)
        asked = [chat_prompt(self.llm, fields)]
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
        asked = completion_prompts(self.llm, fields)
        self.desk.require_room(len(asked) * (fields.n or 1))
        params = params_of(self.served, fields, max(1, limit), fields.logprobs or 0, alone=number is not None)
        answer = CompletionAnswer(self.served, self.texts, fields, asked)
        if fields.echo and fields.logprobs is not None:
            await until_gone(request, self._score(answer, fields.logprobs, number), self.metrics)
        return await self._answer(request, answer, params, number, writes=limit > 0)

    def _has_marginal(self) -> bool:
        return self.llm.has_gate or len(self.llm.models) == 1

    async def _score(self, answer: Answer, num_top: int, number: int | None) -> None:
        """The log-probabilities of the prompts' own tokens."""
        alone = BASE if number is None and len(self.llm.models) == 1 else number
        for i, asked in enumerate(answer.asked):
            before, given = given_tokens(self.llm, asked)
            if given:
                found = await self.desk.score(GivenText(before, given), alone, num_top)
                for choice in answer.choices[i * (answer.request.n or 1) : (i + 1) * (answer.request.n or 1)]:
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
        return EventStream(first, events, self, answer)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request.

        Raises:
            Refusal: it is none, too large, or does not come.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("send JSON, with Content-Type: application/json", code="invalid_content_type")
        most = self.limits.max_body_bytes
        too_large = Refusal(f"the request has more than {most} bytes", status=413, code="request_too_large")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > most:
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self.limits.body_timeout):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        raise too_large
        except TimeoutError:
            raise Refusal("the request did not arrive in time", status=408, code="timeout") from None
        except ClientDisconnect as error:
            self.metrics.disconnected.inc()
            raise Refusal("the request ended early", code="incomplete") from error
        try:
            found = json.loads(bytes(data).decode("utf-8"), parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise Refusal(f"the request is not JSON: {error}"[:300], code="invalid_json") from None
        if not isinstance(found, dict):
            raise Refusal("the request is not a JSON object", code="invalid_json")
        try:
            require_texts(found, "the request")
        except CollmError as error:
            raise Refusal(str(error), code="invalid_value") from error
        return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


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


async def until_gone(request: Request, work: Awaitable[T], metrics: Metrics) -> T:
    """What `work` comes to, unless the client goes away first: then it is cancelled.

    Raises:
        ClientGone: it has.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        metrics.disconnected.inc()
        raise ClientGone
    finally:
        watch.cancel()
        task.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events. A client that goes away, or does not read, ends it."""

    def __init__(self, first: Json, events: AsyncGenerator[Json], server: Server, answer: Answer) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._first, self._events, self._server, self._answer = first, events, server, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.create_task(self._send_all(send))
        watch = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() or isinstance(task.exception(), TimeoutError | OSError):
                self._server.metrics.disconnected.inc()
            elif (error := task.exception()) is not None:
                raise error
        finally:
            watch.cancel()
            task.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)
            await self._events.aclose()
            _note(Request(scope), self._answer)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await self._send(send, self._first)
            async for event in self._events:
                await self._send(send, event)
        except Refusal as refusal:
            await self._send(send, refusal.body())
        except (TimeoutError, OSError):
            raise
        except Exception as error:
            _log.error("a stream failed", exc_info=error)
            await self._send(send, internal().body())
        await self._send(send, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: Json | None) -> None:
        data = "[DONE]" if event is None else json.dumps(event, ensure_ascii=False, separators=(",", ":"))
        async with asyncio.timeout(self._server.limits.stall_timeout):
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
