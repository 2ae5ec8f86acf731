"""Outputs: whole or not at all, one process at a time, never over what is somebody else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from writers import PairWriter, questions

from collm.data.journal import Journal
from collm.data.prepare import prepare
from collm.errors import CollmError
from collm.evaluation.answering import traces_path
from collm.evaluation.evaluate import evaluate
from collm.evaluation.result import EvalResult, result_path, trace_path
from collm.evaluation.runs import kept, require_free
from collm.files import beside, claimed, replacing, require_apart, write_text
from collm.report.trace import append_trace, read_traces
from collm.sampling_params import SamplingParams

# ---- names


@pytest.mark.parametrize(
    ("traces", "result"),
    [
        ("run.jsonl", "run.json"),
        ("model-0.1", "model-0.1.json"),
        ("model-0.1.jsonl", "model-0.1.json"),
        ("x", "x.json"),
    ],
)
def test_a_dot_in_a_name_is_a_part_of_it(tmp_path: Path, traces: str, result: str) -> None:
    assert result_path(tmp_path / traces) == tmp_path / result
    (tmp_path / traces).touch()
    assert trace_path(tmp_path / result) == tmp_path / traces


def test_names_beside() -> None:
    assert beside("a/model-0.1", ".json") == Path("a/model-0.1.json")
    assert beside(".jsonl", ".json") == Path(".jsonl.json")
    assert traces_path(Path("gpt-4.1.json")) == Path("gpt-4.1.traces")
    assert traces_path(Path("gpt-4.1")) == Path("gpt-4.1.traces")


def test_two_evaluations_whose_names_differ_behind_a_dot_are_two(tmp_path: Path) -> None:
    """They once had one result: `model-0.json`."""
    for number in (1, 2):
        evaluate(
            PairWriter(length=number), "exact_match", questions(2), out=tmp_path / f"model-0.{number}", progress=False
        )
    lengths = [EvalResult.load(tmp_path / f"model-0.{number}.json").tokens for number in (1, 2)]
    assert lengths[0] < lengths[1]
    with pytest.raises(CollmError, match=r"model-0\.2 holds the texts .* its result is .*model-0\.2\.json"):
        EvalResult.load(tmp_path / "model-0.2")


# ---- what is not ours


def test_the_result_does_not_replace_the_questions(tmp_path: Path) -> None:
    data = tmp_path / "test.json"
    data.write_text('{"prompt": "mine"}\n')
    with pytest.raises(CollmError, match=r"test\.json is read by this command"):
        require_free(tmp_path / "test.jsonl", [data])
    with pytest.raises(CollmError, match=r"test\.json exists and was not written by an evaluation"):
        evaluate(PairWriter(), "exact_match", questions(2), out=tmp_path / "test.jsonl", progress=False)
    assert data.read_text() == '{"prompt": "mine"}\n'
    assert not (tmp_path / "test.jsonl").exists()


@pytest.mark.parametrize("content", ['{"prompt": "mine"}\n{"prompt": "no newline"}', "a poem", "[1,\n2]", "\xff"])
def test_a_foreign_file_is_left_to_the_last_byte(tmp_path: Path, content: str) -> None:
    """Its last line was once taken for half a line of ours, and a journal emptied it."""
    path = tmp_path / "mine.jsonl"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(CollmError, match="not written by"), kept(path, {"max_tokens": 3}):
        pass
    for resume in (True, False):
        with pytest.raises(CollmError, match="not written by an earlier run"):
            Journal(path, {"reading": 1}, resume=resume)
    [trace] = _traces(tmp_path)
    with pytest.raises(CollmError, match="not written by collm generate"):
        append_trace(path, trace)
    assert path.read_bytes() == before


def _traces(folder: Path):  # type: ignore[no-untyped-def]
    evaluate(PairWriter(), "exact_match", questions(1), out=folder / "one.jsonl", progress=False)
    return read_traces(folder / "one.jsonl")


def test_an_output_is_not_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "hard")
    for name in ("a", "link", "hard", "x/../a"):
        with pytest.raises(CollmError, match="is read by this command"):
            require_apart(tmp_path / name, [tmp_path / "a"])
    require_apart(tmp_path / "b", [tmp_path / "a", "a-hub/id"])


@pytest.mark.parametrize("left", ["", '{"coll', '{"collm_run": 1, "sett'])
def test_half_a_header_of_a_killed_run_is_begun_anew(tmp_path: Path, left: str) -> None:
    (tmp_path / "run.jsonl").write_text(left)
    require_free(tmp_path / "run.jsonl")
    result = evaluate(PairWriter(), "exact_match", questions(3), out=tmp_path / "run.jsonl", progress=False)
    assert len(read_traces(tmp_path / "run.jsonl")) == result.num_examples == 3


# ---- whole or not at all


def test_writers_of_one_file_do_not_share_a_temporary_one(tmp_path: Path) -> None:
    """The second to finish once found its temporary file gone."""
    path = tmp_path / "file"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: write_text(path, str(n) * 10000), range(8)))
    assert len(set(path.read_text())) == 1 and len(path.read_text()) == 10000
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / ".file.1-1.tmp"
    old.write_text("of a process that was killed long ago")
    os.utime(old, (0, 0))
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ---- one at a time


def elsewhere(function):  # type: ignore[no-untyped-def]
    """Run it in another thread, which counts as another process does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_second_run_on_one_file_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    """The second once took the file over: the first's answers then stood under the second's settings."""
    path = tmp_path / "two.jsonl"
    with kept(path, {"max_tokens": 60}):
        for settings in ({"max_tokens": 60}, {"max_tokens": 20}):
            with pytest.raises(CollmError, match=rf"two\.jsonl is being written by .*process {os.getpid()} on"):
                elsewhere(lambda settings=settings: kept(path, settings).__enter__())
        header = json.loads(path.read_text().splitlines()[0])
        assert header["settings"] == {"max_tokens": 60}
    with kept(path, {"max_tokens": 20}):  # nothing was answered, so that the settings may be put right
        assert json.loads(path.read_text())["settings"] == {"max_tokens": 20}


def test_whoever_waits_goes_on_when_the_first_has_finished(tmp_path: Path) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait()
        with claimed(tmp_path / "cache", wait=True):
            order.append("second")

    with ThreadPoolExecutor(1) as pool:
        with claimed(tmp_path / "cache"), claimed(tmp_path / "cache"):  # one's own is no obstacle
            done = pool.submit(second)
            inside.set()
            time.sleep(0.2)
            order.append("first")
        done.result()
    assert order == ["first", "second"]


def test_the_lock_of_a_killed_process_is_in_nobodys_way(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom collm.files import claimed\n"
        f"with claimed({str(tmp_path / 'out')!r}, folder=True):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "eval", "mine"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        with (
            pytest.raises(CollmError, match=rf"-c eval mine \(process {process.pid} on "),
            claimed(tmp_path / "out", folder=True),
        ):
            pass
    finally:
        process.kill()
        process.wait()
    with claimed(tmp_path / "out", folder=True):
        pass


def test_two_evaluations_at_once_write_no_answer_twice(tmp_path: Path) -> None:
    """Each in its turn: the one that is refused says so, and its next start finds all done."""
    out = tmp_path / "run.jsonl"

    def one(number: int) -> EvalResult | None:
        try:
            return evaluate(PairWriter(), "exact_match", questions(20), SamplingParams(seed=3), out=out, progress=False)
        except CollmError as error:
            assert "is being written by" in str(error)
            return None

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, range(4)))
    assert any(results)
    assert sorted(trace.id for trace in read_traces(out)) == sorted(q.id for q in questions(20))


def test_prepared_parts_do_not_replace_what_they_are_made_of(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl"
    source.write_text(json.dumps({"question": "One?", "answer": "#### 1"}) + "\n")
    before = source.read_bytes()
    with pytest.raises(CollmError, match=r"train\.jsonl is read by this command"):
        prepare("gsm8k", source, tmp_path, {"train": 1.0})
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
    assert prepare("gsm8k", source, tmp_path / "out", {"train": 1.0}) == {tmp_path / "out" / "train.jsonl": 1}
