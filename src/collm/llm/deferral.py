"""From what a user asks for (`SamplingParams`) to who writes (a `Policy`), through the checkpoint's calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from collm.decoding.policies import Always, Never, Policy, Random, Sampled, Threshold, to_log_odds
from collm.errors import CollmError
from collm.models.checkpoint import CalibrationRow, CalibrationTable
from collm.types import SamplingParams

NEAR = 0.03
"""Rates closer than this to one another are not worth a refusal."""


def make_policy(
    params: SamplingParams, num_assistants: int, has_gate: bool, calibration: Sequence[CalibrationTable]
) -> Policy:
    """The policy of every `deferral` but "compose".

    Raises:
        CollmError: it needs a gate, assistants or a calibration that are not there, or a setting would be ignored.
    """
    refuse_ignored(params)
    mode, rate, threshold = params.deferral, params.deferral_rate, params.threshold
    if mode == "never" or (num_assistants == 0 and mode == "threshold" and rate is None and threshold is None):
        return Never()  # the defaults, too, where there is nobody to defer to
    if num_assistants == 0:
        raise CollmError("there is no assistant to defer to; give one, or deferral='never'")
    if mode == "random":
        assert rate is not None
        return Random(rate, num_assistants)
    if mode == "always" and num_assistants == 1:
        return Always()
    require_gate(params, has_gate)
    if mode == "always":
        return Always()
    if mode == "sampled":
        return Sampled()
    assert mode == "threshold", mode
    if rate is not None:
        return Threshold(log_odds_for_rate(calibration, rate, params.task))
    return Threshold.of_probability(0.5 if threshold is None else threshold)


def refuse_ignored(params: SamplingParams) -> None:
    """Refuse a setting that another one makes meaningless: whoever gave it would believe that it did something.

    Raises:
        CollmError: naming both.
    """
    mode = params.deferral
    if params.threshold is not None and mode != "threshold":
        raise CollmError(
            f"threshold is read by deferral='threshold' alone: leave it out, or leave out deferral={mode!r}"
        )
    if params.deferral_rate is not None and mode not in ("threshold", "random"):
        raise CollmError(
            f"deferral_rate is read by deferral='threshold' and 'random' alone: leave it out, or leave out "
            f"deferral={mode!r}"
        )
    if params.task is not None and (params.deferral_rate is None or mode == "random"):
        raise CollmError(
            "task says in whose calibration deferral_rate is looked up, and nothing is looked up here: leave it out, "
            "or give deferral_rate with deferral='threshold'"
        )


def require_gate(params: SamplingParams, has_gate: bool) -> None:
    """Refuse what `compose` and the policies that read the gate cannot do."""
    refuse_ignored(params)
    if not has_gate:
        raise CollmError(
            f"deferral={params.deferral!r} needs a gate, and this model has none: train one (collm train), "
            "or use deferral 'never', 'random' or, with one assistant, 'always'"
        )


def log_odds_for_rate(calibration: Sequence[CalibrationTable], rate: float, task: str | None = None) -> float:
    """The calibrated threshold for a deferral rate; between two calibrated rates, their log-odds interpolated.

    Raises:
        CollmError: no calibration, several and no `task`, or a rate with no finite threshold on one of its sides.
    """
    if rate in (0, 1):
        return -to_log_odds(rate)  # never, always
    rows = sorted(_table(calibration, task).rows, key=lambda row: row.target_rate)
    exact = [row for row in rows if math.isclose(row.target_rate, rate)]
    if exact:
        return exact[0].log_odds
    finite = [row for row in rows if math.isfinite(row.log_odds)]
    below = [row for row in finite if row.target_rate < rate]
    above = [row for row in finite if row.target_rate > rate]
    always = [row for row in rows if row.log_odds == -math.inf]
    if below and not above and always and always[-1].achieved_rate <= max(rate, below[-1].achieved_rate + NEAR):
        # A tool that abstains at most places: no threshold gives more than asking it everywhere does.
        return -math.inf
    if not below or not above:
        raise CollmError(
            f"deferral_rate {rate:g} lies between calibrated rates of which one has no finite threshold (never or "
            f"always deferring), so nothing can be interpolated. Rates that work: {_known_rates(rows)}. For {rate:g}, "
            f"run collm calibrate with --rates {_with(rows, rate)}"
        )
    low, high = below[-1], above[0]
    share = (rate - low.target_rate) / (high.target_rate - low.target_rate)
    return low.log_odds + share * (high.log_odds - low.log_odds)


def _known_rates(rows: Sequence[CalibrationRow]) -> str:
    """In words: single rates, and the range in which any rate can be interpolated."""
    finite = [row.target_rate for row in rows if math.isfinite(row.log_odds)]
    low, high = (finite[0], finite[-1]) if finite else (math.inf, math.inf)
    singles = {0.0, 1.0, *(row.target_rate for row in rows)}
    between = [f"any from {low:g} to {high:g}"] if low < high else [f"{low:g}"] if finite else []
    before, after = (sorted(rate for rate in singles if side(rate)) for side in (low.__gt__, high.__lt__))
    return ", ".join([*(f"{rate:g}" for rate in before), *between, *(f"{rate:g}" for rate in after)])


def _with(rows: Sequence[CalibrationRow], rate: float) -> str:
    return ",".join(f"{value:.4g}" for value in sorted({*(row.target_rate for row in rows), rate}))


def _table(calibration: Sequence[CalibrationTable], task: str | None) -> CalibrationTable:
    tables = {table.task: table for table in calibration}
    if not tables:
        raise CollmError(
            "deferral_rate needs a calibration, and this checkpoint has none: run collm calibrate, "
            "or give a threshold instead"
        )
    if task is None and len(tables) > 1:
        raise CollmError(f"the checkpoint is calibrated for several tasks ({', '.join(tables)}); name one as task")
    if task is not None and task not in tables:
        raise CollmError(f"the checkpoint is not calibrated for task {task!r}, only for {', '.join(tables)}")
    return next(iter(tables.values())) if task is None else tables[task]
