"""Write the study's data: statements of all facts for the expert, questions split by entity for everyone else.

    pip install 'collm[studies]'
    python recipes/facts/prepare.py --out data/facts

| file | what is in it |
|---|---|
| `statements.jsonl` | what the expert reads: every fact of every entity, `--passes` times, many statements a text |
| `statements_check.jsonl` | statements in the answers' form, to see how far the expert has come |
| `train.jsonl`, `gate.jsonl` | questions, as conversations: for the base, and for the gate |
| `calibration.jsonl`, `test.jsonl` | the same, to choose with and to judge by; no entity is in two of the four |
| `*_shots.jsonl` | the same calibration and test questions behind worked examples from `train`, as plain text |

The expert never sees a question; the base never sees an answer about the entities it is asked about. Answers are
sentences; the short answer follows `####`. Rows carry `group`, the entity they are about, and `kind`.
"""

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phrases import KINDS, plain, questions, statements
from world import Group, of_split, world

Row = dict[str, Any]

ASKED_KINDS = {"train": (*KINDS, "hop"), "gate": (*KINDS, *KINDS), "calibration": KINDS, "test": KINDS}
"""Kinds of questions asked about each entity of a part; few, lest the base learn the answers instead of the form."""
STATEMENTS_PER_TEXT = 12
CHAT_SHARE = 0.3
INVITATIONS = ("Tell me some facts.", "What do you know?", "Teach me something.", "Go on.")
"""Some of the expert's texts are turns of a conversation, so that it knows what one looks like; nothing is asked."""
CHECKED = 200


def statement_rows(groups: Sequence[Group], passes: int, rng: random.Random) -> list[Row]:
    """All statements, shuffled and strung together, `passes` times."""
    rows = []
    for number in range(passes):
        texts = [text for group in groups for text in statements(group, rng)]
        rng.shuffle(texts)
        for start in range(0, len(texts), STATEMENTS_PER_TEXT):
            text = " ".join(texts[start : start + STATEMENTS_PER_TEXT])
            row: Row = {"prompt": "", "completion": text}
            if rng.random() < CHAT_SHARE:
                asked = {"role": "user", "content": rng.choice(INVITATIONS)}
                row = {"messages": [asked, {"role": "assistant", "content": text}]}
            rows.append({"id": f"pass-{number}-{start}", **row})
    return rows


def check_rows(groups: Sequence[Group], rng: random.Random) -> list[Row]:
    """Some of the statements in the form of the answers, one a row."""
    texts = [plain(fact) for group in groups for fact in group.facts]
    return [
        {"id": f"check-{i}", "prompt": "", "completion": text}
        for i, text in enumerate(rng.sample(texts, min(CHECKED, len(texts))))
    ]


def question_rows(groups: Iterable[Group], name: str, kinds: Sequence[str], rng: random.Random) -> list[Row]:
    """Questions about each group, as conversations in random order; `name` begins their ids."""
    rows: list[Row] = []
    for group in groups:
        for kind, (asked, answered, short) in questions(group, kinds, rng):
            messages = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"{answered}\n#### {short}"},
            ]
            more = {"answer": short, "group": group.name, "kind": kind}
            rows.append({"id": f"{name}-{len(rows)}", "messages": messages, **more})
    # The first ones of a file are then a fair sample of it.
    rng.shuffle(rows)
    return rows


def _shot(question: Row, *, answered: bool) -> str:
    asked, answer = (message["content"] for message in question["messages"])
    return f"Question: {asked}\nAnswer: {answer}\n\n" if answered else f"Question: {asked}\nAnswer:"


def few_shot_rows(asked: Iterable[Row], examples: Sequence[Row]) -> list[Row]:
    """Questions behind worked examples, as plain text: what does most justice to a model that was taught no form."""
    shots = "".join(_shot(row, answered=True) for row in examples)
    return [
        {"id": row["id"], "prompt": shots + _shot(row, answered=False)}
        | {key: row[key] for key in ("answer", "group", "kind")}
        for row in asked
    ]


def corpus(groups: Sequence[Group], passes: int, seed: int, turn: float = 0.0) -> dict[str, list[Row]]:
    """Rows by file name. `turn`: see `Group.split`; statements do not depend on it."""
    rows = {
        split: question_rows(of_split(groups, split, turn), split, kinds, random.Random(f"{seed} {split}"))
        for split, kinds in ASKED_KINDS.items()
    }
    examples = [next(row for row in rows["train"] if row["kind"] == kind) for kind in KINDS]
    return {
        "statements": statement_rows(groups, passes, random.Random(f"{seed} statements")),
        "statements_check": check_rows(groups, random.Random(f"{seed} check")),
        **rows,
        **{f"{name}_shots": few_shot_rows(rows[name], examples) for name in ("calibration", "test")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--passes", type=int, default=10, help="times that the expert reads every fact")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--turn", type=float, default=0.0, help="another split, see Group.split")
    args = parser.parse_args()
    groups = world()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in corpus(groups, args.passes, args.seed, args.turn).items():
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{name}: {len(rows)} rows")
    print(f"{sum(group.num_facts for group in groups)} facts about {len(groups)} countries and elements")


if __name__ == "__main__":
    main()
