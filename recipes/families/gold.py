"""What a pair makes of gold text, chunk by chunk: nats of each model, of the pair, of doubt and of chance at its rate.

    python recipes/families/gold.py --base SCORES --assistant SCORES --reading ORACLE.jsonl --data DATA.jsonl

Two ways to use a signal. As a *mixture*: nats under `log sum_z P(Z = z) q_z(chunk)`, with the gate as it was trained or
a constant. As a *choice*: the assistant writes the share of chunks (that of the gate at 0.5, or --rate) where the
signal is highest, and the nats are those of whoever writes. Chance at the same rate is the mean of both models with
that weight. 95 % intervals are over problems (bootstrap, paired). `collm oracle` makes the reading: gate and entropy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm.data.scores import load_scores

Floats = NDArray[np.float64]


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a reading by their examples."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {str(record["id"]): record for record in lines[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "assistant", "reading", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--rate", type=float, action="append", default=[], help="further rates of chunks")
    arguments = parser.parse_args()
    scores = [{row["id"]: row for row in load_scores(path)} for path in (arguments.base, arguments.assistant)]
    every = [json.loads(line)["id"] for line in arguments.data.read_text().splitlines()]
    names = [name for name in every if all(name in each for each in scores)]
    if len(names) < len(every):
        print(f"{len(every) - len(names)} of {len(every)} left out: too long to be scored")
    reading = read(arguments.reading)
    problem: list[int] = []
    right: list[tuple[bool, bool]] = []
    base: list[float] = []
    assistant: list[float] = []
    entropy: list[float] = []
    gate: list[float] = []
    top: list[float] = []
    for number, name in enumerate(names):
        record = reading[name]
        rows = [each[name] for each in scores]
        count = len(record["entropy"])
        assert all(len(row["log_score"]) == count for row in rows), f"{name}: other chunks"
        problem += [number] * count
        base += rows[0]["log_score"]
        assistant += rows[1]["log_score"]
        right += list(zip(rows[0]["right"], rows[1]["right"], strict=True))
        entropy += record["entropy"]
        gate += [each[1] for each in record["gate"]]
        top += [each[0] for each in record["top"]]
    of = np.array(problem)
    log_q = -np.array([base, assistant], np.float64).T
    correct = np.array(right, np.bool_)
    share = np.exp(np.array(gate, np.float64))
    wrong = np.maximum(-np.expm1(np.array(top, np.float64)), 2.0**-24)
    doubt = np.array(entropy)

    def mixed(weight: Floats | float) -> Floats:
        with np.errstate(divide="ignore"):
            return -np.logaddexp(np.log1p(-np.asarray(weight)) - log_q[:, 0], np.log(weight) - log_q[:, 1])

    def chosen(signal: Floats, rate: float) -> NDArray[np.bool_]:
        picked = np.zeros(len(signal), np.bool_)
        picked[np.argsort(-signal, kind="stable")[: round(rate * len(signal))]] = True
        return picked

    weights = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=2000)
    counts = np.bincount(of, minlength=len(names))

    def told(name: str, nats: Floats, right: Floats | None = None, against: Floats | None = None) -> None:
        def interval(values: Floats) -> str:
            sums = np.bincount(of, values, minlength=len(names))
            low, high = np.percentile(weights @ sums / (weights @ counts), [2.5, 97.5])
            return f"{low:.3f} to {high:.3f}"

        row = f"{name:42} {nats.mean():.3f} ({interval(nats)})"
        row += "" if right is None else f" | right {right.mean():.1%}"
        print(row if against is None else f"{row} | less {(against - nats).mean():.3f} ({interval(against - nats)})")

    print(f"{len(names)} problems, {len(of)} chunks; nats a chunk")
    own = correct.astype(np.float64)
    told("base alone", log_q[:, 0], own[:, 0])
    told("assistant alone", log_q[:, 1], own[:, 1])
    best = min(np.linspace(0.01, 0.99, 99), key=lambda weight: float(mixed(weight).mean()))
    mean = float(share.mean())
    told(f"mixture, constant {best:.2f} (the best one here)", mixed(float(best)))
    told(f"mixture, constant {mean:.2f} (the gate's mean)", mixed(mean))
    told("mixture, the pair's gate", mixed(share), against=mixed(mean))
    for rate in (float((share > 0.5).mean()), *arguments.rate):
        print(f"choice, {rate:.1%} of chunks:")
        chance = (1 - rate) * log_q[:, 0] + rate * log_q[:, 1]
        signals = {"gate": share, "expected gain": share * wrong, "entropy": doubt}
        told("  chance", chance, (1 - rate) * own[:, 0] + rate * own[:, 1])
        for name, signal in signals.items():
            picked = chosen(signal, rate)
            told(
                f"  {name}", np.where(picked, log_q[:, 1], log_q[:, 0]), np.where(picked, own[:, 1], own[:, 0]), chance
            )
    some = log_q.min(axis=1)
    only = [(correct[:, a] & ~correct[:, b]).mean() for a, b in ((1, 0), (0, 1))]
    print(
        f"right: the assistant alone {only[0]:.1%}, the base alone {only[1]:.1%}; the better one {some.mean():.3f} nats"
    )


if __name__ == "__main__":
    main()
