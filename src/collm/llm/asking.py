"""How a text is to be written, as people ask for it: `SamplingParams`, or its fields by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TypedDict

from collm.errors import CollmError, nearest
from collm.sampling_params import Deferral, OnAssistantError, SamplingParams


class Settings(TypedDict, total=False):
    """The fields of `SamplingParams`, as keyword arguments."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    sample: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    top_log_probs: int
    deferral: Deferral | None
    threshold: float | None
    deferral_rate: float | None
    task: str | None
    speculative: bool | None
    on_assistant_error: OnAssistantError


ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "do_sample": "temperature (0 takes the most probable token)",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "logprobs": "top_log_probs",
    "method": "deferral",
    "rate": "deferral_rate",
}
"""What other libraries and the command line call it."""


def asked(params: SamplingParams, settings: Mapping[str, object]) -> SamplingParams:
    """`params` with some of its fields set.

    Raises:
        CollmError: `params` is something else, or there is no such field; the message names the right one.
        ValueError: a value that a field cannot have.
    """
    if not isinstance(params, SamplingParams):
        given = (
            "max_tokens=64" if not isinstance(params, Mapping) else ", ".join(f"{k}={v!r}" for k, v in params.items())
        )
        raise CollmError(
            f"settings are given by name, as in generate(prompt, {given}), or as SamplingParams({given}); not as a "
            f"{type(params).__name__}"
        )
    if not settings:
        return params
    known = [field.name for field in fields(SamplingParams)]
    for name in settings:
        if name not in known:
            right = ELSEWHERE.get(name)
            hint = f"here it is called {right}" if right else nearest(name, known, f"there are {', '.join(known)}")
            raise CollmError(f"there is no setting {name!r}; {hint}")
    return replace(params, **settings)  # type: ignore[arg-type]


def asked_each(
    params: SamplingParams | Sequence[SamplingParams], settings: Mapping[str, object], count: int
) -> list[SamplingParams]:
    """For each of `count` prompts: one for all, or one for each.

    Raises:
        CollmError: as `asked`; or there are not as many as prompts.
    """
    if isinstance(params, SamplingParams | Mapping) or not isinstance(params, Sequence):
        return [asked(params, settings)] * count
    if len(params) != count:
        raise CollmError(f"{count} prompts but {len(params)} sampling params; give one for each, or one for all")
    return [asked(each, settings) for each in params]
