"""What one request asks of the server, in `vllm_xargs`, as the number that a signal must exceed.

    {"collm_deferral": "threshold", "collm_threshold": 0.5}         as `SamplingParams`
    {"collm_deferral_rate": 0.3, "collm_task": "gsm8k"}             through the calibration that travelled along
    {"collm_signal": "gate", "collm_cut": 17.25}                    the threshold as it is compared: log-odds, or nats

A request that says nothing is written by the base alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from collm.decoding.policies import Always, ByEntropy, ByTopProbability, ExpectedGain, Never, Threshold
from collm.errors import CollmError, nearest
from collm.llm.deferral import make_policy
from collm.models.served import ServedInfo
from collm.sampling_params import SamplingParams

SIGNALS = ("gate", "expected_gain", "entropy", "top_probability")
"""What is computed from a row of logits, in the order of the columns of `columns.signals`."""
MODES = ("threshold", "expected_gain", "entropy", "top_probability", "never", "always")
KEYS = {
    "collm_deferral": "deferral",
    "collm_threshold": "threshold",
    "collm_deferral_rate": "deferral_rate",
    "collm_task": "task",
}
EXACT_KEYS = ("collm_signal", "collm_cut")

_served: ServedInfo | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """Defer where `SIGNALS[signal]` exceeds `cut`, strictly."""

    signal: int = 0
    cut: float = math.inf

    @property
    def defers(self) -> bool:
        return self.cut < math.inf

    @property
    def reads_law(self) -> bool:
        """Whether the base's law decides, too, and not the gate alone."""
        return self.defers and self.signal > 0 and self.cut > -math.inf


NEVER = Rule()


def admit(config: Any) -> ServedInfo:
    """Remember what this process serves: vLLM checks a request's settings without telling of which model."""
    global _served
    _served = ServedInfo.from_config(config)
    return _served


def served() -> ServedInfo | None:
    return _served


def rule(extra_args: Mapping[str, Any] | None, info: ServedInfo | None) -> Rule:
    """The rule of a request.

    Args:
        info: None where it is not known; then a calibrated rate cannot be looked up.

    Raises:
        CollmError: an unknown setting, one out of range, a rate without its calibration.
    """
    asked = {key: value for key, value in (extra_args or {}).items() if key.startswith("collm_")}
    known = (*KEYS, *EXACT_KEYS)
    for key in asked:
        if key not in known:
            hint = nearest(key, known, f"there are {', '.join(known)}")
            raise CollmError(f"there is no setting {key!r}; {hint}")
    exact = [key for key in EXACT_KEYS if key in asked]
    if exact:
        return _exact(asked)
    settings = {name: asked[key] for key, name in KEYS.items() if key in asked}
    if not settings:
        return NEVER
    mode = settings.get("deferral")
    if mode is not None and mode not in MODES:
        raise CollmError(
            f"collm_deferral is one of {', '.join(MODES)} here, not {mode!r}: a server decides alone, from its "
            "own logits"
        )
    for name in ("threshold", "deferral_rate"):
        if name in settings:
            settings[name] = _number(f"collm_{name}", settings[name])
    try:
        params = SamplingParams(**settings)
    except (TypeError, ValueError) as error:
        raise CollmError(str(error)) from None
    if info is None and params.deferral_rate is not None:
        raise CollmError(
            "collm_deferral_rate cannot be looked up, for vLLM has not loaded the plugin collm: leave VLLM_PLUGINS "
            "unset or let it name collm, or give collm_threshold"
        )
    num_assistants, calibration = (1, []) if info is None else (info.num_assistants, info.calibration)
    found = make_policy(params, num_assistants, True, calibration)
    match found:
        case Never():
            return NEVER
        case Always():
            return Rule(0, -math.inf)
        case Threshold(log_odds=cut):
            return Rule(0, cut)
        case ExpectedGain(log_gain=cut):
            return Rule(1, cut)
        case ByEntropy(nats=cut):
            return Rule(2, cut)
        case ByTopProbability(nats=cut):
            return Rule(3, cut)
    raise AssertionError(found)


def _exact(asked: Mapping[str, Any]) -> Rule:
    if set(asked) != set(EXACT_KEYS):
        raise CollmError("collm_signal and collm_cut belong together, and to no other setting")
    if asked["collm_signal"] not in SIGNALS:
        raise CollmError(f"collm_signal is one of {', '.join(SIGNALS)}, not {asked['collm_signal']!r}")
    return Rule(SIGNALS.index(asked["collm_signal"]), _number("collm_cut", asked["collm_cut"]))


def _number(key: str, value: Any) -> float:
    """JSON has no infinity: `"inf"` and `"-inf"` stand for never and always."""
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise CollmError(f"{key} must be a number, not {value!r}")
    return number


def check(params: Any) -> None:
    """Refuse what would be wrong together with deferral; called for each request when it comes in.

    Args:
        params: vLLM's `SamplingParams`.

    Raises:
        CollmError: naming the setting; vLLM answers with status 400.
    """
    asked = rule(params.extra_args, _served)
    if not asked.defers:
        return
    for wrong, name, why in (
        (params.ignore_eos, "ignore_eos", "a text must end where the base defers"),
        (params.min_tokens, "min_tokens", "vLLM keeps a text from ending before, and so from deferring"),
        (params.structured_outputs is not None, "response_format", "its grammar knows no deferral token"),
        (params.logit_bias, "logit_bias", "it would change the gate, and an assistant does not heed it"),
        (params.allowed_token_ids, "allowed_token_ids", "it forbids deferral, and an assistant does not heed it"),
    ):
        if wrong:
            raise CollmError(f"{name} together with deferral: {why}. Leave it out, or let the base write alone")
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "bad_words": None}
    changed = [name for name, neutral in penalties.items() if (getattr(params, name) or neutral) != neutral]
    if asked.reads_law and changed:
        raise CollmError(
            f"{changed[0]} changes the law in which {SIGNALS[asked.signal]} is read: send {penalties[changed[0]]}, for "
            "where a request does not say, the model's generation config does; or defer by threshold"
        )
