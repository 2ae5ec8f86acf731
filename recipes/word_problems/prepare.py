"""Split elementary word problems into train / calibration / test A / test B without leakage.

Many of the problems are near-duplicates (one template, other numbers or names), so single problems must not be
hashed: problems are first *grouped* (same text once numbers are masked, or word-Jaccard above 0.9 of the masked
texts, transitively) and whole groups are then assigned by a hash of their smallest member. Adding a problem moves
no other group; running it twice gives the same files.

    python recipes/word_problems/prepare.py DATA.jsonl --out data/word_problems

`--turn 0.33` turns the circle on which the hashes lie: the same problems in other parts. From 0.3 to 0.7 no problem of
the calibration part or of a test was in one of them before (turn 0), so that what was found by looking at those can be
judged by problems that nobody has looked at; with models trained anew, since the training part is another.

`DATA.jsonl` holds one `{"question": ..., "answer": ...}` a line. The output files hold
`{"id", "messages": [user, assistant], "answer", "group"}`; `answer` is what follows `####`, and problems of one
`group` are near-duplicates, which intervals and tests of an evaluation take into account.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path

from collm.data.prepare import part_of
from collm.data.records import records
from collm.errors import CollmError
from collm.files import write_text

# Shares of groups. Test B is kept for a later study and is opened by nothing in this folder.
SPLITS = {"train": 0.70, "calibration": 0.08, "test_a": 0.11, "test_b": 0.11}
JACCARD = 0.9


def masked_words(question: str) -> frozenset[str]:
    """The set of lower-case words with every number replaced by `0`."""
    return frozenset(re.findall(r"[a-z0]+", re.sub(r"\d+(?:[.,]\d+)*", "0", question.lower())))


def groups(questions: list[str]) -> list[list[int]]:
    """Indices of near-duplicate questions, grouped transitively (union-find)."""
    parent = list(range(len(questions)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[frozenset[str], int] = {}
    for i, question in enumerate(questions):
        parent[find(i)] = find(first.setdefault(masked_words(question), i))
    # Only distinct word sets are compared, and only those whose sizes allow a Jaccard index above the limit.
    by_size: dict[int, list[frozenset[str]]] = collections.defaultdict(list)
    for words in first:
        by_size[len(words)].append(words)
    for size, members in by_size.items():
        for words in members:
            for other_size in range(size, int(size / JACCARD) + 1):
                for other in by_size.get(other_size, ()):
                    common = len(words & other)
                    if common > JACCARD * (size + other_size - common):
                        parent[find(first[words])] = find(first[other])
    members_of: dict[int, list[int]] = collections.defaultdict(list)
    for i in range(len(questions)):
        members_of[find(i)].append(i)
    return list(members_of.values())


def split_of(group: list[str], turn: float = 0.0) -> str:
    """The split of a group: that of its smallest text."""
    return part_of(min(group), SPLITS, turn)


def read_problems(path: Path) -> list[dict[str, str]]:
    """The problems of a file.

    Raises:
        CollmError: unreadable, empty, or a line without question and worked answer.
    """
    found = []
    for where, record in records(path):
        if not isinstance(record, dict) or not all(isinstance(record.get(key), str) for key in ("question", "answer")):
            raise CollmError(f'{where}: wants {{"question": "...", "answer": "... #### 12"}}')
        found.append(record)
    if not found:
        raise CollmError(f"{path} holds no problems")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turn", type=float, default=0.0, help="share of the circle; default: %(default)s")
    args = parser.parse_args()
    rows = read_problems(args.data)
    found = groups([row["question"] for row in rows])
    splits: dict[str, list[int]] = {name: [] for name in SPLITS}
    for group in found:
        splits[split_of([rows[i]["question"] for i in group], args.turn)].extend(group)
    name_of = {i: f"wp-{min(group)}" for group in found for i in group}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, indices in splits.items():
        lines = [
            json.dumps(
                {
                    "id": f"wp-{i}",
                    "messages": [
                        {"role": "user", "content": rows[i]["question"].strip()},
                        {"role": "assistant", "content": rows[i]["answer"].strip()},
                    ],
                    "answer": rows[i]["answer"].split("####")[-1].strip(),
                    "group": name_of[i],
                }
            )
            for i in sorted(indices)
        ]
        write_text(args.out / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))
        print(f"{name}: {len(lines)} problems")
    sizes = sorted(map(len, found), reverse=True)
    print(f"{len(rows)} problems in {len(sizes)} groups; the largest: {sizes[:8]}")


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
