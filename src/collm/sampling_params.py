"""What a user asks for: how one text is to be written, and who writes its tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from collm.values import Draw

Deferral = Literal[
    "threshold",
    "expected_gain",
    "sampled",
    "compose",
    "never",
    "always",
    "random",
    "entropy",
    "top_probability",
    "confident",
    "mixture",
    "contrastive",
    "proxy_tuning",
    "nudging",
]
Signal = Literal["gate", "expected_gain", "entropy", "top_probability", "random"]
"""What a threshold is compared with; each can be calibrated to a deferral rate."""
OnAssistantError = Literal["fail", "base"]
MOST_TOP = 20
"""Tokens that can be told beside each written one: as many as the OpenAI API and engines give."""
WIDEST = 2**31 - 1
"""A top-k beyond every vocabulary, in which passes still can be told it."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to write one text.

    `temperature` 0 is greedy. `top_p`, `top_k` (0 = off) truncate the law of the model that writes the token.
    `seed` (64 bits, negative ones in two's complement) fixes all random choices; they are keyed by (seed, sample,
    position), so a text does not depend on its batch-mates. `sample` tells several texts of one prompt and seed apart;
    `generate_batch` numbers the repeats of a prompt within one call.
    `stop`: strings that end the text and are not part of it; `stop_token_ids`: tokens that do.
    `top_log_probs`: so many of the most probable tokens are told with each token (`Step.top`).

    Who writes is settled by `deferral`. None stands for the checkpoint's own choice, which `collm run` leaves in it
    (`CheckpointInfo.chosen`); without one, and with a `threshold`, for `"threshold"`:

    - `"threshold"`: defer where `1 - P(Z = base) > threshold`, to the assistant with the largest gate. The threshold
      is `threshold` (a probability), or comes from the checkpoint's calibration for `deferral_rate`; with neither, 0.5.
    - `"expected_gain"`: defer where the gate wants an assistant *and* the base is likely to be wrong, that is where
      `P(Z != base) * (1 - max p_base)` exceeds `threshold`; or at a calibrated `deferral_rate`.
    - `"sampled"`: draw Z from the gate, then the token from the chosen model: exactly the marginal law.
    - `"compose"`: one law, the mixture `sum_z P(Z = z) P_z`; every model is run at every token.
    - `"never"`, `"always"`.

    The others are baselines (docs/baselines.md):

    - `"random"`: ask a uniformly drawn assistant with probability `threshold`, or so often that it writes a share
      `deferral_rate` (where assistants never abstain, the two are one).
    - `"entropy"`, `"top_probability"`: defer where the base is in doubt, that is where the entropy of its law exceeds
      `threshold` nats, or its largest probability lies below `threshold`; or at a calibrated `deferral_rate`.
    - `"confident"`, `"mixture"`, `"contrastive"`, `"proxy_tuning"`: one law from those of all models at every token.
    - `"nudging"`: the assistant writes, and the base where the assistant's largest probability lies below `threshold`
      (0.4 if not given).

    `speculative`: let models draft ahead of one another where that is expected to pay; None: if they can (those with
    different tokenizers cannot, and refuse True). It changes the speed, never the text. `on_assistant_error`: where an
    assistant fails, the text ends with `"error"` (`"fail"`), or the base writes the token in its place (`"base"`),
    which the step tells.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    sample: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    top_log_probs: int = 0
    deferral: Deferral | None = None
    threshold: float | None = None
    deferral_rate: float | None = None
    task: str | None = None
    """Whose calibration table `deferral_rate` is looked up in; needed only if the checkpoint has several."""
    speculative: bool | None = None
    on_assistant_error: OnAssistantError = "fail"

    def __post_init__(self) -> None:
        # As the OpenAI API: one string is one stop string, not its characters.
        stop: str | Sequence[str] = self.stop
        if not isinstance(stop, str | Sequence) or not all(isinstance(part, str) for part in stop):
            raise ValueError(f"stop must be a text or a list of texts, not {stop!r}")
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("max_tokens", "top_k", "seed", "sample", "top_log_probs"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "threshold", "deferral_rate"):
            value = getattr(self, name)
            if value is None and name in ("threshold", "deferral_rate"):
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, not {value!r}")
        if not isinstance(self.speculative, bool | None):
            raise ValueError(
                f"speculative must be True or False, or None where models that can shall, not {self.speculative!r}"
            )
        if not math.isfinite(self.temperature):
            raise ValueError(f"temperature must be a number, not {self.temperature}")
        if not 1 <= self.max_tokens < 2**31:
            raise ValueError(f"max_tokens must be at least 1 and less than 2**31, not {self.max_tokens}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must have at most 64 bits, not be {self.seed}")
        if not 0 <= self.sample < 2**31:
            raise ValueError(f"sample must be a number from 0 to 2**31 - 1, not {self.sample}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}")
        if not 0 <= self.top_log_probs <= MOST_TOP:
            raise ValueError(f"top_log_probs must lie between 0 and {MOST_TOP}, not be {self.top_log_probs}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, not {self.top_k}")
        if self.deferral is None and self.threshold is not None:
            object.__setattr__(self, "deferral", "threshold")
        if self.deferral is not None and self.deferral not in get_args(Deferral):
            raise ValueError(f"deferral must be one of {', '.join(get_args(Deferral))}, not {self.deferral!r}")
        if self.on_assistant_error not in get_args(OnAssistantError):
            raise ValueError(f"on_assistant_error must be 'fail' or 'base', not {self.on_assistant_error!r}")
        if self.threshold is not None and self.deferral == "entropy":
            if not 0 <= self.threshold < math.inf:
                raise ValueError(f"threshold must be an entropy in nats, 0 or more, not {self.threshold}")
        elif self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], not {self.threshold}")
        if self.deferral_rate is not None and not 0 <= self.deferral_rate <= 1:
            raise ValueError(f"deferral_rate must lie in [0, 1], not {self.deferral_rate}")
        if self.threshold is not None and self.deferral_rate is not None:
            raise ValueError("give threshold or deferral_rate, not both")
        dialled = self.deferral in ("expected_gain", "random", "entropy", "top_probability")
        if dialled and self.threshold is None and self.deferral_rate is None:
            raise ValueError(f'deferral="{self.deferral}" needs deferral_rate or threshold')
        if any(not stop for stop in self.stop):
            raise ValueError("a stop string must not be empty")

    @property
    def draw(self) -> Draw:
        """How a model chooses the tokens of this text."""
        return Draw(self.seed, self.sample, self.temperature, self.top_p, min(self.top_k, WIDEST))
