"""The questions as one would put them to a model that was not trained on them: with an instruction, or examples.

python recipes/word_problems/instruct.py QUESTIONS.jsonl --style few_shot --examples TRAIN.jsonl --out OUT.jsonl
"""

import argparse
import json
from itertools import islice
from pathlib import Path

from collm.data.records import records

INSTRUCTION = "\nSolve this with one calculation, and give the number after ####."
SHOTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--style", choices=["instruction", "few_shot"], required=True)
    parser.add_argument("--examples", type=Path, help="where the few examples come from: its first ones")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shots = []
    if args.style == "few_shot":
        if args.examples is None:
            parser.error("--style few_shot needs --examples")
        shots = [turn for _, row in islice(records(args.examples), SHOTS) for turn in row["messages"]]
    out = []
    for _, row in records(args.questions):
        question, answer = row["messages"]
        if args.style == "instruction":
            question = {**question, "content": question["content"] + INSTRUCTION}
        out.append(json.dumps({**row, "messages": [*shots, question, answer]}))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(out) + "\n")


if __name__ == "__main__":
    main()
