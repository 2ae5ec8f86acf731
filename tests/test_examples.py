"""Rows from files and datasets, and what is said of bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest

from collm.data.examples import Example, examples_fingerprint, hold_out, load_examples, parse_example
from collm.data.sources import read_source
from collm.errors import CollmError

CHAT = {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}], "answer": "4"}
PLAIN = {"id": 7, "prompt": "2 + 2 =", "completion": " 4"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_chat_and_plain_rows(tmp_path: Path) -> None:
    chat, plain = load_examples(write(tmp_path / "a.jsonl", CHAT, "", PLAIN))
    assert chat.id == "1" and chat.fields == {"answer": "4"}
    assert chat.question == [{"role": "user", "content": "2 + 2?"}] and chat.reference == "4"
    assert plain.id == "7" and plain.question == "2 + 2 =" and plain.reference == " 4"
    assert plain.where.endswith("a.jsonl, line 3")


def test_a_row_may_be_a_question_only(tmp_path: Path) -> None:
    chat, plain = load_examples(write(tmp_path / "a.jsonl", {"messages": CHAT["messages"][:1]}, {"prompt": "p"}))  # type: ignore[index]
    assert chat.question == CHAT["messages"][:1] and chat.reference is None  # type: ignore[index]
    assert plain.question == "p" and plain.reference is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "compl', "line 2: not JSON"),
        ("[1, 2]", "line 2: a row is a JSON object, not list"),
        ('{"text": "a"}', "line 2: neither messages nor prompt; expected"),
        ('{"prompt": 3}', "line 2: prompt is a string, not int"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "line 2: a row has either"),
        ('{"messages": []}', "line 2: messages is a non-empty list"),
        ('{"messages": "hello"}', "line 2: messages is a non-empty list"),
        ('{"messages": [{"role": "user", "content": null}]}', "line 2: message 1 has no text"),
        ('{"messages": ["hello"]}', "line 2: message 1 has no text"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "line 2: message 1 has role 'robot'; a role is one of"),
        ('{"id": "1", "prompt": "a"}', "line 2: id '1' was used before .*line 1"),
    ],
)
def test_bad_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, line, PLAIN)
    with pytest.raises(CollmError, match=f"a.jsonl, {message}"):
        load_examples(path)
    with caplog.at_level(logging.WARNING):
        assert [example.id for example in load_examples(path, skip_bad=True)] == ["1", "7"]
    assert "skipped 1 bad rows of 3" in caplog.text


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(CollmError, match="line 1: not JSON, which is UTF-8 .*byte 0xff at position 12"):
        load_examples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "say \\ud83d now", "completion": "ok"}', r"line 2: prompt: character 4 is half a surrogate pair"),
        ('{"prompt": "a", "completion": "\\udc80"}', r"line 2: completion: character 0"),
        ('{"prompt": "a", "answer": ["\\udc80"]}', r"line 2: character 0"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', r"line 2: message 1: character 0"),
        ('{"prompt": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: not readable: .*nested too deep"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", r"line 2: not JSON \(an integer of more than 4,300 digits"),
        ('{"prompt": "a", "prompt": "b"}', "line 2: an object has the key 'prompt' twice"),
        ('{"prompt": "a", "x": [{"y": 1, "y": 1}]}', "line 2: an object has the key 'y' twice"),
        ('[{"prompt": "a"},', "line 2: not JSON .*is read from a .json file"),
    ],
)
def test_what_is_no_text_or_too_much_of_it(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", CHAT, line, PLAIN)
    with pytest.raises(CollmError, match=f"a.jsonl, {message}"):
        load_examples(path)
    assert [example.id for example in load_examples(path, skip_bad=True)] == ["1", "7"]


def test_a_json_file_may_be_one_list_over_several_lines(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, CHAT]
    path = tmp_path / "rows.json"
    for text in (json.dumps(rows), json.dumps(rows, indent=2)):
        path.write_text("\ufeff" + text, encoding="utf-8")
        assert [example.reference for example in load_examples(path)] == ["b", "4"]
    path.write_text(json.dumps(rows[0], indent=2))
    assert [example.reference for example in load_examples(path)] == ["b"]
    write(path, *rows)
    assert [example.id for example in load_examples(path)] == ["1", "2"]
    path.write_text("[1, 2")
    with pytest.raises(CollmError, match="line 1: not JSON"):
        load_examples(path)


def test_line_ends_of_other_alphabets_and_byte_order_marks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"prompt": "One\u2028line\u0085"}\r\n\r\n{"prompt": "b"}'.encode())
    assert [example.prompt for example in load_examples(path)] == ["One\u2028line\u0085", "b"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CollmError, match="there are no rows"):
        load_examples(write(tmp_path / "a.jsonl", ""))
    with pytest.raises(CollmError, match="there are no good rows"):
        load_examples(write(tmp_path / "b.jsonl", "{"), skip_bad=True)
    with pytest.raises(CollmError, match=r"c\.jsonl: cannot be read: No such file"):
        load_examples(tmp_path / "c.jsonl")
    with pytest.raises(CollmError, match="there is no such file or folder"):
        load_examples(tmp_path / "folder")
    with pytest.raises(CollmError, match=r"\.parquet file, or a dataset's folder"):
        load_examples(write(tmp_path / "a.csv", "prompt"))


def test_huggingface_datasets(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "2 + 2 =", "completion": " 4", "answer": "4"}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "splits"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    expected = [Example("0", prompt="2 + 2 =", completion=" 4", fields={"answer": "4"})]
    assert load_examples(tmp_path / "one") == expected
    assert load_examples(tmp_path / "splits", split="test") == expected
    assert load_examples(tmp_path / "rows.parquet") == expected
    with pytest.raises(CollmError, match="there is no split 'train'; it has test"):
        load_examples(tmp_path / "splits")


def test_columns_that_a_row_does_not_use(tmp_path: Path) -> None:
    """Arrow gives every row every column."""
    data = datasets.Dataset.from_list(
        [{"messages": CHAT["messages"], "prompt": None}, {"messages": None, "prompt": "p"}]
    )
    data.save_to_disk(str(tmp_path / "mixed"))
    chat, plain = load_examples(tmp_path / "mixed")
    assert chat.messages == tuple(CHAT["messages"]) and plain.prompt == "p"


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": null}'], ids=["object", "text"])
def test_arguments_of_other_rows_calls_are_none_of_this_rows(tmp_path: Path, arguments: Any) -> None:
    """Arrow gives every struct the keys of all: the model would learn to call `weather(city, expr=null)`."""
    other = {"expr": {"b": 1}} if isinstance(arguments, dict) else '{"expr": 1}'
    rows = [_calling("weather", arguments), _calling("calculate", other)]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(str(tmp_path / "table"))
    data.to_parquet(str(tmp_path / "table.parquet"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    expected = [(e.messages, e.tools) for e in load_examples(path)]
    assert expected[0][0][1]["tool_calls"][0]["function"]["arguments"] == arguments
    for source in ("table", "table.parquet"):
        assert [(e.messages, e.tools) for e in load_examples(tmp_path / source)] == expected
    prepared = [parse_example(row, "", "") for row in read_source("tulu", tmp_path / "table.parquet")]
    assert [example.messages for example in prepared] == [messages for messages, _ in expected]


def _calling(name: str, arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    keys = {key: {"type": "string"} for key in (arguments if isinstance(arguments, dict) else json.loads(arguments))}
    tool = {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": keys}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"messages": messages, "tools": [tool]}


def test_fingerprint_follows_texts_and_order_only() -> None:
    a, b = Example("a", prompt="x", completion="y"), Example("b", prompt="x", completion="y")
    fingerprint = examples_fingerprint([a, b])
    assert fingerprint == examples_fingerprint([Example("a", prompt="x", completion="y", fields={"answer": 1}), b])
    others = [[b, a], [a], [a, Example("b", prompt="xy", completion="")], [a, Example("b", prompt="x")]]
    assert len({fingerprint, *(examples_fingerprint(other) for other in others)}) == 5


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("count", [2, 3, 29, 300])
def test_a_share_is_held_out_and_one_at_least_on_either_side(count: int, share: float) -> None:
    examples = [Example(str(number), prompt="p") for number in range(count)]
    rest, held_out = hold_out(examples, share)
    assert rest and held_out and sorted([*rest, *held_out], key=lambda e: int(e.id)) == examples
    assert count < 300 or abs(len(held_out) / count - share) < 0.1
    if count == 300:  # more examples move none to the other side
        more = [*examples, *(Example(f"new{number}", prompt="p") for number in range(50))]
        assert 0 < share < 1 and {e.id for e in held_out} <= {e.id for e in hold_out(more, share)[1]} or share in (0, 1)
    with pytest.raises(CollmError, match="a single example"):
        hold_out(examples[:1], share)
