"""What decoding together costs, of this checkout and of another commit, in turn: seconds of whole calls.

    python benchmarks/bench_together.py --against f3d9da1 --json together.json

Each commit has a process of its own, which builds the same pair (`collm bench`'s synthetic one) and keeps its systems;
both write the same texts, one after the other, round by round. Who defers where depends on seed and position alone,
as no commit's noise does. Told is the ratio of the seconds, pair by pair, as the median with a 95 % interval; the first
round warms up. Seconds are those of the process (one thread computes), which a busy machine disturbs less; `--wall`
takes those of the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commits import environment, sources

CASES = [
    ("base alone", 1, 64),
    ("plain", 1, 64),
    ("speculative", 1, 64),
    ("base alone", 16, 64),
    ("plain", 16, 64),
    ("speculative", 16, 64),
    ("plain", 1, 1024),
    ("speculative", 1, 1024),
]
"""What is written, how many texts, tokens of their prompts."""


@dataclass(frozen=True)
class ByPlace:
    """Defers a share of all places, the same ones in every commit."""

    rate: float
    needs_gate: bool = False

    def decide(self, base: Any, draw: Any, position: int) -> Any:
        from collm.decoding.policies import Decision

        key = f"{getattr(draw, 'seed', draw)} {position}"
        share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) / 2**32
        return Decision((1, 0) if share < self.rate else (0,))


def work(options: argparse.Namespace) -> None:
    """Answer lines `[case, round]` with the seconds of a call, and a digest of what it wrote."""
    import time
    from dataclasses import replace

    import torch

    from collm.bench.pairs import synthetic
    from collm.bench.systems import spelt
    from collm.sampling_params import SamplingParams

    torch.set_num_threads(1)
    now = time.perf_counter if options.wall else time.process_time
    pair = synthetic(options.shape, options.cost_ratio, options.agreement)
    systems = [pair.system() for _ in CASES]
    for line in sys.stdin:
        case, number = json.loads(line)
        what, batch, context = CASES[case]
        prompts = [spelt(ids) for ids in pair.prompts(batch, context, number)]
        params = SamplingParams(max_tokens=options.tokens, deferral="never", speculative=what == "speculative")
        each = [replace(params, seed=1000 * number + row) for row in range(batch)]
        how: dict[str, Any] = {"alone": 0} if what == "base alone" else {"policy": ByPlace(options.rate)}
        began = now()
        written = systems[case].generate_batch(prompts, each, batch, **how)
        seconds = now() - began
        digest = hashlib.blake2b(repr([g.token_ids for g in written]).encode(), digest_size=8).hexdigest()
        print(json.dumps([seconds, digest]), flush=True)


class Worker:
    def __init__(self, source: Path, given: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", *given],
            env=environment(source),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, case: int, number: int) -> tuple[float, str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([case, number]) + "\n")
        self.process.stdin.flush()
        seconds, digest = json.loads(self.process.stdout.readline())
        return seconds, digest


def interval(ratios: list[float], middle: Callable[[list[float]], float] = statistics.median) -> tuple[float, float]:
    rng = random.Random(0)
    drawn = sorted(middle(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return drawn[50], drawn[-51]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", default="f3d9da1")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--shape", default="small")
    parser.add_argument("--cost-ratio", type=float, default=8.0)
    parser.add_argument("--agreement", type=float, default=0.9)
    parser.add_argument("--rate", type=float, default=0.3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
        return
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in ("tokens", "shape", "cost_ratio")]
    given += [f"--agreement={options.agreement}", f"--rate={options.rate}"]
    given += ["--wall"] if options.wall else []
    with sources(options.against) as folders:
        rows = measured([Worker(source, given) for source in folders], options)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": str(options.json), "rows": rows}, indent=1))


def measured(workers: list[Worker], options: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[list[tuple[float, float]]] = [[] for _ in CASES]
    same = [0] * len(CASES)
    for number in range(options.rounds + 1):
        for case in range(len(CASES)):
            order = (0, 1) if number % 2 else (1, 0)
            told = {n: workers[n].run(case, number) for n in order}
            same[case] += told[0][1] == told[1][1]
            if number:
                found[case].append((told[0][0], told[1][0]))
    rows = []
    for (what, batch, context), pairs, equal in zip(CASES, found, same, strict=True):
        ratios = [own / other for own, other in pairs]
        low, high = interval(ratios)
        ms = 1000 * statistics.median(own for own, _ in pairs) / (batch * options.tokens)
        rows.append(
            {"what": what, "batch": batch, "context": context, "ratio": statistics.median(ratios), "low": low}
            | {"high": high, "ms_a_token": ms, "same_texts": equal, "rounds": len(pairs)}
        )
        print(
            f"{what}, batch {batch}, context {context}: {statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] of the "
            f"time before, {ms:.1f} ms a token; {equal} of {options.rounds + 1} rounds with the same texts",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    main()
