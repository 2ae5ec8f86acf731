"""Texts for the plain twin of the engine: a flow over its own text, as `collm.engine.run` takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from collm.decoding.choosing import answer_of
from collm.decoding.collaborative import Flow, single
from collm.engine.twin import Writing
from collm.sampling_params import SamplingParams
from collm.values import GREEDY, Answer
from collm.views import Text


def writing(
    make: Callable[..., Flow], prompts: Sequence[Sequence[int]], params: SamplingParams, *others: Any
) -> Writing:
    text = Text(prompts)
    return make(text, params, *others), text, params.max_tokens


def alone(
    model: int, prompts: Sequence[Sequence[int]], params: SamplingParams, eos: Sequence[frozenset[int]]
) -> Writing:
    text = Text(prompts)
    return single(model, text, params, eos), text, params.max_tokens


def says(law: Tensor, gate: tuple[float, ...] | None = None) -> Answer:
    """The greedy answer of a law `[V]` of log-probabilities."""
    return answer_of(law, GREEDY, 0, gate)
