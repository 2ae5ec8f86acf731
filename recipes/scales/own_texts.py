"""A file to train with: gold texts, and behind them right answers that models have written to the same questions.

    collm eval PAIR --task TASK --data DATA.jsonl --method sampled --seed 1 --out own/1.jsonl      # and other seeds
    python recipes/scales/own_texts.py own/*.jsonl --data DATA.jsonl --out texts.jsonl

What the recipe's key `own_texts` does by itself (docs/recipes.md), for studies whose steps read such files.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

from collm.data.examples import load_examples
from collm.errors import CollmError
from collm.report.trace import stream_traces
from collm.training.own_texts import accepted, drawn, own_examples, write_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="what `collm eval --out` wrote")
    parser.add_argument("--data", type=Path, required=True, help="the questions, with gold answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-texts", type=int, metavar="N", help="at most so many of its own, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-gold", action="store_true", help="without the gold texts")
    args = parser.parse_args()
    asked = load_examples(args.data)
    texts = accepted(chain.from_iterable(map(stream_traces, args.traces)))
    own = drawn(own_examples(asked, texts, gold=not args.no_gold), args.max_texts, args.seed)
    gold = [] if args.no_gold else [example for example in asked if example.reference is not None]
    write_rows(args.out, [*gold, *own])
    print(f"{args.out}: {len(gold)} gold texts and {len(own)} of its own")


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
