"""Calibration: from the share of tokens that assistants shall write to the threshold eta, of the gate or of a rival.

The gate (or the base's entropy, or another `Signal`) is read on the pair's *own* generations, and those shift with the
threshold: where an assistant writes, the text goes on otherwise. So each candidate is run, the rate it really achieves
is measured, and the next candidate is taken between the two measured thresholds around the target, until the rate is
met or no gate value lies between them.
A deferral to which a tool gives no answer is no deferred token: a calculator that abstains at most places makes high
rates unreachable; such targets keep the nearest rate there is, and the table tells what was achieved (`missed`).

Thresholds are cuts (`llm.deferral`): log-odds for the gate, logarithms or nats for the other signals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from collm.data.examples import Example
from collm.decoding.policies import by_gate, log_odds, log_share
from collm.errors import CollmError
from collm.evaluation.evaluate import Writer, evaluate_with_traces
from collm.evaluation.result import EvalResult
from collm.evaluation.shipped import get_task
from collm.evaluation.system import identity_of
from collm.evaluation.task import Task
from collm.files import claimed
from collm.identity.finding import digest
from collm.llm.deferral import far, policy_at, rate_of, to_threshold
from collm.models.hub import write_card
from collm.models.info import FORMAT_VERSION, CalibrationRow, CalibrationTable, Chosen, load_info, save_info
from collm.report.plots import save_curve
from collm.report.trace import Trace
from collm.sampling_params import SamplingParams, Signal
from collm.types import BASE
from collm.values import LanguageModel

TARGET_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NEVER, ALWAYS = math.inf, -math.inf
EVEN = 0.0
"""Log-odds of eta = 0.5: defer where the gate finds it likelier than not."""


@dataclass(frozen=True)
class Measurement:
    """What a threshold did on the calibration prompts.

    `gates`: for every written token, the gate's log-odds of deferring (or what else the signal is), float32, `[N]`: a
    threshold below them is one at which the token's author is asked. `accepted`: an assistant wrote that token, bool,
    `[N]`.
    """

    log_odds: float
    result: EvalResult
    gates: NDArray[np.float32]
    accepted: NDArray[np.bool_]

    @property
    def rate(self) -> float:
        return self.result.deferral_rate


def signals(traces: Sequence[Trace], signal: Signal) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`Measurement.gates` and `Measurement.accepted` of some texts, for any signal.

    Where the policy reads the gate, an assistant that wrote because others had abstained was asked for its own share
    and those after it alone.

    Raises:
        CollmError: the gate is to be read and the texts carry none.
    """
    if signal == "gate":
        return gate_log_odds(traces)
    steps = [step for trace in traces for step in trace.generation.steps]
    assert all(step.signal is not None for step in steps)
    values = np.array([step.signal for step in steps], dtype=np.float64)
    if signal == "expected_gain":
        for i, step in enumerate(steps):
            left = _left(step.gate, step.author)
            if len(left) < len(step.gate):  # what was compared first, and is kept, is the gain with all of them left
                values[i] += log_share(left) - log_share(_left(step.gate, BASE))
    return values.astype(np.float32), np.array([step.deferred for step in steps], dtype=np.bool_)


def gate_log_odds(traces: Sequence[Trace]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`signals` of the gate."""
    steps = [step for trace in traces for step in trace.generation.steps]
    if not steps or not all(step.gate for step in steps):
        raise CollmError("the texts carry no gate: calibration needs a checkpoint that was trained with a gate")
    values = np.array([log_odds(_left(step.gate, step.author)) for step in steps], dtype=np.float32)
    return values, np.array([step.deferred for step in steps], dtype=np.bool_)


def _left(gate: Sequence[float], author: int) -> list[float]:
    """Log-gate of the base and the assistants left when the author was asked; of all, where the base wrote."""
    order = by_gate(gate)
    left = order if author == BASE else order[order.index(author) :]
    return [math.log(gate[z]) if gate[z] else -math.inf for z in (BASE, *left)]


def midpoints(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Thresholds between neighbouring distinct values, `[number of distinct values - 1]`, descending.

    Each lies at or above the lower and strictly below the upper neighbour, so that "greater than" tells them apart
    even where the two are neighbouring float32 numbers.
    """
    distinct = np.unique(values[np.isfinite(values)])[::-1]
    upper, lower = distinct[:-1], distinct[1:]
    middle = ((upper.astype(np.float64) + lower) / 2).astype(np.float32)
    return np.where(middle < upper, middle, lower)


def next_threshold(target: float, measured: Sequence[Measurement]) -> float | None:
    """A threshold to try for `target`: between the two measured ones around it, at the quantile of the gates there.

    Of the gates that lie between the two, those at which an assistant really wrote count; where there are none to
    choose from, all do. Where nothing measured reaches `target`, the lower side is taken to be `ALWAYS`, unmeasured, at
    a rate of 1, and the gates are those of the text that came nearest. None if `ALWAYS` does not reach the target, or
    no gate value is left in between.
    """
    ordered = sorted(measured, key=lambda m: -m.log_odds)
    brackets = [(a, b) for a, b in zip(ordered, ordered[1:], strict=False) if a.rate <= target <= b.rate]
    if brackets:
        above, below = min(brackets, key=lambda pair: pair[1].rate - pair[0].rate)
        low, high_rate = below.log_odds, below.rate
        pools = [below.gates[below.accepted], np.concatenate([above.gates, below.gates])]
    elif ordered[-1].log_odds > ALWAYS and ordered[-1].rate <= target:
        above, low, high_rate = ordered[-1], ALWAYS, 1.0
        pools = [above.gates]
    else:
        return None
    if above.rate == high_rate:
        return None
    share = (target - above.rate) / (high_rate - above.rate)
    for gates in pools:
        inside = gates[(gates > low) & (gates <= above.log_odds)]
        candidates = midpoints(inside)
        candidates = candidates[(candidates > low) & (candidates < above.log_odds)]
        if len(candidates):
            deferred = 1 - np.searchsorted(np.sort(inside), candidates, side="right") / len(inside)
            return float(candidates[np.abs(deferred - share).argmin()])
    return None


def calibrate(
    llm: Writer,
    task: Task | str,
    examples: Sequence[Example],
    *,
    signal: Signal = "gate",
    target_rates: Sequence[float] = TARGET_RATES,
    seed: int = 0,
    rounds: int = 3,
    tolerance: float = 0.01,
    max_tokens: int = 256,
    batch_size: int = 16,
    params: SamplingParams | None = None,
    out: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CalibrationTable:
    """Find the threshold for each target rate, and the quality there.

    Args:
        signal: what the threshold is for: the gate, or a rival that shall defer as often.
        target_rates: 0 stands for never deferring, 1 for always (log-odds inf and -inf). The gate's table has a row
            more, for the rate of eta = 0.5.
        rounds: how many thresholds are tried for each target at most; every one also serves the other targets.
        tolerance: a rate this close to its target is good enough, unless it is off by more than half of it.
        params: how texts are written (temperature, stop strings), whoever writes; greedy with `max_tokens` and
            `seed` if not given.
        out: folder for the traces of every threshold tried; a stopped calibration goes on where it was.
        identity: tells this checkpoint from others, see `evaluate`.

    Raises:
        CollmError: no gate, no examples, an `out` that belongs to another run, a base whose server does not tell the
            signal.
    """
    _require_told(llm, signal)
    with nullcontext() if out is None else claimed(out, folder=True):
        return _calibrate(
            llm,
            get_task(task) if isinstance(task, str) else task,
            examples,
            signal,
            target_rates,
            rounds,
            tolerance,
            params or SamplingParams(max_tokens=max_tokens, seed=seed),
            out=out,
            batch_size=batch_size,
            identity=identity_of(llm, identity),  # read once, for all thresholds
            progress=progress,
        )


def _require_told(llm: Writer, signal: Signal) -> None:
    """Before any text is written: an export's server compares what the base's law says, and keeps it to itself."""
    models: Sequence[LanguageModel] = getattr(llm, "models", ())
    if models and models[BASE].tests_deferral and signal not in ("gate", "random"):
        raise CollmError(
            f"{models[BASE].name}: its server does not tell the {signal.replace('_', ' ')} that it compares with a "
            "threshold: calibrate the checkpoint that was exported and export it again, or take the signal gate or "
            "random"
        )


def _calibrate(
    llm: Writer,
    task: Task,
    examples: Sequence[Example],
    signal: Signal,
    target_rates: Sequence[float],
    rounds: int,
    tolerance: float,
    params: SamplingParams,
    *,
    out: str | Path | None,
    **options: Any,
) -> CalibrationTable:
    measured: dict[float, Measurement] = {}

    def measure(log_odds: float, what: str) -> None:
        kind = "threshold" if signal == "gate" else signal
        file = None if out is None else Path(out) / f"{kind}_{log_odds:.9g}.jsonl"
        result, traces = evaluate_with_traces(
            llm,
            task,
            examples,
            params,
            # A policy, for a threshold in `params` is a probability, which rounds large log-odds to 1.
            policy=policy_at(signal, log_odds, len(llm.model_names) - 1),
            out=file,
            name=what,
            **options,
        )
        measured[log_odds] = Measurement(log_odds, result, *signals(traces, signal))

    measure(NEVER, "never defer")
    # A trained gate is nearly sure at most tokens, so the rates around its own lie close together, far from those of
    # the text that is written without deferring: without this point the search would jump over all of them.
    if signal == "gate":
        measure(EVEN, "defer where the gate is above 0.5")
    inner = [rate for rate in target_rates if 0 < rate < 1]

    def allowed(rate: float) -> float:
        """How far from it is near enough: of a rate of 1 %, neither never deferring nor 2 % is."""
        return min(tolerance, rate / 2)

    def beyond(rate: float) -> bool:
        """Nothing measured comes up to it, and what asking everywhere gives is not known."""
        return ALWAYS not in measured and rate > max(each.rate for each in measured.values()) + allowed(rate)

    # The dearest texts of all, so only where they are asked for, or where a rate is out of reach: two thresholds have
    # not come to it, assistants that abstain bound the rates from above, or no turn is left.
    if 1 in target_rates:
        measure(ALWAYS, "always defer")
    for turn in range(1, rounds + 1):
        for rate in inner:
            if beyond(rate) and (turn > 2 or any(each.result.abstained for each in measured.values())):
                measure(ALWAYS, "always defer")
            if abs(_nearest(rate, measured).rate - rate) <= allowed(rate):
                continue
            candidate = next_threshold(rate, list(measured.values()))
            if candidate is not None:
                measure(candidate, f"rate {rate:.2g}, round {turn}")
    if any(beyond(rate) for rate in inner):
        measure(ALWAYS, "always defer")
    rows = [_row(rate, _nearest(rate, measured), signal) for rate in target_rates]
    own = measured.get(EVEN) if signal == "gate" else None
    if own is not None and all(row.log_odds != EVEN and row.target_rate != own.rate for row in rows):
        rows.append(_row(own.rate, own, signal))
        rows.sort(key=lambda row: row.target_rate)
    # Of equally good ones, the cheapest.
    best = max(range(len(rows)), key=lambda i: (rows[i].metric_value, -rows[i].achieved_rate, rows[i].log_odds, -i))
    return CalibrationTable(
        task=task.name,
        metric=task.metric,
        seed=params.seed,
        num_prompts=len(examples),
        rows=rows,
        best=best,
        signal=signal,
    )


def missed(table: CalibrationTable) -> list[CalibrationRow]:
    """Rows whose achieved rate is far from the wanted one."""
    return [row for row in table.rows if far(row.achieved_rate, row.target_rate)]


def _nearest(rate: float, measured: Mapping[float, Measurement]) -> Measurement:
    """The measurement that came nearest to `rate`; of equals, the one that defers less.

    A rate beyond what asking everywhere gives has that one, though a threshold may give as much: so `cut_for_rate`
    knows that no threshold gives more.
    """
    if rate in (0, 1):
        return measured[ALWAYS if rate else NEVER]
    always = measured.get(ALWAYS)
    if always is not None and far(always.rate, rate) and rate > max(each.rate for each in measured.values()):
        return always
    return min(measured.values(), key=lambda m: (abs(m.rate - rate), -m.log_odds))


def _row(target: float, found: Measurement, signal: Signal) -> CalibrationRow:
    return CalibrationRow(
        target_rate=target,
        achieved_rate=found.rate,
        threshold=to_threshold(signal, found.log_odds),
        log_odds=found.log_odds,
        metric_value=found.result.value,
        ci95=found.result.ci95,
    )


def trained_state(checkpoint: str | Path) -> str:
    """A hash of what training left in a checkpoint: all but its calibration, and (of a whole model) the weights, of
    which its description tells."""
    info = load_info(checkpoint)
    told = {} if info is None else info.model_dump(mode="json", exclude={"calibration", "chosen", "format_version"})
    files = [Path(checkpoint) / name for name in ("gate.safetensors", "adapter_model.safetensors")]
    return digest(told, [xxh3_64_hexdigest(path.read_bytes()) for path in files if path.is_file()])


def store_table(
    checkpoint: str | Path, table: CalibrationTable, *, chosen: float | None = None, trained: str | None = None
) -> CalibrationTable | None:
    """Put `table` into a checkpoint, in the place of an older one of the same task and signal, which is returned.

    Args:
        chosen: the deferral rate of this table at which the pair shall write where nobody says otherwise. A choice
            that was made in the older table becomes this one's best rate.
        trained: its `trained_state` when it was loaded.

    Raises:
        CollmError: the folder is not one of our checkpoints, or was trained anew since.
    """
    # Two that read, change and write at once would lose a table.
    with claimed(checkpoint, folder=True, wait=True):
        info = load_info(checkpoint)
        if info is None:
            raise CollmError(
                f"{checkpoint} has no collm.json to store a calibration in: it is a plain model without a gate"
            )
        if trained is not None and trained_state(checkpoint) != trained:
            raise CollmError(
                f"{checkpoint} was trained anew while it was calibrated: these thresholds are another gate's; run "
                "collm calibrate again"
            )
        older = [other for other in info.calibration if (other.task, other.signal) == (table.task, table.signal)]
        others = [other for other in info.calibration if other not in older]
        renewed: dict[str, Any] = {"calibration": [*others, table], "format_version": FORMAT_VERSION}
        before = info.chosen
        if chosen is None and before is not None and (before.task, before.signal) == (table.task, table.signal):
            chosen = None if table.best is None else rate_of(table.rows[table.best])
            renewed["chosen"] = None
        if chosen is not None:
            renewed["chosen"] = Chosen(task=table.task, signal=table.signal, deferral_rate=chosen)
        save_info(checkpoint, info.model_copy(update=renewed))
        write_card(checkpoint)
    return older[-1] if older else None


def write_curve(table: CalibrationTable, folder: str | Path) -> list[Path]:
    """The rate/quality curve as CSV, SVG and, with matplotlib, PNG; the files written."""
    return save_curve(table, folder)
