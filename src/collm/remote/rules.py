"""Deferral over the wire: a policy as a server tests it (`collm.vllm_plugin.request`), how far a base writes where
nobody tests, and what its log-probabilities say of the gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from collm.decoding.policies import Always, ByEntropy, ByTopProbability, ExpectedGain, Never, Policy, Random, Threshold
from collm.models.served import ServedInfo
from collm.types import BASE
from collm.values import NO_TOKEN, UNKNOWN, Answer, Draw

_UNREAD = Answer(NO_TOKEN, UNKNOWN, None, UNKNOWN, UNKNOWN)


def settings_of(policy: Policy | None) -> dict[str, Any] | None:
    """As `vllm_xargs`; None where a server cannot test it, for what it draws is known here alone."""
    match policy:
        case None | Never():
            return {"collm_deferral": "never"}
        case Always():
            return {"collm_deferral": "always"}
        case Threshold(log_odds=cut):
            return _exact("gate", cut)
        case ExpectedGain(log_gain=cut):
            return _exact("expected_gain", cut)
        case ByEntropy(nats=cut):
            return _exact("entropy", cut)
        case ByTopProbability(nats=cut):
            return _exact("top_probability", cut)
    return None


def _exact(signal: str, cut: float) -> dict[str, Any]:
    # JSON has no infinity.
    return {"collm_signal": signal, "collm_cut": cut if math.isfinite(cut) else str(cut)}


def writes_alone(policy: Policy | None, draw: Draw, position: int, limit: int) -> int:
    """How many tokens to ask a base for that tests nothing: up to the first deferral, where it is known beforehand."""
    if isinstance(policy, Always | Random):
        for count in range(1, limit + 1):
            if policy.decide(_UNREAD, draw, position + count - 1).authors[0] != BASE:
                return count
    return limit


def log_gate_of(served: ServedInfo, watched: Sequence[float]) -> tuple[float, ...]:
    """`[1+K]`, from the log-probabilities of the deferral ids and of the zero column (`ServedInfo`)."""
    *deferrals, zero = watched
    scores = [0.0, *((told - zero) * served.scale + b for told, b in zip(deferrals, served.bias, strict=True))]
    highest = max(scores)
    total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
    return tuple(score - total for score in scores)


def hidden_share(served: ServedInfo, watched: Sequence[float]) -> float:
    """The share of the columns that are no tokens of the base."""
    *deferrals, zero = watched
    return math.fsum(map(math.exp, deferrals)) + served.zero_columns * math.exp(zero)
