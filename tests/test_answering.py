"""Answers in the files that the judges of AlpacaEval and MT-bench read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from writers import PairWriter

from collm.cli import main
from collm.errors import CollmError
from collm.evaluation.answering import answer, traces_path
from collm.evaluation.judges import JUDGES, TEMPERATURES
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams
from collm.types import Generation, Message

QUESTIONS = [
    {"question_id": 82, "category": "math", "turns": ["Add 2", "Now 3"], "reference": ["2", "5"]},
    {"question_id": 81, "category": "writing", "turns": ["Write 4", "Shorter 5"]},
    {"question_id": 90, "category": "stem", "turns": ["Why 6"]},
    {"question_id": 91, "category": "songs", "turns": ["Sing 7", "Again 8"]},
]
INSTRUCTIONS = [
    {"instruction": f"Say {i} ", "output": "x", "generator": "reference", "dataset": "koala"} for i in range(5)
]


class Talker(PairWriter):
    """Keeps what it was asked, and with which settings."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[list[Message], SamplingParams]] = []

    def generate_each(
        self,
        prompts: Sequence[Sequence[Message] | str],
        params: SamplingParams | Sequence[SamplingParams],
        batch_size: int = 8,
        **options: Any,
    ) -> Iterator[tuple[int, Generation]]:
        assert not isinstance(params, SamplingParams)
        self.asked += [(list(prompt), own) for prompt, own in zip(prompts, params, strict=True)]  # type: ignore[arg-type]
        for i, generation in super().generate_each(prompts, params, batch_size, **options):
            yield i, replace(generation, text=f" {generation.text}\n")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(INSTRUCTIONS))
    return {"mt_bench": tmp_path / "question.jsonl", "alpaca_eval": tmp_path / "alpaca_eval.json"}


def run(llm: PairWriter, judge: str, files: dict[str, Path], out: Path, **options: Any) -> int:
    settings: dict[str, Any] = {"generator": "pair", "batch_size": 2, "progress": False, **options}
    return answer(llm, judge, files[judge], out, settings.pop("params", SamplingParams()), **settings)


def test_alpaca_eval_reads_what_was_written(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "outputs.json"
    assert run(Talker(), "alpaca_eval", files, out) == 5
    rows = json.loads(out.read_text())
    assert [set(row) for row in rows] == [{"dataset", "instruction", "output", "generator", "datasplit"}] * 5
    # The judge merges by the exact instruction.
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in INSTRUCTIONS]
    assert {(row["generator"], row["dataset"], row["datasplit"]) for row in rows} == {("pair", "koala", "eval")}
    assert all(row["output"] and row["output"] == row["output"].strip() for row in rows)


@pytest.mark.parametrize("judge", JUDGES)
def test_two_questions_of_one_id_are_refused(judge: str, files: dict[str, Path], tmp_path: Path) -> None:
    """As in two files put together: one of the answers stood under both questions."""
    again = [{**QUESTIONS[0], "turns": ["Add 9"]}] if judge == "mt_bench" else [{"instruction": "b", "id": "1"}] * 2
    rows = [*(QUESTIONS if judge == "mt_bench" else INSTRUCTIONS), *again]
    files[judge].write_text(json.dumps(rows) if judge == "alpaca_eval" else "".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(CollmError, match=r"questions have the id \w+-\d+; .* make them unique"):
        run(Talker(), judge, files, tmp_path / "out.json")


def test_mt_bench_asks_the_second_turn_with_the_first_answer(files: dict[str, Path], tmp_path: Path) -> None:
    llm = Talker()
    out = tmp_path / "model_answer" / "pair.jsonl"
    assert run(llm, "mt_bench", files, out, params=SamplingParams(top_p=0.9)) == 4
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 4
    assert [row["question_id"] for row in rows] == [82, 81, 90, 91]
    assert [[choice["index"] for choice in row["choices"]] for row in rows] == [[0]] * 4
    assert [len(row["choices"][0]["turns"]) for row in rows] == [2, 2, 1, 2]
    assert len({row["answer_id"] for row in rows}) == 4 and all(len(row["answer_id"]) == 22 for row in rows)
    seconds = [messages for messages, _ in llm.asked if len(messages) == 3]
    assert len(seconds) == 3 and len(llm.asked) == 7
    for messages, row in zip(seconds, [rows[0], rows[1], rows[3]], strict=True):
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert messages[1]["content"] == row["choices"][0]["turns"][0]
    assert [list(path.parent.glob("*.jsonl")) for path in [out]] == [[out]]  # FastChat reads every such file there


def test_mt_bench_has_a_temperature_for_each_category(files: dict[str, Path], tmp_path: Path) -> None:
    llm = Talker()
    run(llm, "mt_bench", files, tmp_path / "a.jsonl", params=SamplingParams(top_p=0.9, seed=3))
    first = {messages[0]["content"]: own for messages, own in llm.asked}
    heat = {"Add 2": 0.0, "Write 4": 0.7, "Why 6": 0.1, "Sing 7": 0.7}
    assert {asked: own.temperature for asked, own in first.items()} == heat
    assert {own.top_p for own in first.values()} == {0.9} and len({own.seed for _, own in llm.asked}) == 7
    assert TEMPERATURES["roleplay"] == 0.7 and TEMPERATURES["coding"] == 0.0
    llm = Talker()
    run(llm, "mt_bench", files, tmp_path / "b.jsonl", temperature=0.2)
    assert {own.temperature for _, own in llm.asked} == {0.2}


def test_a_temperature_that_a_question_requires_goes_before_its_category(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({**QUESTIONS[0], "required_temperature": 0.5}))
    llm = Talker()
    run(llm, "mt_bench", {"mt_bench": tmp_path / "q.jsonl"}, tmp_path / "a.jsonl")
    assert {own.temperature for _, own in llm.asked} == {0.5}
    with pytest.raises(CollmError, match="mt_bench-82"):
        run(llm, "mt_bench", {"mt_bench": tmp_path / "q.jsonl"}, tmp_path / "b.jsonl", temperature=0.2)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_stopped_run_goes_on_and_answers_nothing_twice(judge: str, files: dict[str, Path], tmp_path: Path) -> None:
    whole = Talker()
    run(whole, judge, files, tmp_path / "whole.json")
    stopped = Talker(fail_after=3)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, judge, files, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    rest = Talker()
    run(rest, judge, files, tmp_path / "out.json", batch_size=3)
    assert rest.written == whole.written - 3
    answers = [
        {trace.id: trace.generation.text for trace in read_traces(traces_path(tmp_path / name))}
        for name in ("whole.json", "out.json")
    ]
    assert answers[0] == answers[1] and len(answers[0]) == whole.written
    again = Talker()
    run(again, judge, files, tmp_path / "out.json")
    assert again.written == 0


def test_another_run_or_a_foreign_file_is_not_overwritten(files: dict[str, Path], tmp_path: Path) -> None:
    run(Talker(), "alpaca_eval", files, tmp_path / "out.json")
    for options, told in (
        ({"params": SamplingParams(seed=1)}, "params.seed"),
        ({"limit": 2}, "questions"),
        ({"alone": 1}, "alone"),
        ({"temperature": 0.5}, "temperatures"),
    ):
        with pytest.raises(CollmError, match=told):
            run(Talker(), "alpaca_eval", files, tmp_path / "out.json", **options)
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(CollmError, match="give another file"):
        run(Talker(), "alpaca_eval", files, tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == "[]"


def test_who_wrote_which_token_is_kept(files: dict[str, Path], tmp_path: Path) -> None:
    run(Talker(), "alpaca_eval", files, tmp_path / "out.json", limit=2)
    traces = read_traces(traces_path(tmp_path / "out.json"))
    assert [trace.id for trace in sorted(traces, key=lambda t: t.id)] == ["alpaca_eval-0/1", "alpaca_eval-1/1"]
    assert {step.author for trace in traces for step in trace.generation.steps} == {0, 1}


def test_the_command(
    files: dict[str, Path],
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tiny_model(seed=0).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    command = ["answer", str(tmp_path / "base"), "--method", "never", "--limit", "2", "--format"]
    out = tmp_path / "base.jsonl"
    arguments = [*command, "mt_bench", "--data", str(files["mt_bench"]), "--out", str(out), "--max-tokens", "4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "answers to 2 questions" in result.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model_id"] for row in rows] == ["base", "base"]
    settings = json.loads(traces_path(out).read_text().splitlines()[0])["settings"]
    assert settings["params.max_tokens"] == 4 and settings["temperatures"] == [0.0, 0.7]
    result = CliRunner().invoke(main, [*arguments, "--temperature", "0"])
    assert result.exit_code == 1 and "temperatures" in result.stderr
    result = CliRunner().invoke(main, [*command, "alpaca_eval", "--data", str(files["mt_bench"]), "--out", str(out)])
    assert result.exit_code == 1 and "no record of alpaca_eval" in result.stderr
