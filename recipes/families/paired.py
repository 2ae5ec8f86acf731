"""Whom should one ask where? Signals against each other on gold text, from what `collm oracle --out` has read.

    python recipes/families/paired.py ORACLE.jsonl [--rate 0.1 ...] [--beside OTHER.jsonl]

At each rate a signal gives the assistant the chunks where it is highest. Shares of right chunks, and paired differences
with 95 % intervals over problems (bootstrap). A base and one assistant. `--beside`: what another pair made of the same
chunks.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
AGAINST = ("gate", "random"), ("gate", "entropy"), ("gate", "top probability"), ("expected gain", "entropy")
AGAINST += ("expected gain", "top probability"), ("expected gain", "gate")


@dataclass(frozen=True)
class Reading:
    """What a pair made of gold text, chunk by chunk. `of`: the problem of a chunk; `right`: of base and assistant."""

    ids: list[str]
    of: NDArray[np.int64]
    right: Floats
    signals: dict[str, Floats]

    @staticmethod
    def of_file(path: Path) -> Reading:
        rows = [json.loads(line) for line in path.read_text().splitlines()][1:]

        def chunks(name: str) -> Floats:
            return np.concatenate([np.array(row[name], np.float64) for row in rows])

        gate, top = np.exp(chunks("gate")[:, 1]), chunks("top")[:, 0]
        # The base may be sure to the last bit: `decoding/policies.py`.
        gain = gate * np.maximum(-np.expm1(top), 2.0**-24)
        signals = {"gate": gate, "expected gain": gain, "entropy": chunks("entropy"), "top probability": -top}
        of = np.repeat(np.arange(len(rows)), [len(row["right"]) for row in rows])
        return Reading([str(row["id"]) for row in rows], of, chunks("right"), signals)

    def chosen(self, rate: float) -> dict[str, Floats]:
        """Whether who writes is right, if a signal gives so many chunks to the assistant, `[N]`."""
        right = self.right
        found = {"random": (1 - rate) * right[:, 0] + rate * right[:, 1]}
        for name, signal in self.signals.items():
            picked = np.zeros(len(signal), np.bool_)
            picked[np.argsort(-signal, kind="stable")[: round(rate * len(signal))]] = True
            found[name] = np.where(picked, right[:, 1], right[:, 0])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reading", type=Path)
    parser.add_argument("--rate", type=float, action="append", help="[default: 0.1, 0.2, 0.4, the gate's at 0.5]")
    parser.add_argument("--beside", type=Path, help="of another pair, on the same text")
    arguments = parser.parse_args()
    own = Reading.of_file(arguments.reading)
    other = None if arguments.beside is None else Reading.of_file(arguments.beside)
    if other is not None and (own.ids, *own.of) != (other.ids, *other.of):
        sys.exit(f"Error: {arguments.beside} is of other text, or cuts it elsewhere")
    weights = np.random.default_rng(0).multinomial(len(own.ids), np.full(len(own.ids), 1 / len(own.ids)), size=4000)
    counts = np.bincount(own.of)

    def told(values: Floats) -> str:
        low, high = np.percentile(weights @ np.bincount(own.of, values) / (weights @ counts), [2.5, 97.5])
        return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"

    right = own.right
    only = [(right[:, a] > right[:, b]).mean() for a, b in ((1, 0), (0, 1))]
    print(f"{len(own.ids)} problems, {len(own.of)} chunks; right: ", end="")
    print(f"base {told(right[:, 0])}, assistant {told(right[:, 1])};")
    print(f"the assistant alone {only[0]:.1%}, the base alone {only[1]:.1%}")
    if other is not None:
        print(f"base less the other base: {told(right[:, 0] - other.right[:, 0])}")
    for rate in arguments.rate or (0.1, 0.2, 0.4, float((own.signals["gate"] > 0.5).mean())):
        chosen = own.chosen(rate)
        print(f"at {rate:.1%}: " + "; ".join(f"{name} {told(values)}" for name, values in chosen.items()))
        for one, against in AGAINST:
            print(f"    {one} less {against}: {told(chosen[one] - chosen[against])}")
        if other is not None:
            for name, values in other.chosen(rate).items():
                print(f"    {name} less that of the other pair: {told(chosen[name] - values)}")


if __name__ == "__main__":
    main()
