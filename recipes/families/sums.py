"""Equations that answers show, how many are computed right, and by how much two systems differ.

    python recipes/families/sums.py recipes/families/kept/answers.jsonl --against gate

Intervals of 95 % are over problems (bootstrap, paired).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from collm.evaluation.tasks.equations import equations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--against", required=True)
    arguments = parser.parse_args()
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for line in arguments.answers.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["system"], {})[row["id"]] = equations(row["text"])
    ids = sorted(found[arguments.against])
    weights = np.random.default_rng(0).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), 4000)
    counts = {name: np.array([each[id] for id in ids]) for name, each in found.items()}
    drawn = {name: (weights @ own)[:, 0] / np.maximum(1, (weights @ own)[:, 1]) for name, own in counts.items()}
    share = {name: own[:, 0].sum() / max(1, own[:, 1].sum()) for name, own in counts.items()}
    for name, own in counts.items():
        low, high = np.percentile(100 * (drawn[arguments.against] - drawn[name]), [2.5, 97.5])
        less = 100 * (share[arguments.against] - share[name])
        told = f"{own[:, 0].sum()} of {own[:, 1].sum()} equations right ({share[name]:.1%})"
        print(f"{name}: {told}; {arguments.against} less it: {less:.1f} ({low:.1f} to {high:.1f}) points")


if __name__ == "__main__":
    main()
