"""Whom should one ask where? Signals against each other on gold text, from what `collm oracle --out` has read.

    python recipes/families/paired.py ORACLE.jsonl [--rate 0.1 ...]

At each rate a signal gives the assistant the chunks where it is highest. Shares of right chunks, and paired differences
with 95 % intervals over problems (bootstrap). A base and one assistant.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
AGAINST = ("gate", "random"), ("gate", "entropy"), ("gate", "top probability"), ("expected gain", "entropy")
AGAINST += ("expected gain", "top probability"), ("expected gain", "gate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reading", type=Path)
    parser.add_argument("--rate", type=float, action="append", help="[default: 0.1, 0.2, 0.4, the gate's at 0.5]")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.reading.read_text().splitlines()][1:]
    of = np.repeat(np.arange(len(rows)), [len(row["right"]) for row in rows])
    right = np.concatenate([np.array(row["right"], np.float64) for row in rows])
    entropy = np.concatenate([np.array(row["entropy"], np.float64) for row in rows])
    gate = np.exp(np.concatenate([np.array(row["gate"], np.float64)[:, 1] for row in rows]))
    top = np.concatenate([np.array(row["top"], np.float64)[:, 0] for row in rows])
    # The base may be sure to the last bit: `decoding/policies.py`.
    gain = gate * np.maximum(-np.expm1(top), 2.0**-24)
    signals = {"gate": gate, "expected gain": gain, "entropy": entropy, "top probability": -top}
    weights = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=4000)
    counts = np.bincount(of)

    def told(values: Floats) -> str:
        low, high = np.percentile(weights @ np.bincount(of, values) / (weights @ counts), [2.5, 97.5])
        return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"

    only = [(right[:, a] > right[:, b]).mean() for a, b in ((1, 0), (0, 1))]
    print(f"{len(rows)} problems, {len(of)} chunks; right: base {told(right[:, 0])}, assistant {told(right[:, 1])};")
    print(f"the assistant alone {only[0]:.1%}, the base alone {only[1]:.1%}")
    for rate in arguments.rate or (0.1, 0.2, 0.4, float((gate > 0.5).mean())):
        chosen = {"random": (1 - rate) * right[:, 0] + rate * right[:, 1]}
        for name, signal in signals.items():
            picked = np.zeros(len(signal), np.bool_)
            picked[np.argsort(-signal, kind="stable")[: round(rate * len(signal))]] = True
            chosen[name] = np.where(picked, right[:, 1], right[:, 0])
        print(f"at {rate:.1%}: " + "; ".join(f"{name} {told(values)}" for name, values in chosen.items()))
        for one, other in AGAINST:
            print(f"    {one} less {other}: {told(chosen[one] - chosen[other])}")


if __name__ == "__main__":
    main()
