"""Trace files: what is written comes back, and a damaged file says where."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from writers import PairWriter

from collm.errors import CollmError
from collm.files import write_text
from collm.report.trace import (
    HEADER_KEY,
    Trace,
    append_json,
    append_trace,
    base_pieces,
    drop_torn_line,
    generation_to_dict,
    read_traces,
    trace_from_dict,
    trace_to_dict,
)
from collm.sampling_params import SamplingParams
from collm.types import Generation, Step


def sample(**changes: object) -> Trace:
    [(_, generation)] = PairWriter(abstention=0.3).generate_each(["What is 7"], SamplingParams())
    settings = {"id": "a", "prompt": "What is 7", "score": 1.0, "answer": "7", "gold": "7", **changes}
    return Trace(generation=generation, base_pieces=base_pieces(generation, chr), **settings)  # type: ignore[arg-type]


def test_a_trace_file_gives_back_what_was_written(tmp_path: Path) -> None:
    conversation = ({"role": "user", "content": 'sagte "ü"\n'},)
    traces = [sample(), sample(id="b", prompt=conversation, score=None, answer=None, gold=None)]
    for trace in traces:
        append_trace(tmp_path / "new" / "t.jsonl", trace)
    assert read_traces(tmp_path / "new" / "t.jsonl") == traces
    assert any(step.abstained for step in traces[0].generation.steps)


def test_a_line_has_the_documented_fields() -> None:
    row = trace_to_dict(sample())
    assert {"id", "prompt", "text", "finish_reason", "models", "prompt_tokens", "usage", "steps"} <= set(row)
    assert {"score", "answer"} <= set(row)
    assert {"piece", "token_id", "author", "log_prob", "gate", "changed", "abstained"} <= set(row["steps"][0])
    step = next(step for step in row["steps"] if step["changed"])
    assert step["author"] == 1 and step["base_piece"] == chr(step["base_token_id"]) != step["piece"]


@given(st.text(), st.floats(allow_nan=False))
def test_any_text_and_log_prob_make_strict_json(piece: str, log_prob: float) -> None:
    generation = Generation(piece, (Step(5, 1, log_prob, (0.25, 0.75), 6),), (piece,), "length", 1, ("b", "a"))
    line = json.dumps(trace_to_dict(Trace("x", generation, "p")), allow_nan=False)
    back = trace_from_dict(json.loads(line)).generation
    assert back.pieces == generation.pieces
    assert back.steps[0].log_prob == (log_prob if math.isfinite(log_prob) else -math.inf)


def test_pieces_that_do_not_match_the_steps_are_a_bug_not_a_short_file() -> None:
    generation = Generation("", (Step(5, 0, 0.0),), (), "length", 1, ("b",))
    with pytest.raises(ValueError):
        generation_to_dict(generation)


def test_headers_are_skipped_and_a_torn_last_line_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    append_json(file, [{HEADER_KEY: 1, "settings": {}}])
    append_trace(file, sample())
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "half')
    assert len(read_traces(file)) == 1
    drop_torn_line(file)
    assert file.read_bytes() == whole
    drop_torn_line(file)
    assert file.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{broken", "line 2: not JSON"),
        ("[1]", "line 2: expected a trace object"),
        ('{"question": "a chat row"}', "line 2: not a trace"),
        ('{"text": "", "steps": [{"piece": "a"}], "models": ["b"], "finish_reason": "stop"}', "line 2: not a trace"),
        ('{"text": "", "steps": 3, "models": ["b"], "finish_reason": "stop"}', "line 2: not a trace"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "t.jsonl"
    append_trace(file, sample())
    with file.open("a") as stream:
        stream.write(line + "\n")
    append_trace(file, sample())
    with pytest.raises(CollmError, match=told) as caught:
        read_traces(file)
    assert "t.jsonl" in str(caught.value)


def test_an_author_without_a_name_is_refused() -> None:
    row = trace_to_dict(sample())
    with pytest.raises(KeyError):
        trace_from_dict({**row, "models": ["base"]})


def test_unreadable_files_are_errors_for_users(tmp_path: Path) -> None:
    with pytest.raises(CollmError, match=r"missing\.jsonl"):
        read_traces(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CollmError, match="UTF-8"):
        read_traces(tmp_path / "binary")
    with pytest.raises(CollmError, match="could not write"):
        append_json(tmp_path, [{}])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    write_text(file, "old")
    with pytest.raises(CollmError, match=r"page\.html/x: cannot be written"):
        write_text(file / "x", "new")
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half\ud800")
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"
