"""Training texts of equal volume by who wrote them: the right answers of the base, of the large model, of the pair.

    python recipes/qwen/own_arms.py runs/qwen/mbpp/own/{base,large,pair}.jsonl --data data/qwen/mbpp/train.jsonl \
        --out data/qwen/mbpp-own

For each writer `WRITER-train.jsonl` and `WRITER-calibration.jsonl` (every fifth problem), as many texts for each as the
pair has, drawn by seed; `gold_pair-...` are the gold texts with the pair's behind them; `all-calibration.jsonl` holds
what each writer got right of the problems left out, which the arms are compared on.
"""

import argparse
from pathlib import Path

from collm.data.examples import Example, load_examples
from collm.report.trace import stream_traces
from collm.training.own_texts import accepted, drawn, own_examples, write_rows


def left_out(example: Example) -> bool:
    """Every fifth problem, by its number, so that no writer's texts of it are learnt from by any arm."""
    return int(example.id.split("-")[1]) % 5 == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="what `collm eval --out` wrote, named by the writer")
    parser.add_argument("--data", type=Path, required=True, help="the problems, with gold answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    gold = load_examples(args.data)
    own = {path.stem: accepted(stream_traces(path)) for path in args.traces}

    def write(name: str, found: list[Example]) -> None:
        write_rows(args.out / f"{name}.jsonl", found)
        print(f"{args.out / name}.jsonl: {len(found)} texts")

    args.out.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", False), ("calibration", True)):
        asked = [example for example in gold if left_out(example) is chosen]
        texts = {name: own_examples(asked, own[name], gold=False) for name in own}
        volume = len(texts["pair"])
        for name, found in texts.items():
            write(f"{name}-{part}", drawn(found, volume, args.seed))
        write(f"gold_pair-{part}", [*asked, *texts["pair"]])
        if chosen:
            write(f"all-{part}", [example for found in texts.values() for example in found])


if __name__ == "__main__":
    main()
