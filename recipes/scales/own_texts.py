"""Training texts that a pair has written itself: its right answers, behind the gold ones of the same questions.

    collm eval PAIR --task TASK --data DATA.jsonl --method sampled --seed 1 --out own/1.jsonl      # and other seeds
    python recipes/scales/own_texts.py own/*.jsonl --data DATA.jsonl --out texts.jsonl

A gate that is fitted on gold texts has never seen what the pair makes of its own mistakes and ways of speaking. Where
who writes is drawn from the gate, a question is answered in several ways; those that came out right are texts like any
others to train a gate on. It still learns from no label of who is to write.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collm.data.records import records
from collm.errors import CollmError
from collm.files import write_text
from collm.report.trace import Trace, stream_traces


def right_answers(traces: Sequence[Trace]) -> dict[str, list[str]]:
    """The different texts that scored 1, by the id of their question."""
    found: dict[str, list[str]] = {}
    for trace in traces:
        text = trace.generation.text.strip()
        if trace.score == 1 and text not in found.setdefault(trace.id, []):
            found[trace.id].append(text)
    return found


def with_own_texts(gold: Sequence[dict[str, Any]], own: dict[str, list[str]]) -> list[dict[str, Any]]:
    """All gold rows, then the same questions with answers of one's own that are none of the gold ones.

    A question without a gold answer is left with its own alone.
    """
    rows = [row for row in gold if row["messages"][-1]["role"] == "assistant"]
    for row in gold:
        turns = row["messages"]
        asked, told = (turns[:-1], turns[-1]["content"]) if turns[-1]["role"] == "assistant" else (turns, None)
        for number, text in enumerate(own.get(row["id"], [])):
            if text != told:
                said = {"role": "assistant", "content": text}
                rows.append({**row, "id": f"{row['id']}-own-{number}", "messages": [*asked, said]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path, nargs="+", help="what `collm eval --out` wrote")
    parser.add_argument("--data", type=Path, required=True, help="the questions, with gold answers")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    gold = [row for _, row in records(args.data)]
    rows = with_own_texts(gold, right_answers([trace for path in args.traces for trace in stream_traces(path)]))
    write_text(args.out, "".join(json.dumps(row) + "\n" for row in rows))
    own = sum("-own-" in row["id"] for row in rows)
    print(f"{args.out}: {len(rows) - own} gold texts and {own} of its own")


if __name__ == "__main__":
    try:
        main()
    except CollmError as error:
        sys.exit(f"Error: {error}")
