"""What decides a pair's answers, apart from the request: answers given under other settings are not taken over."""

from __future__ import annotations

from typing import Any

from collm.decoding.policies import Policy
from collm.errors import CollmError
from collm.evaluation.system import settings_of
from collm.llm import CollaborativeLM
from collm.sampling_params import SamplingParams
from collm.types import BASE

OF_A_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "stop")
"""Of `SamplingParams`, what each request of the harness says for itself."""
MARGINAL = (None, "threshold", "sampled", "compose")
"""Ways to settle who writes that follow the gate, so that the marginal is what they stand for; None: not said."""


def harness_settings(
    llm: CollaborativeLM, params: SamplingParams, policy: Policy | None, alone: str | None
) -> dict[str, Any]:
    """Models with fingerprints of their weights, prompt formats, calibration, and who writes; for JSON."""
    found = settings_of(llm, params, policy, alone, leave_out=(*OF_A_REQUEST, "speculative"))
    return {"task": "lm-evaluation-harness", **found}


def law_of(llm: CollaborativeLM, params: SamplingParams, policy: Policy | None, alone: str | None) -> int | None:
    """Whose likelihood is meant: that of one model, or (None) the marginal.

    Raises:
        CollmError: who writes is settled by something that stands for no likelihood.
    """
    if alone is not None:
        return llm.model_names.index(alone)
    if len(llm.models) == 1 or params.deferral == "never":
        return BASE
    if policy is not None or params.deferral not in MARGINAL or not llm.has_gate:
        who = "this policy" if policy is not None else f"deferral={params.deferral!r}"
        raise CollmError(
            "likelihoods are those of the marginal over who writes, which needs a trained gate and is no matter of "
            f"{who}: give alone=MODEL (--alone) for the likelihood of one model, or take tasks that generate"
        )
    return None
