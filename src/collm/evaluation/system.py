"""The settings of a run: what decides its answers, for its header, its result, and the next start."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from collm.errors import CollmError
from collm.identity.finding import system_identity, without_addresses
from collm.llm import CollaborativeLM
from collm.llm.deferral import settled
from collm.llm.methods import Method, make_method
from collm.sampling_params import SamplingParams


def settings_of(
    llm: Any,
    params: SamplingParams,
    policy: Method | None,
    alone: int | str | None,
    identity: Mapping[str, Any] | None = None,
    *,
    leave_out: Collection[str] = (),
) -> dict[str, Any]:
    """Models, with all that decides their answers, and who writes; for JSON.

    Args:
        llm: a `CollaborativeLM`, or another writer, of which only names are known (and what `identity` tells).
        identity: see `identity_of`.
        leave_out: of `SamplingParams`, what each request says for itself.
    """
    own = isinstance(llm, CollaborativeLM)
    asked = replace(who_writes(llm, params, policy, alone), speculative=params.speculative is not False)
    return {
        "models": list(llm.model_names),
        "identity": identity_of(llm, identity),
        "policy": None if policy is None else without_addresses(repr(policy)),
        "alone": alone,
        # None writes what True does.
        **{f"params.{key}": value for key, value in asdict(asked).items() if key not in leave_out},
        "decides": _resolved(llm, asked) if own and policy is None and alone is None else None,
    }


def who_writes(llm: Any, params: SamplingParams, policy: Method | None, alone: int | str | None) -> SamplingParams:
    """`params` that say who writes, if need be by the checkpoint's choice."""
    chosen = llm.info.chosen if isinstance(llm, CollaborativeLM) and policy is None and alone is None else None
    return settled(params, chosen)


def identity_of(llm: Any, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What decides a system's answers: all of its models to the last bit, where it is a `CollaborativeLM`.

    Args:
        identity: what else tells this system from others; with `models` it is taken as it is.
    """
    told = dict(identity or {})
    if isinstance(llm, CollaborativeLM) and "models" not in told:
        told |= system_identity(llm.models, llm.formatters)
    return told


def _resolved(llm: CollaborativeLM, params: SamplingParams) -> str | None:
    """Who writes, with the threshold that a rate came to: a new calibration may give another one."""
    try:
        found = make_method(params, llm.models, llm.tokenizer, llm.has_gate, llm.info.calibration)
    except CollmError:  # told when a text is asked for; whoever asks for likelihoods alone need not know
        return None
    return without_addresses(repr(found))
