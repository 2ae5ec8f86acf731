"""From a request to the texts it asks for: the model by its name, who writes, how tokens are drawn."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import Any

from collm.errors import nearest
from collm.llm import CollaborativeLM
from collm.sampling_params import SamplingParams
from collm.serving.fields import ChatRequest, CompletionRequest, Request
from collm.serving.refusals import Refusal

ROOM = 4096
"""Tokens of an answer to which nothing sets a bound: neither the request nor the context of a model."""
WHO = {"method": "deferral", "deferral_rate": "deferral_rate", "threshold": "threshold", "task": "task"}
"""Fields of `collm` that say who writes, as `SamplingParams` has them."""


@dataclass(frozen=True, slots=True)
class Served:
    """A system under the names that requests call it by: the pair's, and each model's own.

    `defaults`: who writes where a request does not say.
    """

    llm: CollaborativeLM
    name: str
    defaults: SamplingParams

    @property
    def names(self) -> tuple[str, ...]:
        """The pair first; a system of one model is that model."""
        return (self.name, *self.llm.model_names)

    def alone(self, name: str | None) -> int | None:
        """The number of the only model that is to write, None for the pair.

        Raises:
            Refusal: there is no such model, or its tokens would not be those of the answer's other fields.
        """
        if name is None or name == self.name:
            return None
        if name in self.llm.model_names:
            number = self.llm.model_names.index(name)
            if self.llm.sharing is not None and self.llm.sharing.has_own_tokens(number):
                raise Refusal(
                    f"{name} has another tokenizer than the base, and answers are told in the base's tokens: ask "
                    f"{self.name} (with method always, {name} writes), or serve {name} by itself",
                    param="model",
                    code="invalid_value",
                )
            return number
        hint = nearest(name, self.names, f"there are {', '.join(self.names)}")
        raise Refusal(f"there is no model {name!r}: {hint}", status=404, param="model", code="model_not_found")


def params_of(served: Served, request: Request, max_tokens: int | None, num_top: int, *, alone: bool) -> SamplingParams:
    """How the texts of a request are written.

    Raises:
        Refusal: settings that do not go together.
    """
    temperature = 1.0 if request.temperature is None else request.temperature
    seed = request.seed
    if seed is None:
        seed = secrets.randbits(63) if temperature else 0
    stop = request.stop or ()
    who = served.defaults
    given = request.collm
    try:
        if given is not None:
            who = _who(who, given.model_dump(exclude_none=True), alone=alone)
        return replace(
            who,
            max_tokens=ROOM if max_tokens is None else max_tokens,
            temperature=temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(0, request.top_k or 0),
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(request.stop_token_ids or ()),
            top_log_probs=num_top,
        )
    except ValueError as error:
        raise Refusal(str(error), param=_named_in(str(error)), code="invalid_value") from error


def _who(defaults: SamplingParams, given: dict[str, Any], *, alone: bool) -> SamplingParams:
    """Whoever says anything of who writes says all of it."""
    choice = {WHO[name]: value for name, value in given.items() if name in WHO}
    if choice and alone:
        named = next(name for name in given if name in WHO)
        raise Refusal(f"this model writes alone: leave out collm.{named}, or ask for the pair", param=f"collm.{named}")
    own = {"deferral": None, "deferral_rate": None, "threshold": None, "task": None, **choice} if choice else {}
    own |= {name: given[name] for name in ("on_assistant_error", "speculative") if name in given}
    return replace(defaults, **own)


def _named_in(message: str) -> str | None:
    first = message.partition(" ")[0]
    if first in ("threshold", "deferral_rate", "deferral", "task"):
        return "collm." + ("method" if first == "deferral" else first)
    return first if first in {*ChatRequest.model_fields, *CompletionRequest.model_fields} else None
