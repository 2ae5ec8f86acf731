"""The price of a deferred token, found during training for a rate that is asked for (docs/method.md, "The price").

Minimising the loss under "the mean of 1 - gate_0 is at most the target" by the method of multipliers: after each step
the multiplier rises where more was deferred than the target, and falls where less was; what a token is charged is the
multiplier and a term in proportion to the present excess, which keeps the two from swinging.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRENGTH = 4.0
"""Nats of price for an excess of 1 in rate (the kappa of the method)."""
MEMORY = 0.9
"""Of the running mean over steps of what is deferred."""
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

    @property
    def value(self) -> Tensor:
        """Nats a deferred token; 0 before the first step."""
        excess = (self._deferred - self.target).nan_to_num(0.0)
        return (self._multiplier + STRENGTH * excess).clamp(0.0, HIGHEST)

    def step(self, deferred: Tensor) -> None:
        """After a step of the optimizer: `deferred`, the mean of 1 - gate_0 over all its labelled tokens."""
        deferred = deferred.to(self._deferred)
        mean = MEMORY * self._deferred + (1 - MEMORY) * deferred
        self._deferred = torch.where(self._deferred.isnan(), deferred, mean)
        self._multiplier = (self._multiplier + self.rate * (self._deferred - self.target)).clamp(0.0, HIGHEST)

    def state(self) -> dict[str, float]:
        return {"multiplier": float(self._multiplier), "deferred": float(self._deferred)}

    def load(self, state: dict[str, float]) -> None:
        self._multiplier.fill_(state["multiplier"])
        self._deferred.fill_(state["deferred"])


def held_out_loss(nll: float, deferred: float, target: float) -> float:
    """What checkpoints of a run with a target rate are compared by."""
    return nll + PENALTY * max(0.0, deferred - target - TOLERANCE)
