"""What decides a pair's answers, apart from the request: answers given under other settings are not taken over."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

import torch

from collm.decoding.policies import Policy
from collm.errors import CollmError
from collm.evaluation.harness.records import fingerprint
from collm.llm import CollaborativeLM
from collm.models.head import DeferralHead
from collm.models.loading import weights_fingerprint
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams
from collm.types import BASE

OF_A_REQUEST = ("max_tokens", "temperature", "top_p", "top_k", "stop")
"""Of `SamplingParams`, what each request of the harness says for itself."""
MARGINAL = ("threshold", "sampled", "compose")
"""Ways to settle who writes that follow the gate, so that the marginal is what they stand for."""


def settings_of(
    llm: CollaborativeLM, params: SamplingParams, policy: Policy | None, alone: str | None
) -> dict[str, Any]:
    """Models with fingerprints of their weights, prompt formats, calibration, and who writes; for JSON."""
    local = {model.name: model for model in llm.models if isinstance(model, LocalModel)}
    base = llm.models[BASE]
    tables = [table.model_dump(mode="json") for table in llm.info.calibration]
    return {
        "task": "lm-evaluation-harness",
        "models": list(llm.model_names),
        "weights": {name: weights_fingerprint(model.model) for name, model in local.items()},
        "dtypes": {name: str(model.model.dtype).removeprefix("torch.") for name, model in local.items()},
        "gate": _hash(base.head) if isinstance(base, LocalModel) and base.head is not None else None,
        "prompts": [formatter.fingerprint() for formatter in llm.formatters],
        "calibration": None if params.deferral_rate is None else fingerprint(tables),
        "policy": None if policy is None else repr(policy),
        "alone": alone,
        **{
            f"params.{name}": value
            for name, value in asdict(params).items()
            if name not in (*OF_A_REQUEST, "speculative")
        },
    }


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


def _hash(head: DeferralHead) -> str:
    values = torch.cat([head.weight.detach().flatten(), head.bias.detach()]).float().cpu()
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
