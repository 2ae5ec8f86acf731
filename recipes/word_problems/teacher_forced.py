"""Thresholds read off gold text, and what becomes of them: the plain alternative to `collm calibrate`.

    python recipes/word_problems/teacher_forced.py CHECKPOINT --data CALIBRATION.jsonl --rates 0.05,0.1 --out DIR

On gold text the gate of every token costs one pass, and a quantile of it gives a threshold for any deferral rate. But
at decoding the pair reads its own text. `collm calibrate` therefore measures rates on the pair's own generations; this
script tells how far off the cheap threshold is: the rate it was meant for, the rate achieved, and the score.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from collm import CollaborativeLM, SamplingParams
from collm.calibration import midpoints
from collm.data.encoding import encode_examples
from collm.data.examples import Example, load_examples
from collm.data.formatting import Encoded
from collm.decoding.policies import Threshold, log_odds
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.files import write_text
from collm.types import BASE
from collm.values import Answer, Query, Reply


def answers(llm: CollaborativeLM, model: int, item: Encoded) -> list[Reply]:
    """What a model predicts at each labelled token of an example."""
    where = np.flatnonzero(item.labelled)
    query = Query.of(item.token_ids[: where[-1]], int(where[-1] - where[0] + 1), model=model)
    [found] = llm.models[model].predict([query])
    return [found[i] for i in where - where[0]]


def gold_log_odds(llm: CollaborativeLM, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Log-odds of deferring at every labelled token, to those assistants that have something to say there (-inf: none).

    A token that no assistant would write is deferred at no threshold, as in the rates that calibration measures.
    """
    own = llm.formatters[BASE]
    sets = [encode_examples(examples, f, completions_from=None if f is own else own).items for f in llm.formatters]
    values: list[float] = []
    for items in zip(*sets, strict=True):
        base, *others = (answers(llm, model, item) for model, item in enumerate(items))
        for at, prediction in enumerate(base):
            assert isinstance(prediction, Answer) and prediction.log_gate is not None
            heard = [prediction.log_gate[k] for k, other in enumerate(others, start=1) if other[at] is not None]
            values.append(log_odds((prediction.log_gate[BASE], *heard)) if heard else -np.inf)
    return np.array(values)


def threshold_for(rate: float, values: NDArray[np.float64]) -> float:
    """The threshold that the share of `values` above it comes nearest to `rate` with."""
    candidates = midpoints(values.astype(np.float32))
    if not len(candidates):
        raise CollmError("the gate has the same value at every token: nothing to choose a threshold from")
    shares = np.array([(values > candidate).mean() for candidate in candidates])
    return float(candidates[np.abs(shares - rate).argmin()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="word_problems")
    parser.add_argument("--rates", default="0.05,0.1")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the models' weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    llm = CollaborativeLM.from_pretrained(args.checkpoint, dtype=args.dtype)
    if not llm.has_gate:
        raise CollmError(f"{args.checkpoint} has no gate to read thresholds off")
    examples = load_examples(args.data)
    values = gold_log_odds(llm, examples)
    rows = []
    for rate in map(float, args.rates.split(",")):
        cut = threshold_for(rate, values)
        result = evaluate(
            llm,
            args.task,
            examples,
            SamplingParams(max_tokens=args.max_tokens),
            policy=Threshold(cut),
            batch_size=args.batch_size,
            out=args.out / f"threshold_{cut:.9g}.jsonl",
            name=f"rate {rate:g} on gold text",
            identity={"checkpoint": str(args.checkpoint), "dtype": args.dtype},
        )
        on_gold = float((values > cut).mean())
        row = {"wanted": rate, "on gold text": on_gold, "achieved": result.deferral_rate, "score": result.value}
        rows.append({**row, "log_odds": cut, "ci95": list(result.ci95)})
        print(", ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    write_text(args.out / "teacher_forced.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
