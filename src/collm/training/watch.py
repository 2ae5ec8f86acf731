"""Warnings while training still runs: what is likely to come out wrong, and the remedy. Each is given once."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

LOW, HIGH = 0.05, 0.9
"""Mean gate on held-out text below which a pair hardly defers, and above which its base hardly learns."""
WORSE = 0.02
"""Nats per token by which a base alone may become worse."""


class Watch:
    """Looks at held-out figures.

    Args:
        base_nll: of the base alone before training; None: not known, or the base is frozen.
        label_share: of the tokens that pseudo-labels defer: a tool that is wanted at 4 % of them has a small gate.
        target: the rate that is asked for.
    """

    def __init__(
        self, base_nll: float | None = None, label_share: float | None = None, target: float | None = None
    ) -> None:
        self.base_nll, self.target = base_nll, target
        wanted = [share / 2 for share in (label_share, target) if share is not None]
        self.low = min([LOW, *wanted])
        self._told: set[str] = set()

    def look(self, deferred: float | None, base_nll: float | None) -> None:
        """Held-out means: of 1 - gate_0 (None for a base without assistants), and of the base alone."""
        if deferred is not None and deferred > HIGH:
            if self.target is None:
                remedy = "set target_rate (to 0.3, say), or raise deferral_cost"
            else:
                remedy = f"the price for a target_rate of {self.target} is still rising: give it more epochs"
            self._warn(
                "high",
                f"the mean gate on held-out text is {deferred:.3f}: the assistants would write nearly everything, and "
                f"the base hardly learns any more; {remedy}",
            )
        if deferred is not None and deferred < self.low:
            self._warn(
                "low",
                f"the mean gate on held-out text is {deferred:.4f}: the pair will hardly defer. Lower the price, if "
                "one is set (deferral_cost), or raise target_rate; else take init.method b, or an assistant that "
                "knows more (collm oracle tells what there is to gain)",
            )
        if base_nll is not None and self.base_nll is not None and base_nll > self.base_nll + WORSE:
            remedy = (
                "lower learning_rate, or train for fewer epochs"
                if deferred is None
                else "it forgets what the assistants write for it: set target_rate or raise deferral_cost, or lower "
                "learning_rate"
            )
            self._warn(
                "worse",
                f"the base alone has become worse on held-out text ({base_nll:.3f} nats a token, {self.base_nll:.3f} "
                f"before training): {remedy}",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("%s", text)
