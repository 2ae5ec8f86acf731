"""Training texts of equal volume by who wrote them: the right answers of the base, of the large model, of the pair.

    python recipes/qwen/own_arms.py runs/qwen/mbpp/own/{base,large,pair}.jsonl --data data/qwen/mbpp/train.jsonl \
        --out data/qwen/mbpp-own

For each writer `WRITER-train.jsonl` and `WRITER-calibration.jsonl` (every fifth problem), as many texts for each as the
pair has, drawn by seed; `gold_pair-...` are the gold texts with the pair's behind them; `all-calibration.jsonl` holds
what each writer got right of the problems left out, which the arms are compared on.
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from collm.data.records import records
from collm.files import write_text
from collm.report.trace import stream_traces

Row = dict[str, Any]


def left_out(row: Row) -> bool:
    """Every fifth problem, by its number, so that no writer's texts of it are learnt from by any arm."""
    return int(row["id"].split("-")[1]) % 5 == 0


def right(path: Path, gold: dict[str, Row]) -> list[Row]:
    """The texts that passed their tests, as rows to learn from."""
    return [
        {
            **gold[trace.id],
            "id": f"{trace.id}-{path.stem}",
            "messages": [
                *(turn for turn in gold[trace.id]["messages"] if turn["role"] != "assistant"),
                {"role": "assistant", "content": trace.generation.text.strip()},
            ],
        }
        for trace in sorted(stream_traces(path), key=lambda trace: trace.id)
        if trace.score == 1
    ]


def write(path: Path, rows: Iterable[Row]) -> None:
    rows = list(rows)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows)} texts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="what `collm eval --out` wrote, named by the writer")
    parser.add_argument("--data", type=Path, required=True, help="the problems, with gold answers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    gold = {row["id"]: row for _, row in records(args.data)}
    args.out.mkdir(parents=True, exist_ok=True)
    own = {path.stem: right(path, gold) for path in args.traces}
    for part, chosen in (("train", False), ("calibration", True)):
        of_part = {name: [row for row in rows if left_out(row) is chosen] for name, rows in own.items()}
        volume = len(of_part["pair"])
        drawn = {name: random.Random(args.seed).sample(rows, min(volume, len(rows))) for name, rows in of_part.items()}
        for name, rows in drawn.items():
            write(args.out / f"{name}-{part}.jsonl", rows)
        golden = [row for row in gold.values() if left_out(row) is chosen]
        write(args.out / f"gold_pair-{part}.jsonl", [*golden, *drawn["pair"]])
        if chosen:
            write(args.out / f"all-{part}.jsonl", [row for rows in of_part.values() for row in rows])


if __name__ == "__main__":
    main()
