"""From what a user asks for (`SamplingParams`) to who writes (a `Policy`), through the checkpoint's calibration.

A *cut* is a threshold as it is compared: log-odds for the gate, a logarithm for the expected gain, nats for the base's
doubt (its entropy, or -log of its largest probability) and for chance (-log of its probability). inf is never, -inf
always.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

from collm.decoding.policies import (
    Always,
    ByEntropy,
    ByTopProbability,
    ExpectedGain,
    Never,
    Policy,
    Random,
    Sampled,
    Threshold,
    to_log_odds,
    to_nats,
    to_probability,
)
from collm.errors import CollmError
from collm.models.info import CalibrationRow, CalibrationTable, Chosen
from collm.sampling_params import Deferral, SamplingParams, Signal

NEAR = 0.03
"""Rates closer than this to one another are not worth a refusal."""
FAR = 0.02
"""An achieved rate that lies further from its target than this, or than a tenth of it, has missed it; and one that lies
further than half of it: else 0 would do for 1 %."""
READ_SIGNALS: dict[Deferral, Signal] = {
    "threshold": "gate",
    "expected_gain": "expected_gain",
    "random": "random",
    "entropy": "entropy",
    "top_probability": "top_probability",
}
"""The signal of every `deferral` that has a rate."""
THRESHOLDS: tuple[Deferral, ...] = (*READ_SIGNALS, "nudging")
"""Every `deferral` that reads `threshold`."""
METHODS: dict[Signal, Deferral] = {signal: deferral for deferral, signal in READ_SIGNALS.items()}


def settled(params: SamplingParams, chosen: Chosen | None) -> SamplingParams:
    """`params` that say who writes: where they do not, as the checkpoint's choice does.

    A rate that is given is one of the chosen signal's calibration, of the chosen task unless another one is named.
    """
    if params.deferral is not None:
        if chosen is None or params.deferral_rate is None or params.deferral != METHODS[chosen.signal]:
            return params
        return replace(params, task=params.task or chosen.task)
    if chosen is None:
        return replace(params, deferral="threshold")
    rate = chosen.deferral_rate if params.deferral_rate is None else params.deferral_rate
    task = params.task or chosen.task
    return replace(params, deferral=METHODS[chosen.signal], deferral_rate=rate, task=task)


def told(chosen: Chosen) -> str:
    """A choice in words."""
    by = "" if chosen.signal == "gate" else f" by {METHODS[chosen.signal]}"
    return f"deferral rate {chosen.deferral_rate:.1%}{by}, chosen on the calibration questions of {chosen.task}"


def rate_of(row: CalibrationRow) -> float:
    """The rate at which `cut_for_rate` finds a row's cut again."""
    if math.isinf(row.log_odds):
        return 0.0 if row.log_odds > 0 else 1.0
    return row.achieved_rate if far(row.achieved_rate, row.target_rate) else row.target_rate


def policy_at(signal: Signal, cut: float, num_assistants: int) -> Policy:
    """Defer where the signal exceeds `cut`."""
    if signal == "gate":
        return Threshold(cut)
    if signal == "expected_gain":
        return ExpectedGain(cut)
    if signal == "random":
        return Random(to_threshold(signal, cut), num_assistants)
    return (ByEntropy if signal == "entropy" else ByTopProbability)(cut, num_assistants)


def to_threshold(signal: Signal, cut: float) -> float:
    """A cut as `SamplingParams` has it: a probability, or for the entropy nats."""
    if signal == "gate":
        return to_probability(cut)
    if signal == "expected_gain":
        return math.exp(min(0.0, cut))
    return max(0.0, cut) if signal == "entropy" else math.exp(-max(0.0, cut))


def to_cut(signal: Signal, threshold: float) -> float:
    """The inverse of `to_threshold`."""
    if signal == "gate":
        return to_log_odds(threshold)
    if signal == "expected_gain":
        return -to_nats(threshold)
    return threshold if signal == "entropy" else to_nats(threshold)


def make_policy(
    params: SamplingParams,
    num_assistants: int,
    has_gate: bool,
    calibration: Sequence[CalibrationTable],
    tools: Sequence[str] = (),
) -> Policy:
    """The policy of every `deferral` that has one writer for each token.

    Args:
        tools: names of assistants that abstain at most tokens.

    Raises:
        CollmError: it needs a gate, assistants or a calibration that are not there, or a setting would be ignored.
    """
    refuse_ignored(params)
    mode, rate, threshold = params.deferral or "threshold", params.deferral_rate, params.threshold
    if mode == "never" or (num_assistants == 0 and mode == "threshold" and rate is None and threshold is None):
        return Never()  # the defaults, too, where there is nobody to defer to
    require_assistants(num_assistants)
    if mode == "always":
        if num_assistants > 1:
            require_gate(params, has_gate)
        return Always()
    if mode in ("threshold", "expected_gain", "sampled"):
        require_gate(params, has_gate)
    if mode == "sampled":
        return Sampled()
    signal = READ_SIGNALS[mode]
    if rate is None:
        cut = to_cut(signal, 0.5 if threshold is None else threshold)
    elif signal == "random" and params.task is None and all(table.signal != signal for table in calibration):
        if tools and 0 < rate < 1:
            raise CollmError(
                f"asked at random, {tools[0]} has nothing to say at most tokens and writes far fewer than a share of "
                f"{rate:g}: run {_calibrate(signal)} with --rates {rate:g}, or give threshold={rate:g}, the share of "
                "tokens at which it is asked"
            )
        cut = to_nats(rate)  # what it comes to where assistants never abstain
    else:
        cut = cut_for_rate(calibration, rate, params.task, signal)
    return policy_at(signal, cut, num_assistants)


def refuse_ignored(params: SamplingParams) -> None:
    """Refuse a setting that another one makes meaningless: whoever gave it would believe that it did something.

    Raises:
        CollmError: naming both.
    """
    mode = params.deferral or "threshold"
    if params.threshold is not None and mode not in THRESHOLDS:
        raise CollmError(
            f"threshold is read by {_named(THRESHOLDS)} alone: leave it out, or leave out deferral={mode!r}"
        )
    if params.deferral_rate is not None and mode not in READ_SIGNALS:
        raise CollmError(
            f"deferral_rate is read by {_named(tuple(READ_SIGNALS))} alone: leave it out, or leave out "
            f"deferral={mode!r}"
        )
    if params.task is not None and params.deferral_rate is None:
        raise CollmError(
            "task says in whose calibration deferral_rate is looked up, and nothing is looked up here: leave it out, "
            "or give deferral_rate"
        )


def _named(modes: Sequence[Deferral]) -> str:
    first, *rest = (repr(mode) for mode in modes)
    return f"deferral={first}, {', '.join(rest[:-1])} and {rest[-1]}"


def require_assistants(num_assistants: int) -> None:
    """Refuse what needs somebody to defer to."""
    if num_assistants == 0:
        raise CollmError("there is no assistant to defer to; give one, or deferral='never'")


def require_gate(params: SamplingParams, has_gate: bool) -> None:
    """Refuse what `compose` and the policies that read the gate cannot do."""
    if not has_gate:
        raise CollmError(
            f"deferral={params.deferral or 'threshold'!r} needs a gate, and this model has none: train one "
            "(collm train), or use deferral 'never', a baseline such as 'entropy' or 'random', or, with one assistant, "
            "'always'"
        )


def cut_for_rate(
    calibration: Sequence[CalibrationTable], rate: float, task: str | None = None, signal: Signal = "gate"
) -> float:
    """The calibrated cut for a deferral rate; between two rates that calibration achieved, their cuts interpolated.

    What counts is the rate that a cut achieved, not the one that calibration was after.

    Raises:
        CollmError: no calibration, several and no `task`, or a rate with no finite threshold on one of its sides.

    Warns:
        UserWarning: the nearest rate that was achieved is further than `FAR` from the one asked for.
    """
    if rate in (0, 1):
        return -to_log_odds(rate)  # never, always
    rows = sorted(_table(calibration, task, signal).rows, key=lambda row: row.target_rate)
    exact = [row for row in rows if math.isclose(row.target_rate, rate)]
    if exact and not far(exact[0].achieved_rate, rate):
        return exact[0].log_odds
    measured = [row for row in rows if math.isfinite(row.log_odds) and math.isclose(row.achieved_rate, rate)]
    if measured:
        return measured[0].log_odds
    cut = _between(rows, rate)
    if cut is None and exact:
        cut = exact[0].log_odds  # as near as calibration came
    if cut is None:
        raise CollmError(
            f"deferral_rate {rate:g} lies between calibrated rates of which one has no finite threshold (never or "
            f"always deferring), so nothing can be interpolated. Rates that work: {_known_rates(rows)}. For {rate:g}, "
            f"run {_calibrate(signal)} with --rates {_with(rows, rate)}"
        )
    nearest = min((row.achieved_rate for row in rows), key=lambda achieved: abs(achieved - rate))
    if far(nearest, rate):
        warnings.warn(
            f"deferral_rate {rate:g} was not measured: the nearest that calibration achieved is {nearest:.3g}. "
            f"For {rate:g}, run {_calibrate(signal)} with --rates {_with(rows, rate)}",
            stacklevel=2,
        )
    return cut


def _between(rows: Sequence[CalibrationRow], rate: float) -> float | None:
    """The cut between the two measured ones around `rate`; None where one side has no finite one."""
    # From never to always: a lower cut defers more.
    finite = sorted((row for row in rows if math.isfinite(row.log_odds)), key=lambda row: -row.log_odds)
    for low, high in itertools.pairwise(finite):
        if low.achieved_rate <= rate <= high.achieved_rate:
            share = (rate - low.achieved_rate) / ((high.achieved_rate - low.achieved_rate) or 1)
            return low.log_odds + share * (high.log_odds - low.log_odds)
    always = [row.achieved_rate for row in rows if row.log_odds == -math.inf]
    most = max((row.achieved_rate for row in finite if row.achieved_rate <= rate), default=None)
    above = any(row.achieved_rate > rate for row in finite)
    if most is not None and not above and always and always[-1] <= max(rate, most + NEAR):
        # A tool that abstains at most places: no threshold gives more than asking it everywhere does.
        return -math.inf
    return None


def far(achieved: float, target: float) -> bool:
    """Has an achieved rate missed its target?"""
    return abs(achieved - target) > min(max(FAR, target / 10), target / 2)


def _known_rates(rows: Sequence[CalibrationRow]) -> str:
    """In words: single rates, and the range in which any rate can be interpolated."""
    finite = sorted(row.achieved_rate for row in rows if math.isfinite(row.log_odds))
    low, high = (finite[0], finite[-1]) if finite else (math.inf, math.inf)
    singles = {0.0, 1.0, *(row.target_rate for row in rows)}
    between = [f"any from {low:g} to {high:g}"] if low < high else [f"{low:g}"] if finite else []
    before, after = (sorted(rate for rate in singles if side(rate)) for side in (low.__gt__, high.__lt__))
    return ", ".join([*(f"{rate:g}" for rate in before), *between, *(f"{rate:g}" for rate in after)])


def _with(rows: Sequence[CalibrationRow], rate: float) -> str:
    return ",".join(f"{value:.4g}" for value in sorted({*(row.target_rate for row in rows), rate}))


def _calibrate(signal: Signal) -> str:
    return "collm calibrate" if signal == "gate" else f"collm calibrate --signal {signal}"


def _table(calibration: Sequence[CalibrationTable], task: str | None, signal: Signal) -> CalibrationTable:
    tables = {table.task: table for table in calibration if table.signal == signal}
    if not tables:
        if signal == "random":
            raise CollmError(
                f"this checkpoint has no calibration of random deferral: run {_calibrate(signal)}, or leave out task"
            )
        of = "" if signal == "gate" else f" of the {signal.replace('_', ' ')}"
        raise CollmError(
            f"deferral_rate needs a calibration{of}, and this checkpoint has none: run {_calibrate(signal)}, "
            "or give a threshold instead"
        )
    if task is None and len(tables) > 1:
        raise CollmError(f"the checkpoint is calibrated for several tasks ({', '.join(tables)}); name one as task")
    if task is not None and task not in tables:
        raise CollmError(f"the checkpoint is not calibrated for task {task!r}, only for {', '.join(tables)}")
    return next(iter(tables.values())) if task is None else tables[task]
