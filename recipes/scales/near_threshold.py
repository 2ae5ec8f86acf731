"""What else can be done with a threshold: hysteresis, soft mixing, mixing wherever an assistant was asked.

    python recipes/scales/near_threshold.py CHECKPOINT [--assistant NAME=SPEC] --task TASK --data CALIBRATION.jsonl \\
        --signal expected_gain --rates 0.1,0.2 --bands 1,3 --out FILE.json

A token whose signal lies just above the threshold is deferred, its neighbour just below is not. Two rules that treat
what is within `band` of the calibrated cut (log-odds of the gate, or the logarithm of the expected gain) otherwise:

- hysteresis: who writes goes on writing. It takes `cut + band` to begin to defer, `cut - band` to go on.
- soft mixing: within the band the token comes from the mixture of the two laws by the gate (`compose`), outside from
  one of them. An assistant is asked wherever the signal exceeds `cut - band`.
- mixed: there is no band. Where the signal exceeds the cut the assistant is asked, and what it says is weighed against
  what the base says, by the gate, instead of being believed. That costs nothing: both laws are there.

The first two ask the assistant more or less often than the plain rule does at the same cut, so that each is set
against the plain rule at the rate that it turned out to ask at: between two rates of the plain rule, its score is
interpolated.
The single results lie beside the table, in a folder of its name, for `collm compare`.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from collm import CollaborativeLM, SamplingParams
from collm.data.examples import Example, load_examples
from collm.decoding.baselines import Combination, Combined, Mixture, law_of
from collm.decoding.policies import Decision, ExpectedGain, by_gate, log_odds
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.files import write_text
from collm.llm.deferral import cut_for_rate, policy_at
from collm.llm.methods import Method
from collm.types import BASE
from collm.values import GREEDY, Answer, Draw

Reading = Callable[[Answer], float]


def gate_of(base: Answer) -> float:
    """Log-odds of deferring."""
    assert base.log_gate is not None
    return log_odds(base.log_gate)


def expected_gain_of(base: Answer) -> float:
    """Logarithm of the gate times the base's doubt: what the policy itself reads."""
    signal = ExpectedGain(math.inf).decide(base, GREEDY, 0).signal
    assert signal is not None
    return signal


SIGNALS: dict[str, Reading] = {"gate": gate_of, "expected_gain": expected_gain_of}


@dataclass(frozen=True)
class Hysteresis:
    """A policy with a memory: of the last token of every text, told apart by their seeds, it knows who was to write it.

    So texts must have seeds of their own, as in an evaluation, and be written token by token, without speculation.
    """

    read: Reading = field(repr=False)
    cut: float
    band: float
    needs_gate: bool = True
    _deferring: dict[int, bool] = field(default_factory=dict, repr=False)

    def decide(self, base: Answer, draw: Draw, position: int) -> Decision:
        assert base.log_gate is not None
        goes_on = position > 0 and self._deferring[draw.seed]
        signal = self.read(base)
        defers = signal > (self.cut - self.band if goes_on else self.cut + self.band)
        self._deferring[draw.seed] = defers
        return Decision((*by_gate(base.log_gate), BASE) if defers else (BASE,), signal)


@dataclass(frozen=True)
class SoftMixing(Combination):
    """The base's law below the band, the likeliest assistant's above, the gate's mixture within.

    `needed`: for each token, whether an assistant had to be asked. (In this study it always is, to see what for.)
    """

    read: Reading = field(repr=False)
    cut: float
    band: float
    needed: list[bool] = field(default_factory=list, repr=False)
    needs_gate: ClassVar[bool] = True

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        base = present[BASE]
        signal = self.read(base)
        self.needed.append(signal > self.cut - self.band)
        if abs(signal - self.cut) <= self.band:
            return Mixture().combine(present)
        assert base.log_gate is not None
        writer = next((z for z in by_gate(base.log_gate) if z in present), BASE) if signal > self.cut else BASE
        return Combined(law_of(present[writer]), {writer: law_of(present[writer])})


@dataclass(frozen=True)
class MixedWhereAsked(Combination):
    """The gate's mixture above the cut, the base's law below. `needed`: as in `SoftMixing`."""

    read: Reading = field(repr=False)
    cut: float
    needed: list[bool] = field(default_factory=list, repr=False)
    needs_gate: ClassVar[bool] = True

    def combine(self, present: Mapping[int, Answer]) -> Combined:
        base = present[BASE]
        self.needed.append(self.read(base) > self.cut)
        return Mixture().combine(present) if self.needed[-1] else Combined(law_of(base), {BASE: law_of(base)})


@dataclass(frozen=True)
class Row:
    """What a rule did. `asked`: share of the tokens for which an assistant has to run."""

    rule: str
    target_rate: float
    band: float
    cut: float
    asked: float
    score: float
    ci95: tuple[float, float]


def run(
    llm: CollaborativeLM, examples: Sequence[Example], rule: str, rate: float, band: float, args: argparse.Namespace
) -> Row:
    """All questions answered by one rule."""
    cut = cut_for_rate(llm.info.calibration, rate, args.task, args.signal)
    read = SIGNALS[args.signal]
    rules: dict[str, Method] = {
        "plain": policy_at(args.signal, cut, len(llm.models) - 1),
        "mixed": MixedWhereAsked(read, cut),
        "hysteresis": Hysteresis(read, cut, band),
        "soft": SoftMixing(read, cut, band),
    }
    method = rules[rule]
    result = evaluate(
        llm,
        args.task,
        examples,
        SamplingParams(max_tokens=args.max_tokens, speculative=False),
        policy=method,
        batch_size=args.batch_size,
        name=f"{rule}_{rate:g}_{band:g}",
    )
    result.save(args.out.with_suffix("") / f"{result.name}.json")
    asks = method.needed if isinstance(method, MixedWhereAsked | SoftMixing) else None
    asked = result.deferral_rate if asks is None else float(np.mean(asks))
    return Row(rule, rate, band, cut, asked, result.value, result.ci95)


def against_plain(row: Row, plain: Sequence[Row]) -> float | None:
    """Score above that of the plain rule at the same rate of asking; None beyond its lowest or highest rate."""
    ordered = sorted(plain, key=lambda other: other.asked)
    rates = [other.asked for other in ordered]
    if not rates or not rates[0] <= row.asked <= rates[-1]:
        return None
    return row.score - float(np.interp(row.asked, rates, [other.score for other in ordered]))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    plain = [row for row in rows if row.rule == "plain"]
    lines = ["| rule | at the cut for | band | asked | score | above the plain rule |", "|---|---|---|---|---|---|"]
    for row in rows:
        gain = None if row.rule == "plain" else against_plain(row, plain)
        lines.append(
            f"| {row.rule} | {row.target_rate:.0%} | {row.band:g} | {row.asked:.1%} | {row.score:.1%} | "
            f"{'' if gain is None else f'{100 * gain:+.1f}'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a pair that is calibrated for the signal")
    parser.add_argument("--assistant", action="append", default=[], metavar="NAME=SPEC")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--signal", default="expected_gain", choices=sorted(SIGNALS))
    parser.add_argument("--rates", default="0.1,0.2", help="of the plain rule: the cuts around which the bands lie")
    parser.add_argument("--bands", default="1,3", help="in nats; empty: the first two rules alone")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the models' weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    llm = CollaborativeLM.from_pretrained(args.checkpoint, args.assistant, dtype=args.dtype)
    if not llm.has_gate:
        raise CollmError(f"{args.checkpoint} has no gate, and these rules read it")
    examples = load_examples(args.data)
    rates = [float(rate) for rate in args.rates.split(",")]
    bands = [float(band) for band in args.bands.split(",") if band]
    todo = [(rule, rate, 0.0) for rule in ("plain", "mixed") for rate in rates]
    todo += [(rule, rate, band) for rule in ("hysteresis", "soft") for rate in rates for band in bands]
    rows: list[Row] = []
    for rule, rate, band in todo:
        rows.append(run(llm, examples, rule, rate, band, args))
        write_text(args.out, json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
