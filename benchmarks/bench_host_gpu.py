"""What the host adds to the passes of a GPU, without one: scheduler, flows, caches, plans and answers are the real
ones, graphs cost nothing and count for as long as they were measured to take on a card.

    python benchmarks/bench_host_gpu.py --against 1e14534 --json host.json

Base and assistant of `--shape gpu`, three of ten tokens deferred at random, texts of 256 tokens. For each case: the
host's microseconds a token (time of its thread, median of some processes; of this checkout and of another commit in
turn), calls of functions a token (which no load changes), and what follows: the time of the clock over that of the
graphs, and the speed over that of the assistant alone. Where the card idles is told by the graphs before and behind:
the median of these times, and their share of the clock's.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from time import thread_time
from typing import Any

from commits import environment, sources

HERE = Path(__file__).resolve().parent
CASES = [(how, batch) for batch in (1, 16) for how in ("alone", "base", "plain", "speculative")]
TOKENS, RATE, AGREEMENT, V, SEEDS = 256, 0.3, 0.94, 300, 8


def measured(card: str) -> list[Callable[[int], float]]:
    """Seconds of a graph by its tokens, of base and assistant: between the measured ones, a line."""
    figures = json.loads((HERE / "kept" / f"gpu-{card}.json").read_text())["figures"]

    def curve(name: str) -> Callable[[int], float]:
        start = f"pass_ms.{name}.T"
        points = sorted((int(key[len(start) :]), value["replay"] / 1e3) for key, value in figures.items()
                        if key.startswith(start))  # fmt: skip

        def seconds(tokens: int) -> float:
            last = next((n for n, (at, _) in enumerate(points) if tokens <= at), len(points) - 1)
            (low, below), (high, above) = points[max(0, last - 1)], points[max(1, last)]
            return max(below + (tokens - low) * (above - below) / (high - low), points[0][1])

        return seconds

    return [curve("base"), curve("assistant")]


NAMES = "base", "assistant"


class Clock:
    """Time of this thread, and that of the graphs, which run beside it until somebody waits. `gaps`: seconds between
    two graphs, by whose they are."""

    def __init__(self) -> None:
        self.graphs = self._waited = self._until = self._free = 0.0
        self.gaps: dict[str, list[float]] = defaultdict(list)
        self._last: str | None = None
        self._began = thread_time()

    @property
    def host(self) -> float:
        return thread_time() - self._began - self._free

    def __call__(self) -> float:
        return self.host + self._waited

    def replay(self, seconds: float, began: float, whose: str | None = None) -> None:
        """A graph begins; what its stand-in has computed since `began` counts for nothing. `whose`: None for what runs
        without a graph."""
        self._free += thread_time() - began
        self.graphs += seconds
        now = self()
        if self._last is not None and whose is not None:
            self.gaps[f"{self._last} to {whose}"].append(max(0.0, now - self._until))
        self._last, self._until = whose, max(self._until, now) + seconds

    def wait(self) -> None:
        self._waited += max(0.0, self._until - self())


def stand_in(models: Sequence[Any], curves: Sequence[Callable[[int], float]], clock: list[Clock]) -> None:
    """Graphs that write tokens at once; the assistant's are the base's but for a few."""
    import numpy as np

    from collm.models.paged.plan import HEAD, IDS, LINES, POSITIONS

    for number, (model, seconds) in enumerate(zip(models, curves, strict=True)):
        stepper, cache = model.graphs
        cache.open()
        graphs = getattr(stepper, "_graphs", stepper)  # earlier commits have one class for both
        made = "_made" if graphs is not stepper else "_captured"
        captured = getattr(graphs, made)

        def with_replay(
            size: int, *how: Any, number: int = number, seconds: Any = seconds, captured: Any = captured
        ) -> Any:
            bucket = captured(size, *how)
            lines, out = bucket.into[HEAD:].reshape(LINES, -1), bucket.out

            def replay() -> None:
                began = thread_time()
                mixed = (lines[IDS].astype(np.int64) * 7919 + lines[POSITIONS] * 104729) % 65521
                token = mixed % V
                if number:
                    token = np.where(mixed * 31 % 1000 >= 1000 * AGREEMENT, (token + 1) % V, token)
                out[:, 0] = out[:, 4] = token
                out[:, 3] = 0
                clock[0].replay(seconds(size), began, NAMES[number])

            bucket.replay = replay
            return bucket

        setattr(graphs, made, with_replay)
        stepper._capture.wait = lambda: clock[0].wait()
        (stepper._forget if graphs is stepper else graphs.forget)()
        model.warm_up()
        assert stepper.buckets, "a pass without a graph costs the host far more than it does on a GPU"
        fewest = (1, *(size + 1 for size in stepper.buckets))
        model._pass_curve = [
            (tokens, seconds(size))
            for size, first in zip(stepper.buckets, fewest, strict=False)
            for tokens in sorted({first, size})
        ]


def write(
    models: Sequence[Any],
    curves: Sequence[Callable[[int], float]],
    how: str,
    batch: int,
    seed: int,
    experience: Any,
    clock: Clock,
) -> Any:
    """Texts from their first token to their last; what was learnt of the models."""
    from collm.decoding.collaborative import collaborative, single
    from collm.decoding.pace import AdaptivePace
    from collm.decoding.policies import Random
    from collm.decoding.speculative import speculative
    from collm.engine.passes import run_pass
    from collm.engine.running import Finished
    from collm.engine.scheduler import Scheduler
    from collm.sampling_params import SamplingParams
    from collm.views import Text

    # Earlier commits know less.
    own: dict[str, Any] = {"during": nullcontext()} if "during" in signature(Scheduler).parameters else {}
    scheduler = Scheduler(
        models, max_num_seqs=batch, clock=clock, post=lambda call: call(), experience=experience, **own
    )
    ended: list[Finished] = []
    eos = (frozenset[int](), frozenset[int]())
    for n in range(batch):
        rng = random.Random(f"{seed} {n}")
        prompt = [rng.randrange(V) for _ in range(64)]
        text, params = Text([prompt, prompt]), SamplingParams(max_tokens=TOKENS, seed=1000 * seed + n)
        if how in ("alone", "base"):
            flow = single(int(how == "alone"), text, params, eos)
        elif how == "plain":
            flow = collaborative(text, params, Random(RATE, 1), eos)
        else:
            flow = speculative(text, params, Random(RATE, 1), eos, AdaptivePace(scheduler.experience))
        scheduler.submit(
            n, flow, text, TOKENS, lambda event: ended.append(event) if isinstance(event, Finished) else None
        )
    scheduler.admit()
    while len(ended) < batch:
        found = scheduler.next_pass("cpu")
        assert found is not None
        began, graphs, computed = clock(), clock.graphs, thread_time()
        replies = run_pass(models, found)
        if clock.graphs == graphs:  # prompts are read without a graph
            clock.replay(curves[found.model](found.tokens), computed)
            clock.wait()
        scheduler.finish("cpu", found, replies, clock() - began)
        scheduler.admit()
    assert all(each.error is None for each in ended)
    return scheduler.experience


def measure(batches: Sequence[int], card: str = "h100") -> dict[str, dict[str, float]]:
    import torch

    import collm  # the one that is measured, before `gpu` looks for it beside itself

    assert collm.__file__ is not None
    import gpu

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = gpu.Bench(Path(folder), "cpu", "tiny", 1000)
        bench.note = lambda key, value: None
        gpu.build(bench)
        models = [gpu.loaded(bench, name) for name in ("base", "assistant")]
    clock, curves = [Clock()], measured(card)
    stand_in(models, curves, clock)
    rows: dict[str, dict[str, float]] = {}
    for how, batch in CASES:
        if batch not in batches:
            continue
        experience, found, gaps = None, [], defaultdict[str, list[float]](list)
        for seed in range(SEEDS):
            for model in models:
                gpu.card.emptied(model)
            gc.collect()  # a fifth of a second, which would fall to some set by chance
            clock[0] = Clock()
            learnt = write(models, curves, how, batch, seed, experience, clock[0])
            experience = learnt if how == "speculative" else None
            found.append((clock[0](), clock[0].host, clock[0].graphs))
            for which, seconds in clock[0].gaps.items() if seed else ():
                gaps[which] += seconds
        # The first one teaches the pace what to expect. Texts that draft differ by a quarter from seed to seed.
        wall, host, graphs = (sum(values) / (SEEDS - 1) for values in zip(*found[1:], strict=True))
        profile = cProfile.Profile(thread_time)
        clock[0] = Clock()
        profile.enable()
        write(models, curves, how, batch, 4, experience, clock[0])
        profile.disable()
        calls = sum(entry.callcount for entry in profile.getstats())
        tokens = batch * TOKENS
        row = {"host_us": 1e6 * host / tokens, "calls": calls / tokens, "wall_over_graphs": wall / graphs,
               "tok_s": tokens / wall}  # fmt: skip
        for which, each in sorted(gaps.items()):
            row[f"us {which}"] = 1e6 * statistics.median(each)
            row[f"% {which}"] = 100 * sum(each) / (wall * (SEEDS - 1))
        row["over_alone"] = row["tok_s"] / rows.get(f"alone b{batch}", row)["tok_s"]
        rows[f"{how} b{batch}"] = row
    return rows


def in_process(source: Path, batches: Sequence[int], card: str) -> dict[str, dict[str, float]]:
    command = [sys.executable, __file__, "--measure", "--card", card, "--batches", *map(str, batches)]
    out = subprocess.run(command, env=environment(source), capture_output=True, text=True, check=True)
    found: dict[str, dict[str, float]] = json.loads(out.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT", help="measure this commit, too, in turn")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of processes (5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="texts at a time (1 16)")
    parser.add_argument("--card", default="h100", choices=("h100", "h200"), help="whose graphs these are (h100)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.batches, options.card)))
        return
    with sources(options.against) as folders:
        rounds = [
            [in_process(source, options.batches, options.card) for source in folders] for _ in range(options.rounds)
        ]
    rows = {}
    for case in rounds[0][0]:
        told = []
        for which in range(len(folders)):
            each = {key: [found[which][case][key] for found in rounds] for key in rounds[0][0][case]}
            told.append({key: (statistics.median(values), min(values), max(values)) for key, values in each.items()})
        rows[case] = told
        for name, own in zip(("here", "before"), told, strict=False):
            host, calls, over, alone = (own[key] for key in ("host_us", "calls", "wall_over_graphs", "over_alone"))
            print(f"{case:16} {name:6}: host {host[0]:5.1f} us a token ({host[1]:.1f} to {host[2]:.1f}), "
                  f"{calls[0]:5.1f} calls; wall : graphs {over[0]:.3f}; {alone[0]:.2f} x alone")  # fmt: skip
            for which in sorted(key.removeprefix("us ") for key in own if key.startswith("us ")):
                median, share = own[f"us {which}"], own[f"% {which}"]
                print(f"{'':24}{which}: {median[0]:.0f} us ({median[1]:.0f} to {median[2]:.0f}), {share[0]:.2f} %")
    if options.json:
        options.json.write_text(
            json.dumps(
                {"against": options.against, "card": options.card, "rounds": options.rounds, "rows": rows}, indent=1
            )
        )


if __name__ == "__main__":
    main()
