"""How fast the systems of a study write, beside how good they are: what `collm eval` found, and tokens a second.

    python benchmarks/pair_speed.py runs/qwen/mbpp/gate runs/qwen/mbpp/test/{small,large,gate-gate_20}.json \
        --alone small=base --alone large=large --data data/qwen/mbpp/test.jsonl --dtype bfloat16 --batch 1 \
        --out speeds.json --plot speeds.svg

A RESULT of this pair says who writes its tokens; `--alone` tells which others are of one of its models alone. All
answer the same problems in turn, in one process with the same loaded models, and the order turns from round to round.
Nothing else may run meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from reporting import report

from collm.bench.paired import Ratio, in_turn
from collm.data.examples import Example, load_examples
from collm.evaluation.evaluate import example_seed
from collm.evaluation.shipped import get_task
from collm.evaluation.system import identity_of, settings_of
from collm.evaluation.task import Task
from collm.llm.model import CollaborativeLM
from collm.report.chart import Chart, Point, Series
from collm.report.plots import save_svg
from collm.sampling_params import SamplingParams


def asks(result: dict[str, Any]) -> dict[str, Any]:
    """What `generate_batch` is asked for one system's texts, who writes their tokens."""
    found = {name: result["settings"][f"params.{name}"] for name in ("deferral", "threshold", "deferral_rate", "task")}
    return {name: value for name, value in found.items() if value is not None}


def other_system(result: dict[str, Any], llm: CollaborativeLM, model: str | None) -> str:
    """Why a result is not of what is timed here; empty if it is."""
    there, here = result["settings"], identity_of(llm)
    # Speed may be measured in another dtype; a tool has no weights.
    weights, theirs = (
        {name: each.get("weights", each) for name, each in identity["models"].items()}
        for identity in (here, there["identity"])
    )
    if model is not None:
        if model not in weights:
            return f"the pair has no model {model!r}, only {', '.join(weights)}"
        if there["alone"] is None and len(theirs) > 1 or there["alone"] not in (None, model):
            return f"it is not of {model} alone"
        own = theirs[model] if there["alone"] else next(iter(theirs.values()))
        return "" if own == weights[model] else f"it is of other weights than the pair's {model}"
    if len(theirs) == 1:
        return f"it is of one model alone: say which with --alone NAME=MODEL ({', '.join(weights)})"
    if theirs != weights or there["identity"].get("gate") != here.get("gate"):
        return "it is of another pair: give that one, with its own results"
    decides = settings_of(llm, SamplingParams(**asks(result)), None, None)["decides"]
    return "" if decides == there["decides"] else f"it was decided by {there['decides']}, and would be by {decides}"


def writes(
    llm: CollaborativeLM,
    task: Task,
    examples: Sequence[Example],
    at_once: int,
    settings: dict[str, Any],
    alone: str | None,
    number: int,
) -> dict[str, float]:
    """Tokens a second of a round, whose problems are the next ones, and the share that assistants wrote."""
    start = number * at_once
    chosen = [examples[(start + i) % len(examples)] for i in range(at_once)]
    prompts = [task.question(example) for example in chosen]
    params = [SamplingParams(**settings, seed=example_seed(0, example.id)) for example in chosen]
    began = time.perf_counter()
    texts = llm.generate_batch(prompts, params, at_once, alone=alone)
    seconds = time.perf_counter() - began
    tokens = sum(len(text.steps) for text in texts)
    asked = sum(step.author > 0 for text in texts for step in text.steps)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "deferred": asked / tokens}


def picture(
    results: dict[str, dict[str, Any]], ways: dict[str, list[str]], speeds: dict[str, float], batch: int
) -> Chart:
    """Quality against speed, a point with its interval for each system; a pair's two ways of decoding are joined."""
    series = []
    for look, (name, result) in enumerate(results.items()):
        points = tuple(
            Point(
                speed, result["value"], tuple(result["ci95"]), f"{way}: {result['value']:.1%} at {speed:.1f} tokens/s"
            )
            for speed, way in sorted((speeds[way], way) for way in ways[name])
        )
        series.append(Series(name, points, look))
    [metric] = {result["metric"] for result in results.values()}
    title = f"{metric} against speed, {'one text' if batch == 1 else f'{batch} texts'} at a time"
    return Chart(tuple(series), title, "tokens a second", metric, x_percent=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT")
    parser.add_argument("--data", type=Path, required=True, help="the problems")
    parser.add_argument("--alone", action="append", default=[], metavar="NAME=MODEL", help="a system that is one model")
    parser.add_argument("--batch", type=int, default=1, help="texts at a time")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="quality against speed, an .svg file")
    args = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in args.results}
    alone = dict(one.split("=") for one in args.alone)
    if unknown := set(alone) - set(results):
        parser.error(f"--alone: no RESULT is named {', '.join(sorted(unknown))}")
    task = get_task(next(iter(results.values()))["task"])
    examples = load_examples(args.data)
    llm = CollaborativeLM.from_pretrained(str(args.pair), dtype=args.dtype, device=args.device)
    runs: dict[str, Callable[[int], dict[str, float]]] = {}

    ways: dict[str, list[str]] = {name: [] for name in results}

    def add(name: str, way: str, settings: dict[str, Any], model: str | None = None) -> None:
        ways[name].append(way)
        own = {"max_tokens": args.max_tokens, **settings}
        runs[way] = partial(writes, llm, task, examples, args.batch, own, model)

    for name, result in results.items():
        model = alone.get(name, result["settings"]["alone"])
        if fault := other_system(result, llm, model):
            parser.error(f"{name}: {fault}")
        if model is not None:
            add(name, name, {}, model)
        else:
            add(name, f"{name}, plain", {**asks(result), "speculative": False})
            add(name, f"{name}, speculative", {**asks(result), "speculative": True})
    measured = in_turn(runs, args.rounds)
    speed = {way: [one["tokens_per_second"] for one in each] for way, each in measured.items()}
    against = next(iter(alone), None)
    ratios = {
        f"{way} : {against}": Ratio.of([a / b for a, b in zip(speed[way], speed[against], strict=True)])
        for way in runs
        if against not in (None, way)
    }
    middle = {way: statistics.median(each) for way, each in speed.items()}
    report(
        {
            "batch": args.batch,
            "dtype": args.dtype,
            "max_tokens": args.max_tokens,
            "rounds": measured,
            "tokens_per_second": middle,
            "quality": {n: [r["value"], *r["ci95"]] for n, r in results.items()},
        },
        ratios,
        args.out,
    )
    if args.plot:
        save_svg(picture(results, ways, middle, args.batch), args.plot)


if __name__ == "__main__":
    main()
