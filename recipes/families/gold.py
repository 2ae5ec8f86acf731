"""What a pair makes of gold text, chunk by chunk: nats of each model, of the pair, of doubt and of chance at its rate.

    python recipes/families/gold.py --base SCORES --assistant SCORES --reading ORACLE.jsonl --data DATA.jsonl

Two ways to use a signal. As a *mixture*: nats under `log sum_z P(Z = z) q_z(chunk)`, with the gate as it was trained or
a constant. As a *choice*: an assistant writes the share of chunks (that of the gate at 0.5, or --rate) where the
signal is highest (of several, in the order of the reading, the one with the largest gate), and the nats are those of
whoever writes. Chance at the same rate is the mean of the models: the base's weight is what is left of the rate, which
the assistants share evenly. 95 % intervals are over problems (bootstrap, paired). `collm oracle` makes the reading:
gate and entropy.
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


def best_constant(log_q: Floats) -> Floats:
    """The weights `[1+K]` under which a mixture of the models has the fewest nats here, by EM; `log_q` `[N, 1+K]`."""
    weights = np.full(log_q.shape[1], 1 / log_q.shape[1])
    for _ in range(1000):
        posterior = np.exp(log_q + np.log(weights))
        posterior /= posterior.sum(axis=1, keepdims=True)
        before, weights = weights, posterior.mean(axis=0)
        if np.abs(weights - before).max() < 1e-6:
            break
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "reading", "data"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--assistant", type=Path, action="append", required=True, help="repeat it for several")
    parser.add_argument("--rate", type=float, action="append", default=[], help="further rates of chunks")
    arguments = parser.parse_args()
    scores = [{row["id"]: row for row in load_scores(path)} for path in (arguments.base, *arguments.assistant)]
    every = [json.loads(line)["id"] for line in arguments.data.read_text().splitlines()]
    names = [name for name in every if all(name in each for each in scores)]
    if len(names) < len(every):
        print(f"{len(every) - len(names)} of {len(every)} left out: too long to be scored")
    reading = read(arguments.reading)
    problem: list[int] = []
    right: list[tuple[bool, ...]] = []
    scored: list[tuple[float, ...]] = []
    entropy: list[float] = []
    gate: list[list[float]] = []
    top: list[float] = []
    for number, name in enumerate(names):
        record = reading[name]
        rows = [each[name] for each in scores]
        count = len(record["entropy"])
        assert all(len(row["log_score"]) == count for row in rows), f"{name}: other chunks"
        assert len(record["gate"][0]) == len(rows), "the reading is of other models"
        problem += [number] * count
        scored += zip(*(row["log_score"] for row in rows), strict=True)
        right += zip(*(row["right"] for row in rows), strict=True)
        entropy += record["entropy"]
        gate += record["gate"]
        top += [each[0] for each in record["top"]]
    of = np.array(problem)
    log_q = np.array(scored, np.float64)
    nats = -log_q
    own = np.array(right, np.float64)
    gates = np.exp(np.array(gate, np.float64))
    share, whom = gates[:, 1:].sum(axis=1), 1 + gates[:, 1:].argmax(axis=1)
    wrong = np.maximum(-np.expm1(np.array(top, np.float64)), 2.0**-24)
    doubt = np.array(entropy)

    def mixed(weight: Floats) -> Floats:
        with np.errstate(divide="ignore"):
            found: Floats = -np.logaddexp.reduce(np.log(weight) + log_q, axis=1)
        return found

    def at(values: Floats, writer: NDArray[np.int64]) -> Floats:
        return values[np.arange(len(writer)), writer]

    def chosen(signal: Floats, rate: float) -> NDArray[np.int64]:
        writer = np.zeros(len(signal), np.int64)
        picked = np.argsort(-signal, kind="stable")[: round(rate * len(signal))]
        writer[picked] = whom[picked]
        return writer

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
    models = ["base", *(path.name for path in arguments.assistant)]
    for z, name in enumerate(models):
        told(f"{name} alone", nats[:, z], own[:, z])
    best, mean = best_constant(log_q), gates.mean(axis=0)
    told(f"mixture, constant {_weights(best)} (the best one here)", mixed(best))
    told(f"mixture, constant {_weights(mean)} (the gate's mean)", mixed(mean))
    told("mixture, the gate", mixed(gates), against=mixed(mean))
    for rate in (float((share > 0.5).mean()), *arguments.rate):
        print(f"choice, {rate:.1%} of chunks:")
        chance = (1 - rate) * nats[:, 0] + rate * nats[:, 1:].mean(axis=1)
        signals = {"gate": share, "expected gain": share * wrong, "entropy": doubt}
        told("  chance", chance, (1 - rate) * own[:, 0] + rate * own[:, 1:].mean(axis=1))
        for name, signal in signals.items():
            writer = chosen(signal, rate)
            told(f"  {name}", at(nats, writer), at(own, writer), chance)
    alone = [(own[:, z] > np.delete(own, z, axis=1).max(axis=1)).mean() for z in range(len(models))]
    print("only this one is right: ", end="")
    print(", ".join(f"{name} {value:.1%}" for name, value in zip(models, alone, strict=True)), end="; ")
    print(f"the better one {nats.min(axis=1).mean():.3f} nats")


def _weights(values: Floats) -> str:
    return ", ".join(f"{value:.2f}" for value in values[1:])


if __name__ == "__main__":
    main()
