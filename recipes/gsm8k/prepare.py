"""Split GSM8K's training part into train / calibration / test, without its calculator annotations.

The annotations (`<<48/2=24>>`) are stripped: where to call the calculator is for the model to learn. Problems are
assigned by a hash of their text, so a smaller `--limit` gives subsets of the same parts.

    python recipes/gsm8k/prepare.py train.jsonl --out data/gsm8k [--limit 2000]

`train.jsonl` is the official one (https://github.com/openai/grade-school-math, MIT licence); its test part stays
untouched. The output files hold `{"id", "messages": [user, assistant], "answer"}`.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

SPLITS = {"train": 0.80, "calibration": 0.08, "test": 0.12}


def split_of(question: str) -> str:
    point = int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        point -= share
        if point < 0:
            return name
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="read only the first so many problems")
    args = parser.parse_args()
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for i, line in enumerate(args.data.read_text().splitlines()[: args.limit]):
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["answer"]).strip()
        messages = [
            {"role": "user", "content": row["question"].strip()},
            {"role": "assistant", "content": answer},
        ]
        final = answer.split("####")[-1].strip()
        splits[split_of(row["question"])].append(
            json.dumps({"id": f"gsm8k-{i}", "messages": messages, "answer": final})
        )
    args.out.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)} problems")


if __name__ == "__main__":
    main()
