"""Every way of decoding by its name: the one place where `SamplingParams.deferral` becomes an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

from transformers import PreTrainedTokenizerBase

from collm.decoding.baselines import (
    Combination,
    Contrastive,
    Mixture,
    MoreConfident,
    ProxyTuning,
    UniformMixture,
    combined,
)
from collm.decoding.collaborative import Flow, collaborative
from collm.decoding.nudging import DEFAULT_THRESHOLD, WRITER, Nudging, nudging
from collm.decoding.pace import Pace
from collm.decoding.policies import ByEntropy, ByTopProbability, ExpectedGain, Policy
from collm.decoding.speculative import speculative
from collm.errors import CollmError
from collm.llm.deferral import make_policy, refuse_ignored, require_assistants, require_gate
from collm.models.info import CalibrationTable
from collm.models.tools import Tool
from collm.sampling_params import Deferral, SamplingParams
from collm.types import BASE
from collm.values import LanguageModel, Told
from collm.views import Text

Method = Policy | Combination | Nudging
"""A policy names one writer for each token; a combination makes one law of all; nudging hands over words."""

COMBINATIONS: dict[Deferral, Combination] = {
    "compose": Mixture(),
    "mixture": UniformMixture(),
    "confident": MoreConfident(),
    "contrastive": Contrastive(),
    "proxy_tuning": ProxyTuning(),
}
NAMES: dict[type[Method], str] = {Nudging: "nudging", **{type(found): name for name, found in COMBINATIONS.items()}}
"""As `deferral` has them."""


def make_method(
    params: SamplingParams,
    models: Sequence[LanguageModel],
    tokenizer: PreTrainedTokenizerBase,
    has_gate: bool,
    calibration: Sequence[CalibrationTable],
) -> Method:
    """What `params.deferral` stands for.

    Raises:
        CollmError: something it needs is missing, or a setting would be ignored.
    """
    refuse_ignored(params)
    if params.deferral == "nudging":
        return Nudging(word_starts(tokenizer), DEFAULT_THRESHOLD if params.threshold is None else params.threshold)
    if params.deferral is not None and params.deferral in COMBINATIONS:
        return COMBINATIONS[params.deferral]
    return make_policy(params, len(models) - 1, has_gate, calibration, _tools(models))


def _tools(models: Sequence[LanguageModel]) -> list[str]:
    return [model.name for model in models if isinstance(model, Tool)]


def require_defined(method: Method, params: SamplingParams, models: Sequence[LanguageModel], has_gate: bool) -> None:
    """Refuse models for which a method is not defined.

    Raises:
        CollmError: it needs a gate, other models, or no tools.
    """
    if method.needs_gate:
        require_gate(params, has_gate)
    require_told(method, params, models)
    if not isinstance(method, Combination | Nudging):
        return
    require_assistants(len(models) - 1)
    name, roles = NAMES.get(type(method), type(method).__name__), method.roles
    tools = _tools(models) if roles else []
    if tools:
        raise CollmError(
            f"{name} is not defined for this system: it needs a distribution over the whole vocabulary from every "
            f"model, and {tools[0]} is a tool"
        )
    if roles and len(roles) != len(models):
        parts = ", ".join(f"assistant {z}: {role}" if z else f"base: {role}" for z, role in enumerate(roles))
        raise CollmError(f"{name} is defined for {len(roles)} models ({parts}); here are {len(models)}")


def require_told(method: Method, params: SamplingParams, models: Sequence[LanguageModel]) -> None:
    """Refuse models that do not tell what a method reads: they are behind servers.

    Raises:
        CollmError: naming the model and why.
    """
    asked: list[tuple[LanguageModel, Told, str]] = []
    base = models[BASE]
    tests = base.tests_deferral
    if isinstance(method, Combination):
        asked += [(model, "law", NAMES.get(type(method), type(method).__name__)) for model in models]
    elif isinstance(method, Nudging):
        asked += [(model, "top", "nudging") for model in models[WRITER : WRITER + 1]]
    elif isinstance(method, ByEntropy) and not tests:
        asked.append((base, "entropy", "entropy"))
    elif isinstance(method, ByTopProbability | ExpectedGain) and not tests:
        asked.append((base, "top", "top_probability"))
    if params.top_log_probs and tests:
        asked.append((base, "top", "top_log_probs"))
    for model, what, name in asked:
        if what in model.lacks:
            raise CollmError(f"{name} cannot be had from {model.name}: {model.lacks[what]}")
    tools = _tools(models)
    if isinstance(method, ByEntropy | ByTopProbability | ExpectedGain) and tests and len(models) > 2 and tools:
        raise CollmError(
            f"where {tools[0]} has nothing to say, nobody knows whether the next assistant is to be asked: the base's "
            "server tests this method and does not tell what it found; defer by threshold, or leave one of them out"
        )


def make_flow(
    method: Method, text: Text, params: SamplingParams, eos: Sequence[frozenset[int]], pace: Pace, base: LanguageModel
) -> Flow:
    """The flow of one text; `pace` for those that can draft ahead, which nobody can behind a `base` that judges no
    blocks. (An assistant that judges none is asked token by token: no pace knows what its passes cost.)"""
    if isinstance(method, Combination):
        return combined(text, params, method, eos)
    if isinstance(method, Nudging):
        return nudging(text, params, method, eos)
    if params.speculative is not False and "blocks" not in base.lacks:
        return speculative(text, params, method, eos, pace)
    return collaborative(text, params, method, eos)


@lru_cache(maxsize=8)
def word_starts(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bool]:
    """Whether a token begins with white space in the middle of a text."""
    # Behind an anchor, for SentencePiece tokenizers drop the leading space of a text.
    [anchor, *_] = tokenizer.encode("=", add_special_tokens=False)
    before = _text(tokenizer, [anchor])

    @cache
    def starts_word(token_id: int) -> bool:
        return _text(tokenizer, [anchor, token_id])[len(before) :][:1].isspace()

    return starts_word


def _text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
