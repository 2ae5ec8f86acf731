"""The files in which evaluation sets and training mixes are published, as rows of ours.

Every reader gives rows of `collm.data.examples`: `messages` with the worked answer as last turn where there is one, and
the gold `answer` as the task of that name reads it (`collm.evaluation.shipped`). The data themselves are not shipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from collm.data.examples import parse_example
from collm.data.records import records
from collm.errors import CollmError

Row = dict[str, Any]
BIOASQ_WANTS = {
    "factoid": 'End with "####" and the name; further guesses may follow it, best first, separated by ";".',
    "list": 'End with "####" and the names, separated by ";".',
    "yesno": 'End with "####" and yes or no.',
    "summary": "Answer in a few sentences.",
}
MBPP_OPENS = "You are an expert Python programmer, and here is your task:"
MBPP_TESTS = "Your code should pass these tests:"
MBPP_PARTS = {"prompt": 10, "test": 510, "validation": 600, "train": 974}
"""The authors' parts, by the last task in each; `prompt` is for examples in a prompt."""
PUBMEDQA_WANTS = 'End with "####" and yes, no or maybe.'


def _conversation(question: str, answer: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": question.strip()}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer.strip()}]


def _gsm8k(record: Mapping[str, Any]) -> Row:
    # The annotations (`<<48/2=24>>`) would tell where to call a calculator, which is for the model to learn.
    answer = re.sub(r"<<.*?>>", "", record["answer"])
    _, marked, result = answer.rpartition("####")
    if not marked or not result.strip():
        raise TypeError('the answer does not end in "#### RESULT"')
    return {"messages": _conversation(record["question"], answer), "answer": result.strip()}


def _math(record: Mapping[str, Any]) -> Row:
    # What MATH calls type is a field of mathematics; types of ours are kinds of questions.
    names = {"answer": "answer", "level": "level", "subject": "subject", "type": "subject"}
    kept = {ours: record[theirs] for theirs, ours in names.items() if theirs in record}
    return {"messages": _conversation(record["problem"], record["solution"]), **kept}


def _pubmedqa(record: Mapping[str, Any]) -> Row:
    label = record["final_decision"]
    question = "\n".join([*record["CONTEXTS"], "", record["QUESTION"], PUBMEDQA_WANTS])
    return {"messages": _conversation(question, f"{record['LONG_ANSWER']}\n#### {label}"), "answer": label}


def _bioasq(record: Mapping[str, Any], snippets: int = 0) -> Row:
    kind = record["type"]
    wants = BIOASQ_WANTS[kind]
    ideal = record["ideal_answer"] if kind == "summary" else record.get("ideal_answer") or []
    ideals = [text.strip() for text in ([ideal] if isinstance(ideal, str) else ideal)]
    turn, answer = _bioasq_answer(kind, ideals, record)
    before = [snippet["text"].strip() for snippet in record.get("snippets", [])[:snippets]]
    question = "\n".join([*before, *([""] if before else []), record["body"].strip(), wants])
    return {"messages": _conversation(question, turn), "type": kind, "answer": answer}


def _bioasq_answer(kind: str, ideals: list[str], record: Mapping[str, Any]) -> tuple[str, Any]:
    """The worked answer and the gold one. Golds: of a factoid the synonyms of its one name, of a list several such."""
    if kind == "summary":
        return ideals[0], ideals
    exact = record["exact_answer"]
    if kind == "yesno":
        exact = exact[0] if isinstance(exact, list) else exact
        names = [exact.strip().lower()]
        gold: Any = names[0]
    else:
        exact = [exact] if isinstance(exact, str) else exact
        entries = [entry if isinstance(entry, list) else [entry] for entry in exact]
        gold = [[name for entry in entries for name in entry]] if kind == "factoid" else entries
        names = [entry[0] for entry in gold]
    return "\n".join([*ideals[:1], f"#### {'; '.join(names)}"]), gold


def _mbpp(record: Mapping[str, Any]) -> Row:
    """Of the whole set, or of its sanitised part (`prompt`, `test_imports`)."""
    task = int(record["task_id"])
    tests = [_lines(test) for test in record["test_list"]]
    wanted = _lines(record["text"] if "text" in record else record["prompt"]).strip()
    question = "\n".join([f"{MBPP_OPENS} {wanted} {MBPP_TESTS}", "", *tests])
    before = [record.get("test_setup_code") or "", *(record.get("test_imports") or [])]
    return {
        "messages": _conversation(question, f"```python\n{_lines(record['code']).strip()}\n```"),
        "answer": [*(source for source in map(_lines, before) if source.strip()), *tests],
        "part": next(name for name, last in MBPP_PARTS.items() if task <= last),
    }


def _ifeval(record: Mapping[str, Any]) -> Row:
    # The published arguments name every argument there is, with null for those that an instruction does not take.
    kwargs = [{key: value for key, value in given.items() if value is not None} for given in record["kwargs"]]
    answer = {"prompt": record["prompt"], "instruction_id_list": record["instruction_id_list"], "kwargs": kwargs}
    if not answer["instruction_id_list"] or len(kwargs) != len(answer["instruction_id_list"]):
        raise TypeError("kwargs are the arguments of each instruction")
    return {"messages": [{"role": "user", "content": record["prompt"]}], "answer": answer}


def _lines(text: str) -> str:
    """With one kind of line end; some of MBPP's have two."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _alpaca_eval(record: Mapping[str, Any]) -> Row:
    # As it is: judges find the reference answer by the instruction's exact text.
    turn = {"role": "user", "content": record["instruction"]}
    return {"messages": [turn], "dataset": record.get("dataset", "alpaca_eval")}


def _mt_bench(record: Mapping[str, Any]) -> Row:
    turns = record["turns"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise TypeError("turns are a list of texts")
    kept = {key: record[key] for key in ("question_id", "category", "turns")}
    if "required_temperature" in record:
        kept["required_temperature"] = record["required_temperature"]
    return {"messages": [{"role": "user", "content": turns[0]}], **kept}


def _tulu(record: Mapping[str, Any]) -> Row:
    source = "/".join(str(record[key]) for key in ("dataset", "id") if record.get(key) is not None)
    return {"messages": record["messages"], "source": source}


@dataclass(frozen=True)
class Format:
    """`row` makes a row of one record; `expected` says what a record looks like; `options` are those `row` takes.

    `ids`: the keys under which a record may have an id, unique within the file; without one, its number serves.
    `parts`: names of the authors' own parts, where records tell which they belong to: `row` says it as `part`.
    """

    row: Callable[..., Row]
    expected: str
    options: frozenset[str] = frozenset()
    ids: tuple[str, ...] = ("unique_id", "question_id", "id")
    parts: tuple[str, ...] = ()


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "gsm8k": Format(_gsm8k, '{"question", "answer": "... #### 12"}'),
        "math": Format(_math, '{"problem", "solution": "... \\\\boxed{12}"}'),
        "ifeval": Format(_ifeval, '{"key", "prompt", "instruction_id_list", "kwargs": [{...}]}', ids=("key", "id")),
        "mbpp": Format(
            _mbpp,
            '{"task_id", "text", "code", "test_list": ["assert ..."], "test_setup_code"}',
            ids=("task_id",),
            parts=tuple(MBPP_PARTS),
        ),
        "bioasq": Format(
            _bioasq,
            '{"questions": [{"id", "type": "factoid" | "list" | "yesno" | "summary", "body", "exact_answer", '
            '"ideal_answer", "snippets"}]}, with golden answers',
            frozenset({"snippets"}),
        ),
        "pubmedqa": Format(_pubmedqa, '{PMID: {"QUESTION", "CONTEXTS", "LONG_ANSWER", "final_decision"}}'),
        "alpaca_eval": Format(_alpaca_eval, '[{"instruction", "dataset"}]'),
        "mt_bench": Format(_mt_bench, '{"question_id", "category", "turns": [...]}'),
        "tulu": Format(_tulu, '{"messages": [{"role", "content"}]}', ids=()),
    }
)


def read_source(name: str, path: Path, **options: Any) -> Iterator[Row]:
    """Rows of a published file, each checked; ids are `NAME-` and the record's own id, or its number.

    Raises:
        CollmError: a record of another form, naming file and place; an option that the format does not have.
    """
    known = FORMATS[name]
    unknown = set(options) - known.options
    if unknown:
        raise CollmError(f"data of {name} have no {', '.join(sorted(unknown))}")
    empty = True
    for number, (where, record) in enumerate(records(path)):
        try:
            own = next((record[key] for key in known.ids if record.get(key) is not None), number)
            row = {"id": f"{name}-{own}", **known.row(record, **options)}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise CollmError(f"{where}: no record of {name} ({what}); expected {known.expected}") from None
        parse_example(row, where, default_id=str(number))
        empty = False
        yield row
    if empty:
        raise CollmError(f"{path}: there are no records; expected {known.expected}")
