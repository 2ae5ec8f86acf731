"""Do the price of a deferred token and the gate swing? A simulation with the scores of two real models, in a minute.

    python benchmarks/simulate_price.py [--scores recipes/qwen/scores/gsm8k] [--target 0.2] [--batch 16]

A gate of two numbers, one of them on a feature that tells a little of where the assistant is better, learns from the
kept log-probabilities of base and assistant by Adam, as in training: its log-odds move by at most `speed` a step. Where
a base is trained by LoRA that is 0.2 to 0.5 (docs/log.md). For each number of steps and speed: how far the mean gate is
from the target in the last two thirds of a run (root mean square, medians of three seeds), without the term of the
change and with it (docs/method.md, "The price").
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from collm.data.scores import load_scores
from collm.training import price as prices
from collm.training.price import Price

STEPS, SPEEDS = (48, 122, 600), (0.05, 0.2, 0.4, 1.5, 5.0)
SETTINGS = {"without": (0.9, 0.0), "with": (prices.MEMORY, prices.AHEAD)}
"""`MEMORY` and `AHEAD`."""


def swing(base: list, large: list, target: float, steps: int, speed: float, batch: int, seed: int) -> float:  # type: ignore[type-arg]
    """Root mean square of the mean gate less the target, behind the first third."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(base))
    weights = torch.tensor([-1.2, 0.5], dtype=torch.float64, requires_grad=True)
    optimizer, price = torch.optim.Adam([weights], lr=speed), Price(target, steps)
    rates = []
    for step in range(steps):
        which = [order[(step * batch + n) % len(order)] for n in range(batch)]
        p, q = (torch.tensor(np.concatenate([each[i] for i in which])).exp() for each in (base, large))
        told = 0.3 * torch.tanh(2 * (q - p)) + torch.tensor(rng.normal(size=len(p)))
        gate = torch.sigmoid(weights[0] + weights[1] * told)
        loss = -torch.log((1 - gate) * p + gate * q + 1e-9).mean() + float(price.value) * gate.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = speed * min(1.0, (step + 1) / max(1.0, 0.04 * steps)) * (1 - step / steps)
        optimizer.step()
        rates.append(float(gate.detach().mean()))
        price.step(gate.detach().mean())
    return float(np.sqrt(np.mean(np.square(np.array(rates[steps // 3 :]) - target))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--scores", type=Path, default=Path("recipes/qwen/scores/gsm8k"), help="base-train, large-train"
    )
    parser.add_argument("--target", type=float, default=0.2)
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    given = parser.parse_args()
    base, large = (
        [np.array(row, np.float64) for row in load_scores(given.scores / f"{name}-train")["log_prob"]]
        for name in ("base", "large")
    )
    print("| steps | speed | " + " | ".join(SETTINGS) + " |\n|---|---|" + "---|" * len(SETTINGS))
    for steps in STEPS:
        for speed in SPEEDS:
            found = []
            for prices.MEMORY, prices.AHEAD in SETTINGS.values():
                swings = [swing(base, large, given.target, steps, speed, given.batch, seed) for seed in range(3)]
                found.append(f"{np.median(swings):.3f}")
            print(f"| {steps} | {speed} | " + " | ".join(found) + " |", flush=True)


if __name__ == "__main__":
    main()
