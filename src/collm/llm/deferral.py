"""From what a user asks for (`SamplingParams`) to who writes (a `Policy`), through the checkpoint's calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence

from collm.decoding.policies import Always, Never, Policy, Random, Sampled, Threshold, to_log_odds
from collm.errors import CollmError
from collm.models.checkpoint import CalibrationTable
from collm.types import SamplingParams


def make_policy(
    params: SamplingParams, num_assistants: int, has_gate: bool, calibration: Sequence[CalibrationTable]
) -> Policy:
    """The policy of every `deferral` but "compose".

    Raises:
        CollmError: it needs a gate, assistants or a calibration that are not there.
    """
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


def require_gate(params: SamplingParams, has_gate: bool) -> None:
    if not has_gate:
        raise CollmError(
            f"deferral={params.deferral!r} needs a gate, and this model has none: train one (collm train), "
            "or use deferral 'never', 'random' or, with one assistant, 'always'"
        )


def log_odds_for_rate(calibration: Sequence[CalibrationTable], rate: float, task: str | None = None) -> float:
    """The calibrated threshold for a deferral rate; between two calibrated rates, their log-odds interpolated.

    Raises:
        CollmError: no calibration, several and no `task`, or a rate outside the table.
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
    if not below or not above:
        known = ", ".join(f"{row.target_rate:g}" for row in rows)
        raise CollmError(f"deferral_rate {rate:g} lies outside the calibrated rates ({known}); take one of them")
    low, high = below[-1], above[0]
    share = (rate - low.target_rate) / (high.target_rate - low.target_rate)
    return low.log_odds + share * (high.log_odds - low.log_odds)


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
