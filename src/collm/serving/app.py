"""The server as an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from collm import __version__
from collm.llm import CollaborativeLM
from collm.llm.deferral import settled
from collm.models.tools import Tool
from collm.sampling_params import SamplingParams
from collm.serving import playground
from collm.serving.answering import Answering
from collm.serving.asking import Served
from collm.serving.fields import Json
from collm.serving.guard import Guard, refused
from collm.serving.limits import Access, Limits
from collm.serving.metrics import Metrics
from collm.serving.openapi import description
from collm.serving.refusals import Refusal


def make_app(
    llm: CollaborativeLM,
    name: str,
    *,
    defaults: SamplingParams | None = None,
    limits: Limits | None = None,
    access: Access | None = None,
    examples: Sequence[str] = (),
) -> Starlette:
    """The server of one system.

    Args:
        name: what requests call the pair.
        defaults: who writes where a request does not say; the checkpoint's choice, if they do not say either.
        examples: questions that the page offers.
    """
    who = settled(defaults or SamplingParams(), llm.info.chosen)
    server = Server(Served(llm, name, who), limits or Limits(), examples)
    access = access or Access()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(llm.close)

    middleware = [Middleware(Guard, access=access, metrics=server.metrics)]
    if access.origins:
        cors = Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    return Starlette(
        routes=server.routes(),
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"there is nothing at {request.url.path[:200]}", 405: "this address takes another method"}
    return refused(Refusal(what.get(error.status_code, error.detail), status=error.status_code))


class Server:
    """The endpoints."""

    def __init__(self, served: Served, limits: Limits, examples: Sequence[str]) -> None:
        self.served, self.llm, self.examples = served, served.llm, examples
        self.metrics = Metrics(served.llm, served.name)
        self.answering = Answering(served, limits, self.metrics)

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.answering.chat, methods=["POST"]),
            Route("/v1/completions", self.answering.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route("/v1/collm", self.system, methods=["GET"]),
            Route("/v1/collm/others", self.answering.others, methods=["POST"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
            Route("/openapi.json", self.describe, methods=["GET"]),
            *playground.routes(),
        ]

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__})

    async def tell_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def describe(self, request: Request) -> Response:
        return JSONResponse(description(self.served))

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

    async def system(self, request: Request) -> Response:
        """What the page has to know of the pair."""
        defaults = self.served.defaults
        tables = [
            {
                "task": table.task,
                "method": "threshold" if table.signal == "gate" else table.signal,
                "rates": sorted({row.achieved_rate for row in table.rows}),
                "best_rate": None if table.best is None else table.rows[table.best].achieved_rate,
            }
            for table in self.llm.info.calibration
        ]
        return JSONResponse(
            {
                "object": "collm.system",
                "pair": self.served.name,
                "models": list(self.llm.model_names),
                "tools": [model.name for model in self.llm.models if isinstance(model, Tool)],
                "has_gate": self.llm.has_gate and len(self.llm.models) > 1,
                "has_chat_template": bool(self.llm.tokenizer.chat_template),
                "defaults": {
                    "method": defaults.deferral,
                    "deferral_rate": defaults.deferral_rate,
                    "threshold": defaults.threshold,
                    "task": defaults.task,
                },
                "calibration": tables,
                "examples": list(self.examples),
            }
        )
