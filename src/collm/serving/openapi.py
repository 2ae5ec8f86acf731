"""What the server understands and says, as an OpenAPI description. Requests are described by what reads them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic.json_schema import models_json_schema

from collm import __version__
from collm.serving.asking import Served
from collm.serving.fields import (
    NEUTRAL,
    WITHOUT_EFFECT,
    ChatRequest,
    CompletionRequest,
    Fields,
    Json,
    OthersRequest,
    Request,
)

REFUSALS = {
    400: "The request is wrong; `param` names the field.",
    401: "A key is needed.",
    403: "The Host or Origin of the request may not ask.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "More is being written than fits; `Retry-After` says when to ask again.",
    500: "A model failed, or the server did.",
    503: "The server stops.",
    504: "The answer was not complete in time.",
}
"""Statuses of errors, all in one form."""
KINDS: tuple[type[Fields], ...] = (ChatRequest, CompletionRequest, OthersRequest)


def description(served: Served) -> Json:
    """OpenAPI 3.1."""
    about = f"The OpenAI API over {served.name}, whose models write one text: {', '.join(served.llm.model_names)}."
    return {
        "openapi": "3.1.0",
        "info": {"title": "collm", "version": __version__, "description": about},
        "paths": {
            "/v1/chat/completions": _post("An answer to a conversation.", ChatRequest, _answer("chat.completion")),
            "/v1/completions": _post("A prompt, continued.", CompletionRequest, _answer("text_completion")),
            "/v1/collm/others": _post(
                "What each model would have written in a finished text.", OthersRequest, _object("models", "tokens")
            ),
            "/v1/collm": _get("The pair: models, calibration, defaults, examples.", _object("pair", "models")),
            "/v1/models": _get("The names that requests call models by.", _object("object", "data")),
            "/v1/models/{name}": {
                "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"enum": [*served.names]}}],
                **_get("One of them.", _object("id", "object")),
            },
            "/health": _get("Whether it runs.", _object("status", "version"), refuses=(403,)),
            "/metrics": _get("Prometheus' text.", None, refuses=(403,)),
            "/openapi.json": _get("This description.", _object("openapi", "paths"), refuses=(403,)),
        },
        "components": {"schemas": _schemas(), "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


@lru_cache(maxsize=1)
def _schemas() -> Json:
    _, found = models_json_schema([(kind, "validation") for kind in KINDS], ref_template="#/components/schemas/{model}")
    schemas: Json = found["$defs"]
    for kind in KINDS:
        if issubclass(kind, Request):
            without: Json = {name: {"description": "Accepted without effect."} for name in sorted(WITHOUT_EFFECT)}
            neutral: Json = {
                name: {"enum": [*values, None], "description": "Accepted where it asks for nothing."}
                for name, values in NEUTRAL.items()
            }
            own = schemas[kind.__name__]["properties"]
            schemas[kind.__name__]["properties"] = {**own, **neutral, **without}
    error = {
        "message": {"type": "string"},
        "type": {"type": "string"},
        "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]},
    }
    one = {"type": "object", "required": [*error], "properties": error, "additionalProperties": False}
    return {**schemas, "Error": {"type": "object", "required": ["error"], "properties": {"error": one}}}


def _post(summary: str, kind: type[Fields], answer: Json) -> Json:
    """An operation that takes a JSON object."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content: Json = {"application/json": {"schema": answer}}
    if issubclass(kind, Request):
        content["text/event-stream"] = {}
    return {
        "post": {
            "summary": summary,
            "security": [{"key": []}, {}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": {"description": "The answer.", "content": content}, **_refusals(tuple(REFUSALS))},
        }
    }


def _get(summary: str, answer: Json | None, refuses: tuple[int, ...] = (401, 403, 404)) -> Json:
    content: Json = {"text/plain": {}} if answer is None else {"application/json": {"schema": answer}}
    responses = {"200": {"description": "The answer.", "content": content}, **_refusals(refuses)}
    security: list[Any] = [{"key": []}, {}] if 401 in refuses else []
    return {"get": {"summary": summary, "security": security, "responses": responses}}


def _refusals(statuses: tuple[int, ...]) -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": REFUSALS[status], "content": content} for status in statuses}


def _object(*required: str) -> Json:
    return {"type": "object", "required": [*required]}


def _answer(kind: str) -> Json:
    choice = _object("index", "finish_reason")
    return {
        **_object("id", "object", "created", "model", "choices", "usage"),
        "properties": {"object": {"const": kind}, "choices": {"type": "array", "items": choice}},
    }
