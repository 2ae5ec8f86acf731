"""The fields of a request: read, accepted without effect, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from collm.data.messages import ROLES
from collm.errors import nearest
from collm.sampling_params import MOST_TOP, Deferral, OnAssistantError
from collm.serving.refusals import Refusal

WITHOUT_EFFECT = frozenset(
    """
    user metadata store safety_identifier prompt_cache_key prompt_cache_retention service_tier request_id
    parallel_tool_calls
    """.split()
)
"""Accepted whatever they say: they cannot change the text."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}
"""Not supported, and accepted at the values at which they ask for nothing (null is always one)."""

Json = dict[str, Any]
Text = Annotated[str, Field(max_length=1 << 20)]
Whole = Annotated[int, Field(strict=True)]
# What these hold is checked where it is read, which can say more than a schema.
Messages = Annotated[
    list[Any],
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role", "content"],
                "properties": {"role": {"enum": list(ROLES)}, "content": {"type": "string"}},
            },
        }
    ),
]
_ONE: list[Json] = [
    {"type": "string"},
    {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
]
OnePrompt = Annotated[str | list[Any], WithJsonSchema({"anyOf": _ONE})]
Prompt = Annotated[
    str | list[Any],
    WithJsonSchema({"anyOf": [*_ONE, {"type": "array", "minItems": 1, "items": {"anyOf": _ONE}}]}),
]


class Fields(BaseModel):
    """What is not named here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class Collaboration(Fields):
    """The field `collm`: who writes, and what is told of it.

    With it, even empty, an answer says how many tokens each model wrote; with `tokens`, who wrote each of them.
    """

    method: Deferral | None = None
    deferral_rate: float | None = Field(None, ge=0, le=1)
    threshold: float | None = Field(None, ge=0)
    task: str | None = None
    speculative: bool | None = None
    on_assistant_error: OnAssistantError | None = None
    tokens: bool = False


class StreamOptions(Fields):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class Request(Fields):
    """What both kinds of request have in common."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Whole] | None = None
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    collm: Collaboration | None = None


class ChatRequest(Request):
    messages: Messages
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Request):
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_TOP)
    echo: bool | None = None


class OthersRequest(Fields):
    """A finished text, of which is asked what each model would have written in it: a prompt or messages, as in the
    request that it was written for, and the tokens that were written."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["messages"]}, {"required": ["prompt"]}]})

    messages: Messages | None = None
    prompt: OnePrompt | None = None
    token_ids: list[Whole] = Field(min_length=1)
    chat_template_kwargs: dict[str, Any] | None = None


R = TypeVar("R", bound=Fields)
NESTED: dict[str | int, type[Fields]] = {"collm": Collaboration, "stream_options": StreamOptions}
"""Fields that have fields."""


def read_fields(kind: type[R], body: Mapping[str, Any]) -> R:
    """The request in a JSON object.

    Raises:
        Refusal: naming the field that is unknown, not supported or wrong.
    """
    own, writes = {}, issubclass(kind, Request)
    for name, value in body.items():
        if name in kind.model_fields:
            own[name] = value
        elif name in NEUTRAL and writes:
            _require_neutral(name, value)
        elif not (name in WITHOUT_EFFECT and writes):
            also = [*NEUTRAL, *WITHOUT_EFFECT] if writes else []
            hint = nearest(name, [*kind.model_fields, *also], "leave it out")
            raise Refusal(f"unknown field {name!r}: {hint}", param=name, code="unknown_parameter")
    try:
        found = kind.model_validate(own)
    except ValidationError as error:
        raise _refusal(error) from None
    if isinstance(found, Request):
        _require_together(found)
    return found


def _require_together(request: Request) -> None:
    if request.stream_options is not None and not request.stream:
        raise Refusal("stream_options are for streams: set stream, or leave them out", param="stream_options")
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > 16 or not all(stops):
        raise Refusal("stop takes up to 16 strings, none of them empty", param="stop")


def _require_neutral(name: str, value: Any) -> None:
    neutral = NEUTRAL[name]
    if value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
        return
    raise Refusal(
        f"{name} is not supported where several models write one text: leave it out, or give {neutral[0]!r}",
        param=name,
        code="unsupported_parameter",
    )


def _refusal(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False, include_context=False)[0]
    # Behind the name of a field may stand those of a union's members, which are none of the request's.
    path = [str(part) for part in first["loc"]][: 2 if first["loc"][0] in NESTED else 1]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        known = NESTED[path[0]].model_fields
        hint = nearest(path[-1], known, f"there are {', '.join(known)}")
        return Refusal(f"unknown field {param!r}: {hint}", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return Refusal(f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return Refusal(f"{param}: {message}", param=param, code="invalid_value")
