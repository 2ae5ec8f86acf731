"""Published formats as rows of ours: records of the same shape, written for these tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from collm.cli import main
from collm.data.examples import load_examples
from collm.data.prepare import part_of, prepare
from collm.data.sources import FORMATS, read_source
from collm.errors import CollmError
from collm.evaluation.shipped import get_task

GSM8K = [
    {"question": "Ida has 3 pens and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7 pens\n#### 7"},
    {
        "question": "A ship carries 1200 crates.\nHow many on 2 ships?",
        "answer": "1200 * 2 = <<1200*2=2400>>2,400\n#### 2,400",
    },
]
MATH = [
    {"problem": "Halve $1$.", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"},
    {"problem": "Double $3$.", "solution": r"So $\boxed{6}$.", "level": "Level 2", "type": "Number Theory"},
]
BIOASQ: dict[str, Any] = {
    "questions": [
        {
            "id": "f1",
            "type": "factoid",
            "body": "Which gene is called the guardian of the genome?",
            "exact_answer": [["TP53", "p53"]],
            "ideal_answer": ["TP53 guards the genome."],
            "snippets": [{"text": "First snippet."}, {"text": "Second snippet."}],
        },
        {
            "id": "f2",
            "type": "factoid",
            "body": "Which vitamin?",
            "exact_answer": ["D", "vitamin D"],
            "ideal_answer": "D.",
        },
        {
            "id": "l1",
            "type": "list",
            "body": "Which genes?",
            "exact_answer": [["BRCA1"], ["TP53", "p53"]],
            "ideal_answer": [],
        },
        {"id": "y1", "type": "yesno", "body": "Is water wet?", "exact_answer": "Yes", "ideal_answer": ["It is."]},
        {"id": "s1", "type": "summary", "body": "What is TP53?", "ideal_answer": ["A gene.", "A guardian."]},
    ]
}
PUBMEDQA = {
    str(100 + i): {
        "QUESTION": f"Does drug {i} help?",
        "CONTEXTS": ["We gave it.", "They got well."],
        "LABELS": ["METHODS", "RESULTS"],
        "LONG_ANSWER": "It seems so.",
        "final_decision": label,
    }
    for i, label in enumerate(["yes", "no", "maybe", "yes"])
}
ALPACA_EVAL = [{"instruction": "Name a river. ", "output": "The Elbe", "generator": "x", "dataset": "helpful_base"}]
MT_BENCH = [{"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now shorter."]}]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.\r\n",
        "code": f"def add(x):\r\n\treturn x + {number}\r\n",
        "test_setup_code": "one = 1\r\ntwo = 2" if number == 974 else "",
        "test_list": [f"assert add(1) == {number + 1}", f"assert add(0) == {number}"],
        "challenge_test_list": [],
    }
    for number in (1, 10, 11, 510, 511, 600, 601, 974)
]
IFEVAL = [
    {
        "key": 1000,
        "prompt": "Name a river, no commas. ",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "at least", "keywords": None}],
    }
]
TULU = [
    {
        "dataset": "flan",
        "id": "a.0",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    },
    {
        "dataset": "flan",
        "id": "a.0",
        "messages": [{"role": "user", "content": "Ha"}, {"role": "assistant", "content": "He"}],
    },
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A file of each format, as it is published."""
    (tmp_path / "bioasq.json").write_text(json.dumps(BIOASQ))
    (tmp_path / "ori_pqal.json").write_text(json.dumps(PUBMEDQA))
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(ALPACA_EVAL))
    for number, row in enumerate(MATH):
        folder = tmp_path / "MATH" / row["type"].lower()
        folder.mkdir(parents=True)
        (folder / f"{number}.json").write_text(json.dumps(row))
    return {
        "gsm8k": lines(tmp_path / "gsm8k.jsonl", GSM8K),
        "math": tmp_path / "MATH",
        "bioasq": tmp_path / "bioasq.json",
        "pubmedqa": tmp_path / "ori_pqal.json",
        "mbpp": lines(tmp_path / "mbpp.jsonl", MBPP),
        "ifeval": lines(tmp_path / "ifeval.jsonl", IFEVAL),
        "alpaca_eval": tmp_path / "alpaca_eval.json",
        "mt_bench": lines(tmp_path / "question.jsonl", MT_BENCH),
        "tulu": lines(tmp_path / "tulu.jsonl", TULU),
    }


def collm(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_makes_rows_that_load(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    result = collm("prepare", name, files[name], "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    part = "train" if FORMATS[name].parts else "all"
    examples = load_examples(tmp_path / "out" / f"{part}.jsonl")
    assert f"{part}.jsonl: {len(examples)} rows" in result.stdout.replace("\n", "")
    assert all(example.id.startswith(f"{name}-") and example.messages for example in examples)


def test_gsm8k_loses_its_annotations(files: dict[str, Path]) -> None:
    first, second = read_source("gsm8k", files["gsm8k"])
    assert first["messages"][1]["content"] == "3 + 4 = 7 pens\n#### 7" and first["answer"] == "7"
    assert second["answer"] == "2,400" and second["id"] == "gsm8k-1"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gsm8k", "gsm8k"),
        ("gsm8k", "gsm8k_8shot"),
        ("math", "math"),
        ("pubmedqa", "pubmedqa"),
        ("bioasq", "bioasq_factoid"),
        ("bioasq", "bioasq_list"),
        ("bioasq", "bioasq_yesno"),
        ("bioasq", "bioasq_summary"),
    ],
)
def test_the_worked_answer_scores_1_in_the_task_of_the_format(
    name: str, task: str, files: dict[str, Path], tmp_path: Path
) -> None:
    written = prepare(name, files[name], tmp_path / "out", {"all": 1})
    folder = tmp_path / "out" / task.removeprefix("bioasq_") if name == "bioasq" else tmp_path / "out"
    examples = load_examples(folder / "all.jsonl")
    assert written[folder / "all.jsonl"] == len(examples)
    for example in examples:
        found = get_task(task)
        assert found.score(example.reference or "", found.gold(example)) == 1.0
        assert found.score("", found.gold(example)) == 0.0


def test_bioasq_reads_both_spellings_of_answers_and_puts_snippets_first(files: dict[str, Path]) -> None:
    rows = {row["id"]: row for row in read_source("bioasq", files["bioasq"], snippets=1)}
    assert rows["bioasq-f1"]["answer"] == [["TP53", "p53"]] and rows["bioasq-f2"]["answer"] == [["D", "vitamin D"]]
    assert rows["bioasq-f1"]["messages"][1]["content"] == "TP53 guards the genome.\n#### TP53"
    assert rows["bioasq-l1"]["messages"][1]["content"] == "#### BRCA1; TP53"
    assert rows["bioasq-y1"]["answer"] == "yes" and rows["bioasq-s1"]["answer"] == ["A gene.", "A guardian."]
    asked = rows["bioasq-f1"]["messages"][0]["content"]
    assert asked.startswith("First snippet.\n\nWhich gene") and "Second" not in asked
    closed = next(read_source("bioasq", files["bioasq"]))["messages"][0]["content"]
    assert closed.startswith("Which gene")


def test_instructions_and_turns_stay_as_they_are(files: dict[str, Path]) -> None:
    """Judges find the reference by the instruction's exact text."""
    [row] = read_source("alpaca_eval", files["alpaca_eval"])
    assert row["messages"] == [{"role": "user", "content": "Name a river. "}] and row["dataset"] == "helpful_base"
    [row] = read_source("mt_bench", files["mt_bench"])
    assert row["turns"] == MT_BENCH[0]["turns"] and row["category"] == "writing" and row["id"] == "mt_bench-81"


def test_ifeval_keeps_prompts_and_the_arguments_that_are_given(files: dict[str, Path]) -> None:
    [row] = read_source("ifeval", files["ifeval"])
    assert row["id"] == "ifeval-1000" and row["messages"] == [{"role": "user", "content": "Name a river, no commas. "}]
    assert row["answer"]["kwargs"] == [{}, {"num_words": 3, "relation": "at least"}]
    assert row["answer"]["prompt"] == "Name a river, no commas. "


def test_mbpp_has_its_authors_parts_and_one_kind_of_line_end(files: dict[str, Path], tmp_path: Path) -> None:
    assert collm("prepare", "mbpp", files["mbpp"], "--out", tmp_path / "out").exit_code == 0
    parts = {path.stem: load_examples(path) for path in (tmp_path / "out").glob("*.jsonl")}
    assert {part: [example.id for example in examples] for part, examples in parts.items()} == {
        "prompt": ["mbpp-1", "mbpp-10"],
        "test": ["mbpp-11", "mbpp-510"],
        "validation": ["mbpp-511", "mbpp-600"],
        "train": ["mbpp-601", "mbpp-974"],
    }
    last = parts["train"][1]
    assert last.reference == "```python\ndef add(x):\n\treturn x + 974\n```"
    assert last.fields["answer"] == ["one = 1\ntwo = 2", "assert add(1) == 975", "assert add(0) == 974"]
    assert last.question == [
        {
            "role": "user",
            "content": "You are an expert Python programmer, and here is your task: Write a function to add 974. "
            "Your code should pass these tests:\n\nassert add(1) == 975\nassert add(0) == 974",
        }
    ]
    assert "part" not in last.fields


@pytest.mark.parametrize("options", [["--parts", "train=0.9,test=0.1"], ["--parts", "all"]])
def test_authors_parts_are_not_shared_out_anew(options: list[str], files: dict[str, Path], tmp_path: Path) -> None:
    result = collm("prepare", "mbpp", files["mbpp"], "--out", tmp_path / "out", *options)
    assert result.exit_code == 1 and "parts of its authors' own (prompt, test, validation, train)" in result.output
    assert not (tmp_path / "out").exists()


def test_the_sanitised_part_of_mbpp_reads_as_the_whole(tmp_path: Path) -> None:
    record = {
        "task_id": 601,
        "prompt": "Add.",
        "code": "x = 1",
        "test_imports": ["import math"],
        "test_list": ["assert x"],
    }
    (tmp_path / "sanitized.json").write_text(json.dumps([record]))
    [row] = read_source("mbpp", tmp_path / "sanitized.json")
    assert row["answer"] == ["import math", "assert x"] and "task: Add. Your code" in row["messages"][0]["content"]


def test_parquet_and_lists_read_like_lines(files: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(GSM8K), tmp_path / "g.parquet")
    (tmp_path / "g.json").write_text(json.dumps(GSM8K))
    wanted = list(read_source("gsm8k", files["gsm8k"]))
    assert (
        list(read_source("gsm8k", tmp_path / "g.parquet")) == wanted == list(read_source("gsm8k", tmp_path / "g.json"))
    )
    assert list(read_source("gsm8k", lines(tmp_path / "lines.json", GSM8K))) == wanted


# ---- parts


def test_one_object_may_be_the_only_record(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_bytes(b"\xef\xbb\xbf" + gsm8k_line("One").replace("\n", "\r\n").encode())
    prepare("gsm8k", source, tmp_path / "out", {"test": 1.0})
    assert len(load_examples(tmp_path / "out" / "test.jsonl")) == 1


def test_parts_go_by_the_question_alone(tmp_path: Path) -> None:
    rows = [{"question": f"How many are {i}?", "answer": f"#### {i}"} for i in range(200)]
    parts = {"train": 0.7, "calibration": 0.3}
    counts = prepare("gsm8k", lines(tmp_path / "a.jsonl", rows), tmp_path / "a", parts)
    assert sum(counts.values()) == 200 and 120 <= counts[tmp_path / "a" / "train.jsonl"] <= 160
    prepare("gsm8k", lines(tmp_path / "b.jsonl", rows[::-1] + rows[:5]), tmp_path / "b", parts)

    def asked(folder: str, part: str) -> set[str]:
        return {str(e.question[0]["content"]) for e in load_examples(tmp_path / folder / f"{part}.jsonl")}  # type: ignore[index]

    assert asked("a", "train") == asked("b", "train") and not asked("b", "train") & asked("b", "calibration")
    assert all(part_of(question, parts) == "train" for question in asked("a", "train"))


def test_a_validation_part_from_the_test_part_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    prepare("gsm8k", files["gsm8k"], tmp_path / "d", {"test": 1})
    with pytest.raises(CollmError, match=r"'0' stands in .*test\.jsonl as well"):
        prepare("gsm8k", files["gsm8k"], tmp_path / "d", {"validation": 1})
    assert not (tmp_path / "d" / "validation.jsonl").exists()
    prepare("gsm8k", files["gsm8k"], tmp_path / "d", {"test": 1})  # the same part may be made anew


def test_a_line_ends_at_its_end_alone(tmp_path: Path) -> None:
    """Published questions hold other characters that end lines of text, such as U+2028."""
    first, second = ({"question": f"{word}\u2028pens?", "answer": "#### 7"} for word in ("Ida's", "Ada's"))
    assert collm("prepare", "gsm8k", lines(tmp_path / "1.jsonl", [first]), "--out", tmp_path / "o").exit_code == 0
    more = ["prepare", "gsm8k", lines(tmp_path / "2.jsonl", [second]), "--out", tmp_path / "o", "--parts"]
    assert collm(*more, "train").exit_code == 0
    result = collm("prepare", "gsm8k", tmp_path / "1.jsonl", "--out", tmp_path / "o", "--parts", "calibration")
    assert result.exit_code == 1 and "stands in" in result.stderr


def test_the_official_test_part_is_kept_apart(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "test_ground_truth.json").write_text(json.dumps({"101": "no", "103": "yes"}))
    arguments = ["prepare", "pubmedqa", files["pubmedqa"], "--out", tmp_path / "d"]
    result = collm(*arguments, "--parts", "train=0.5,validation=0.5", "--test-ids", tmp_path / "test_ground_truth.json")
    assert result.exit_code == 0, result.output
    assert [e.id for e in load_examples(tmp_path / "d" / "test.jsonl")] == ["pubmedqa-101", "pubmedqa-103"]
    (tmp_path / "others.json").write_text('["999"]')
    arguments[-1] = tmp_path / "e"
    result = collm(*arguments, "--test-ids", tmp_path / "others.json")
    assert result.exit_code == 1 and "999" in result.stderr
    result = collm(*arguments, "--parts", "test", "--test-ids", tmp_path / "others.json")
    assert result.exit_code == 1 and '"test"' in result.stderr
    files["pubmedqa"].write_text(json.dumps({**PUBMEDQA, "200": PUBMEDQA["101"]}))
    result = collm(*arguments, "--test-ids", tmp_path / "test_ground_truth.json")
    assert result.exit_code == 1 and "'200' stands in" in result.stderr
    assert not (tmp_path / "e" / "all.jsonl").exists()


# ---- bad input


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gsm8k", '{"question": "q"}\n', ["line 1", "no field 'answer'", '{"question"']),
        ("gsm8k", '{"question": "q", "answer": "#### 1"}\n{"question": \n', ["line 2", "not JSON"]),
        ("bioasq", '{"questions": [', ["data.json", "not JSON"]),
        ("bioasq", "[1]", ["entry 0"]),
        ("bioasq", "3", ["cannot be read"]),
        ("gsm8k", "", ["no records", '{"question"']),
        ("gsm8k", "[1, 2]\n", ["line 1", "no record of gsm8k"]),
        ("gsm8k", '{"question": "?", "answer": "12"}', ["line 1", "#### RESULT"]),
        ("gsm8k", '{"question": "?", "answer": "12 ####"}', ["line 1", "#### RESULT"]),
        ("bioasq", '{"questions": [{"id": 1, "type": "riddle", "body": "?"}]}', ["entry 0", "riddle"]),
        ("bioasq", '{"questions": [{"type": "factoid", "body": "?"}]}', ["exact_answer", "golden"]),
        ("bioasq", '{"questions": [{"type": "list", "body": "?", "exact_answer": [[]]}]}', ["entry 0", "expected"]),
        ("pubmedqa", '{"1": {"QUESTION": "?", "CONTEXTS": []}}', ["final_decision"]),
        ("ifeval", '{"prompt": "p", "instruction_id_list": ["a"], "kwargs": []}', ["no record of ifeval", "kwargs"]),
        ("mbpp", '{"task_id": 975, "text": "t", "code": "c", "test_list": []}', ["no record of mbpp"]),
        ("mt_bench", '{"question_id": 1, "category": "math", "turns": []}', ["no record of mt_bench"]),
        ("tulu", '{"messages": [{"role": "robot", "content": "x"}]}', ["robot"]),
    ],
)
def test_records_of_another_form_are_refused(name: str, content: str, told: list[str], tmp_path: Path) -> None:
    source = tmp_path / ("data.jsonl" if name in ("gsm8k", "mt_bench", "tulu", "mbpp", "ifeval") else "data.json")
    source.write_text(content)
    result = collm("prepare", name, source, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "Traceback" not in result.output
    for word in told:
        assert word in result.stderr
    assert not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--parts", "train=0.5"], 1, "0.5"),
        (["--parts", "train=half"], 2, "train=half"),
        (["--parts", "../x"], 1, "names"),
        (["--parts", "a=1,b=0"], 1, "above 0"),
        (["--snippets", "2"], 1, "gsm8k have no snippets"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], code: int, told: str, files: dict[str, Path], tmp_path: Path
) -> None:
    result = collm("prepare", "gsm8k", files["gsm8k"], "--out", tmp_path / "out", *arguments)
    assert result.exit_code == code and told in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_bad_file_in_a_folder_or_no_parquet_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    (files["math"] / "algebra" / "torn.json").write_text('{"problem"')
    with pytest.raises(CollmError, match=r"torn\.json: not JSON"):
        list(read_source("math", files["math"]))
    (tmp_path / "x.parquet").write_text("text")
    with pytest.raises(CollmError, match=r"x\.parquet"):
        list(read_source("gsm8k", tmp_path / "x.parquet"))


def test_repeated_ids_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"id": "x", **row} for row in GSM8K]
    with pytest.raises(CollmError, match="'x'; ids must be unique"):
        prepare("gsm8k", lines(tmp_path / "x.jsonl", rows), tmp_path / "out", {"all": 1})


def gsm8k_line(question: str, number: int = 1) -> str:
    return json.dumps({"question": question, "answer": f"#### {number}"}, ensure_ascii=False) + "\n"


def test_line_ends_of_other_alphabets_are_no_ends_of_rows(tmp_path: Path) -> None:
    for part, question in (("train", "One\u2028line\u0085"), ("test", "Two")):
        source = tmp_path / f"{part}.jsonl"
        source.write_text("\ufeff" + gsm8k_line(question), encoding="utf-8")
        prepare("gsm8k", source, tmp_path / "out", {part: 1.0})
    [row] = load_examples(tmp_path / "out" / "train.jsonl")
    assert isinstance(row.question, list) and row.question[0]["content"] == "One\u2028line\u0085".strip()
    same = tmp_path / "same.jsonl"
    same.write_text(gsm8k_line("One\u2028line\u0085"), encoding="utf-8")
    with pytest.raises(CollmError, match="stands in .*train.jsonl as well"):
        prepare("gsm8k", same, tmp_path / "out", {"validation": 1.0})


@pytest.mark.parametrize("lying", [b"no JSON\n", b"\xff\n", b"[" * 10_000, b'{"messages": [{}]}\n'])
def test_a_file_in_the_way_that_is_not_ours_is_named(tmp_path: Path, lying: bytes) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_text(gsm8k_line("One"), encoding="utf-8")
    out.mkdir()
    (out / "other.jsonl").write_bytes(lying)
    with pytest.raises(CollmError, match=r"other\.jsonl, line 1.*looked into.*give another --out"):
        prepare("gsm8k", source, out, {"train": 1.0})
    (out / "other.jsonl").write_text('{"messages": null}\n[]\n{"collm_run": {}}\n')  # there are no questions in it
    assert prepare("gsm8k", source, out, {"train": 1.0})


@pytest.mark.parametrize(
    "line",
    [
        '{"question": ' + "[" * 100_000,
        '{"question": ' + "9" * 5000 + "}",
        '{"question": "\\ud83d", "answer": "#### 1"}',
    ],
)
def test_records_that_python_cannot_read_are_named(tmp_path: Path, line: str) -> None:
    for name in ("a.jsonl", "a.json"):
        source = tmp_path / name
        source.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(CollmError, match=r"a\.json"):
            prepare("gsm8k", source, tmp_path / "out", {"train": 1.0})
