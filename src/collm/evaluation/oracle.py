"""What is there to be had: token accuracy on gold text of every model, of ways to defer, and of the best one.

The oracle defers exactly where an assistant is right and the base wrong: no way of choosing one writer for each token
does better. The others are compared with it at the rate of the gate, in expectation over what is drawn at random.
Rates count tokens that an assistant would write; where all that are asked abstain, the base does, so that a tool may be
asked far more often than it writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from collm.decoding.policies import by_gate, log_error, log_odds, to_log_odds
from collm.evaluation.reading import Reading
from collm.evaluation.stats import bootstrap_ci
from collm.files import write_text
from collm.types import BASE, Unit

Floats = NDArray[np.float64]
GATE, EXPECTED_GAIN, ENTROPY, TOP_PROBABILITY = "gate", "expected gain", "entropy", "top probability"
RANDOM = "random"


@dataclass(frozen=True)
class Row:
    """`accuracy`: share of gold tokens that the system's own choice would have been, with its 95 % interval over
    examples. `deferral_rate`: share of tokens that an assistant would have written; `asked_rate`: share of tokens at
    which one would have been asked."""

    name: str
    accuracy: float
    ci95: tuple[float, float]
    deferral_rate: float
    asked_rate: float


@dataclass(frozen=True)
class OracleReport:
    """`threshold`: the gate's, a probability; None without a gate. `rate`: what those with a dial were set to:
    the gate's, or without one the oracle's. `by_rate`: accuracies at other rates, or at the nearest ones that can be
    reached, which `reached` tells for each of them. With a `unit` of "chunk" `tokens`, rates and accuracies count
    chunks."""

    examples: int
    tokens: int
    threshold: float | None
    rate: float
    rows: tuple[Row, ...]
    by_rate: tuple[dict[str, float], ...]
    unit: Unit = "token"
    reached: tuple[dict[str, float], ...] = ()

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def is_report(path: str | Path) -> bool:
    """Is a file what `OracleReport.save` wrote?"""
    try:
        row = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    # What came later, older ones do without.
    return isinstance(row, dict) and {*row, "unit", "reached"} == {field.name for field in fields(OracleReport)}


@dataclass(frozen=True)
class _Deferred:
    """If every token were deferred: `right` `[N]`, the probability that what is then written is the gold token, and
    `written` `[N]`, that an assistant writes it."""

    right: Floats
    written: Floats


def report(
    reading: Reading,
    names: Sequence[str],
    *,
    threshold: float = 0.5,
    rates: Sequence[float] = (),
    seed: int = 0,
    unit: Unit = "token",
) -> OracleReport:
    """Compare all ways of choosing a writer.

    Args:
        names: of the models, base first.
        threshold: of the gate.
        rates: further deferral rates at which those with a dial are compared.
        seed: of the bootstrap.
        unit: what the reading consists of.
    """
    groups = [str(number) for number in reading.example]
    base = reading.right[:, BASE].astype(np.float64)

    def row(name: str, right: Floats, written: Floats, asked: Floats) -> Row:
        interval = bootstrap_ci(right.tolist(), groups=groups, seed=seed)
        return Row(name, _mean(right), interval, _mean(written), _mean(asked))

    none, every = np.zeros_like(base), np.ones_like(base)
    right, answers = reading.right.astype(np.float64), reading.answers.astype(np.float64)
    rows = [row(names[BASE], base, none, none)]
    rows += [row(name, right[:, z], answers[:, z], every) for z, name in enumerate(names) if z != BASE]
    some_right = right[:, BASE + 1 :].max(axis=1)
    gained = some_right * (1 - base)
    oracle = row("oracle", base + gained, gained, gained)
    dials, rate = _dials(reading), oracle.deferral_rate
    if reading.log_gate is not None:
        eta, whom = to_log_odds(threshold), dials[GATE].whom
        chosen = dials[GATE].signal > eta
        asked = np.array([log_odds(log_gate) > eta for log_gate in reading.log_gate.tolist()], np.float64)
        rows.append(row(GATE, np.where(chosen, whom.right, base), chosen * whom.written, asked))
        rate = rows[-1].deferral_rate
    rows += [row(name, *_at_rate(dial, base, rate)) for name, dial in dials.items() if name != GATE]
    surest = reading.top_log_prob.argmax(axis=1)  # the base where others equal it
    rows.append(
        row("more confident", right[np.arange(len(surest)), surest], (surest != BASE).astype(np.float64), every)
    )
    at_rates = [{name: _at_rate(dial, base, wanted) for name, dial in dials.items()} for wanted in rates]
    return OracleReport(
        examples=len(set(groups)),
        tokens=len(base),
        threshold=None if reading.log_gate is None else threshold,
        rate=rate,
        rows=(*rows, oracle),
        by_rate=tuple(
            {"rate": wanted, **{name: _mean(right) for name, (right, _, _) in at.items()}}
            for wanted, at in zip(rates, at_rates, strict=True)
        ),
        unit=unit,
        reached=tuple({name: _mean(written) for name, (_, written, _) in at.items()} for at in at_rates),
    )


class _Dial(NamedTuple):
    """A policy that can be set to a rate: whom it defers to, and the signal `[N]` that chooses tokens."""

    whom: _Deferred
    signal: Floats
    by_chance: bool = False


def _dials(reading: Reading) -> dict[str, _Dial]:
    """Every policy that can be set to a rate."""
    found: dict[str, _Dial] = {}
    whom = evenly = _evenly(reading)
    if reading.log_gate is not None:
        whom, odds, _ = found[GATE] = _by_gate(reading)
        error = np.array([log_error(value) for value in reading.top_log_prob[:, BASE].tolist()])
        found[EXPECTED_GAIN] = _Dial(whom, error - np.logaddexp(0, -odds))
    doubt = {ENTROPY: reading.entropy, TOP_PROBABILITY: -reading.top_log_prob[:, BASE]}
    found |= {name: _Dial(whom, signal) for name, signal in doubt.items()}
    return found | {RANDOM: _Dial(evenly, np.zeros(len(reading.right)), by_chance=True)}


def _evenly(reading: Reading) -> _Deferred:
    """An assistant drawn evenly; where it abstains, the base."""
    answers, right = reading.answers[:, BASE + 1 :], reading.right[:, BASE + 1 :]
    return _Deferred(np.where(answers, right, reading.right[:, [BASE]]).mean(axis=1), answers.mean(axis=1))


def _by_gate(reading: Reading) -> _Dial:
    """The first assistant that answers, in the order of the gate; and the log-odds below which it is asked.

    As in `policies.Threshold`, those that abstained before it have no part in them. -inf where none answers.
    """
    assert reading.log_gate is not None
    right, written = reading.right[:, BASE].astype(np.float64), np.zeros(len(reading.right))
    odds = np.full(len(reading.right), -np.inf)
    for t, log_gate in enumerate(reading.log_gate):
        order = by_gate(log_gate.tolist())
        author = next((z for z in order if reading.answers[t, z]), None)
        if author is not None:
            left = order[order.index(author) :]
            right[t], written[t] = reading.right[t, author], 1
            odds[t] = np.logaddexp.reduce(log_gate[left]) - log_gate[BASE]
    return _Dial(_Deferred(right, written), odds)


def _at_rate(dial: _Dial, base: Floats, rate: float) -> tuple[Floats, Floats, Floats]:
    """At the rate nearest to `rate` that can be reached, `[N]` each: the probability that a token comes out right, that
    an assistant writes it, and that one is asked."""
    whom = dial.whom
    if dial.by_chance:
        share = min(1.0, rate / max(_mean(whom.written), 1e-12))
        return (1 - share) * base + share * whom.right, share * whom.written, np.full(len(base), share)
    order = np.argsort(-dial.signal, kind="stable")
    written = np.concatenate([[0.0], np.cumsum(whom.written[order])])
    deferred = np.zeros(len(base), np.bool_)
    deferred[order[: int(np.abs(written - rate * len(base)).argmin())]] = True
    return np.where(deferred, whom.right, base), deferred * whom.written, deferred.astype(np.float64)


def _mean(values: Floats) -> float:
    return float(values.mean())
