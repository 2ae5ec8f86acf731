"""The price of a deferred token, found during training for a rate that is asked for (docs/method.md, "The price").

Minimising the loss under "the mean of 1 - gate_0 is at most the target" by the method of multipliers: after each step
the multiplier rises where more was deferred than the target, and falls where less was. What a token is charged is the
multiplier and a term in proportion to the excess that is to come if the rate goes on as it does: an optimizer with
momentum answers late, and the two would swing (a PID controller: Stooke et al. 2020, arXiv 2007.03964).
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 4.0
"""Nats of price for an excess of 1 in rate (the kappa of the method)."""
MEMORY = 0.8
"""Of the running mean over steps of what is deferred (the beta)."""
AHEAD = 5.0
"""Steps that the change of this mean is taken to go on for (the delta)."""
SHARE, SHORTEST, LONGEST = 0.1, 10, 100
"""The multiplier makes good an excess within this share of the run's steps, but within these bounds."""
HIGHEST = 20.0
"""Nats. An assistant that gains more on its tokens than this is worth any rate."""

TOLERANCE, PENALTY = 0.02, 10.0
"""Held-out text may defer so much more than the target; beyond it each unit of rate counts so many nats, when the best
checkpoint is chosen. The price itself would not do: it changes from one evaluation to the next."""


class Price:
    """The price at the present step, a scalar on the device that is never waited for.

    Args:
        target: mean of 1 - gate_0 that is asked for, in (0, 1).
        num_steps: of the whole run.
    """

    def __init__(self, target: float, num_steps: int, device: torch.device | str = "cpu") -> None:
        self.target = target
        self.rate = STRENGTH / min(LONGEST, max(SHORTEST, SHARE * num_steps))
        self._multiplier = torch.zeros((), device=device)
        self._deferred = torch.full((), torch.nan, device=device)
        self._change = torch.zeros((), device=device)

    @property
    def value(self) -> Tensor:
        """Nats a deferred token; 0 before the first step."""
        excess = (self._deferred - self.target).nan_to_num(0.0)
        value = (self._multiplier + STRENGTH * (excess + AHEAD * self._change)).clamp(0.0, HIGHEST)
        # A rate that rises below a target which has never bound costs nothing.
        return torch.where((self._multiplier > 0) | (excess > 0), value, 0.0)

    def step(self, deferred: Tensor) -> None:
        """After a step of the optimizer: `deferred`, the mean of 1 - gate_0 over all its labelled tokens."""
        deferred = deferred.to(self._deferred)
        before = torch.where(self._deferred.isnan(), deferred, self._deferred)
        self._deferred = MEMORY * before + (1 - MEMORY) * deferred
        self._change = self._deferred - before
        self._multiplier = (self._multiplier + self.rate * (self._deferred - self.target)).clamp(0.0, HIGHEST)

    def state(self) -> dict[str, float]:
        return {
            "multiplier": float(self._multiplier),
            "deferred": float(self._deferred),
            "change": float(self._change),
        }

    def load(self, state: dict[str, float]) -> None:
        self._multiplier.fill_(state["multiplier"])
        self._deferred.fill_(state["deferred"])
        self._change.fill_(state.get("change", 0.0))  # older runs have none


def held_out_loss(nll: float, deferred: float, target: float) -> float:
    """What checkpoints of a run with a target rate are compared by."""
    return nll + PENALTY * max(0.0, deferred - target - TOLERANCE)
