"""Ways in which passes of a network can be recorded as graphs, and what has been found out about them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from collm.models.paged import experts


class Way(NamedTuple):
    """How what is recorded computes a network."""

    compiled: bool
    """By modules that torch compiles."""
    experts: str | None
    """transformers' name for how experts are computed; None: there are none, or as they always are."""


class Ways:
    """Those that are left for a network, the best first. The graphs of its trial and those that last share them, so
    that what fails is tried, and told, once. Memory that is lacking is no fault of a way.

    Args:
        compiled: whether compiled modules may be recorded.
    """

    def __init__(self, lm: PreTrainedModel, device: torch.device, compiled: bool) -> None:
        found = experts.ways(lm, device)
        self._left = [Way(made, way) for made in ([True, False] if compiled else [False]) for way in found or [None]]
        self.are_experts_fixed = experts.num_experts(lm) > 0 and not found
        """There are experts, and transformers has no way to compute them that can be recorded."""
        self.not_compiled: str | None = None
        """Why no way with compiled modules could be recorded, until that is told: not before another one could."""
        self.on_trial = True
        """The lasting graphs are still to be made: they will tell whether they lack memory."""
        self.is_lack_told = False

    @property
    def best(self) -> Way | None:
        """None: the network cannot be recorded."""
        return self._left[0] if self._left else None

    def give_up(self, reason: str) -> None:
        """The best way cannot be recorded. The next one computes experts otherwise; modules as they are come last."""
        failed = self._left.pop(0)
        if failed.compiled and not (self._left and self._left[0].compiled):
            self.not_compiled = reason
