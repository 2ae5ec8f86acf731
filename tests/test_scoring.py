"""Scores: right, the same however batched or interrupted, and refused where they do not belong."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.data import resumable, scoring
from collm.data.encoding import encode_examples
from collm.data.examples import Example, examples_fingerprint
from collm.data.formatting import Encoded, Formatter, PromptFormat
from collm.data.resumable import plan_batches
from collm.data.scores import load_info, partial_path
from collm.data.scoring import load_scores, score, score_batch, score_tool, scores_fingerprint
from collm.decoding.choosing import answer_of, requested
from collm.errors import CollmError
from collm.identity.finding import local_identity
from collm.models import backbone
from collm.values import LanguageModel, Query, Replies, Reply

EXAMPLES = [
    Example(
        f"q{n}",
        messages=(
            {"role": "user", "content": f"What is {n} + {n * n}?" + " Think." * (n % 4)},
            {"role": "assistant", "content": f"{n} + {n * n} = {n + n * n}\n#### {n + n * n}"},
        ),
    )
    for n in range(12)
]


def plainly(model: PreTrainedModel, encoded: Encoded, vocab_size: int) -> tuple[list[float], list[bool]]:
    """One example at a time, all logits, the textbook way."""
    with torch.inference_mode():
        logits = model(torch.tensor([encoded.token_ids])).logits[0, :-1, :vocab_size].double()
    gold = torch.tensor(encoded.token_ids[1:])
    mask = torch.tensor(encoded.labelled[1:])
    log_probs = logits.log_softmax(-1).gather(-1, gold[:, None])[:, 0]
    return log_probs[mask].tolist(), (logits.argmax(-1) == gold)[mask].tolist()


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_scores_equal_plain_forward_passes(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also past a sliding window, with logits in small pieces, and with a padded vocabulary (350 for 320)."""
    monkeypatch.setattr(backbone, "LOGITS_AT_ONCE", 7 * 320)
    model = make_model(kind, vocab_size=350)
    formatter = Formatter(tiny_tokenizer)
    data = load_scores(score(EXAMPLES, model, formatter, tmp_path / "s", batch_tokens=200, progress=False))
    assert data["id"][:] == [example.id for example in EXAMPLES]
    assert data["example"][3] == examples_fingerprint(EXAMPLES[3:4]) != data["example"][4]
    for row, example in zip(data, EXAMPLES, strict=True):
        log_prob, top1 = plainly(model, formatter.encode(example), 320)
        assert row["log_prob"] == pytest.approx(log_prob, abs=1e-4)
        assert row["top1"] == top1


def test_truncated_examples_keep_their_place(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    path = score(EXAMPLES, model, formatter, tmp_path / "s", max_length=40, progress=False)
    whole = load_scores(score(EXAMPLES, model, formatter, tmp_path / "whole", progress=False))
    cut = load_scores(path)
    encoded = encode_examples(EXAMPLES, formatter, max_length=40)
    assert encoded.dropped and len(encoded.kept) > 1, "the test wants some of both"
    for row, full, item in zip(cut, whole, encoded.items, strict=True):
        assert row["id"] == full["id"] and len(row["log_prob"]) == item.num_labelled
        assert row["log_prob"] == pytest.approx(full["log_prob"][: item.num_labelled], abs=1e-5)
    assert load_info(path)["dropped"] == encoded.dropped


def test_context_of_the_model_limits_the_sequence(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(max_position_embeddings=40)
    info = load_info(score(EXAMPLES, model, Formatter(tiny_tokenizer), tmp_path / "s", progress=False))
    assert info["truncated"] > 0 and info["fingerprint"]["max_length"] is None


def test_an_assistant_with_its_own_template_scores_the_same_tokens(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = Formatter(tiny_tokenizer)
    other = Formatter(tiny_tokenizer, PromptFormat(system_prompt="Be brief."))
    data = load_scores(score(EXAMPLES, make_model(), other, tmp_path / "s", completions_from=base, progress=False))
    assert [len(row) for row in data["log_prob"]] == [len(base.completions(e)[0]) for e in EXAMPLES]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 50), max_size=30), st.integers(2, 200))
def test_batches_hold_every_example_once_within_the_limit(lengths: list[int], batch_tokens: int) -> None:
    batches = plan_batches(lengths, range(len(lengths)), batch_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= batch_tokens
    # What is left after some batches is planned as it was before: resumed runs repeat uninterrupted ones exactly.
    rest = [i for batch in batches[1:] for i in batch]
    assert plan_batches(lengths, rest, batch_tokens) == batches[1:]


# -- interruptions

CHILD = """
import sys, time
from pathlib import Path
from conftest import make_model, make_tokenizer
from collm.data import scoring
from collm.data.formatting import Formatter
from test_scoring import EXAMPLES

quick, calls = scoring.score_batch, []
def slow(*args):
    calls.append(args)
    if len(calls) > 3:
        time.sleep(60)
    return quick(*args)
scoring.score_batch = slow
scoring.score(EXAMPLES, make_model(), Formatter(make_tokenizer()), Path(sys.argv[1]), batch_tokens=100, progress=False)
"""


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], cwd=Path(__file__).parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not partial_path(out).exists() or partial_path(out).read_bytes().count(b"\n") < 3:
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.02)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(CollmError, match="scoring was interrupted; run the same"):
        load_scores(out)
    # The kill may also have torn the line being written.
    with partial_path(out).open("ab") as file:
        file.write(b'{"examples": [0], "leng')

    model, formatter = make_model(), Formatter(tiny_tokenizer)
    passes = counted(monkeypatch)
    score(EXAMPLES, model, formatter, out, batch_tokens=100, progress=False)
    resumed = len(passes)
    score(EXAMPLES, model, formatter, tmp_path / "whole", batch_tokens=100, progress=False)
    assert 0 < resumed <= len(passes) - resumed - 2
    assert load_scores(out).to_dict() == load_scores(tmp_path / "whole").to_dict()
    assert not partial_path(out).exists()


def counted(
    monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None, error: BaseException | None = None
) -> list[int]:
    """Count batches; at batch `stop_at`, raise `error`, or for want of one let the user press Ctrl-C."""
    passes: list[int] = []

    def counting(model: PreTrainedModel, batch: Sequence[Encoded], vocab_size: int | None = None):  # type: ignore[no-untyped-def]
        if len(passes) == stop_at:
            if error is None:
                signal.raise_signal(signal.SIGINT)
            else:
                raise error
        passes.append(len(batch))
        return score_batch(model, batch, vocab_size)

    monkeypatch.setattr(scoring, "score_batch", counting)
    return passes


def test_ctrl_c_keeps_what_is_done(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        done = counted(patch, stop_at=2)
        score(EXAMPLES, model, formatter, tmp_path / "s", batch_tokens=100, progress=False)
    assert f"{sum(done)} of 12 examples are scored" in caplog.text
    # With other batches than before: what is kept are examples.
    passes = counted(monkeypatch)
    score(EXAMPLES, model, formatter, tmp_path / "s", batch_tokens=10_000, progress=False)
    assert passes == [12 - sum(done)]


def test_out_of_memory_says_what_to_do(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, stop_at=1, error=torch.OutOfMemoryError())
    with pytest.raises(CollmError, match="batch_tokens=100; finished batches are kept"):
        score(EXAMPLES, make_model(), Formatter(tiny_tokenizer), tmp_path / "s", batch_tokens=100, progress=False)
    assert partial_path(tmp_path / "s").exists()


@pytest.fixture
def disk_of() -> Callable[[int], None]:
    """`disk_of(n)`: no file may grow beyond n bytes, which the kernel enforces as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Fails in the header, between batches, or only in the Arrow file, which long ids make larger than the journal.
@pytest.mark.parametrize("size", [50, 1000, 4000])
def test_full_disk_loses_nothing(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    disk_of: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    out = tmp_path / "s"
    examples = [replace(example, id=example.id * 100) for example in EXAMPLES]
    passes = counted(monkeypatch)
    disk_of(size)
    with pytest.raises(CollmError, match="cannot be written .*make room and run the same again"):
        score(examples, model, formatter, out, batch_tokens=100, progress=False)
    disk_of(resource.RLIM_INFINITY)
    kept = partial_path(out).read_text() if partial_path(out).exists() else ""
    assert not out.exists() and len(kept) <= size
    assert all(line.endswith("}") for line in kept.splitlines())
    before = len(passes)
    score(examples, model, formatter, out, batch_tokens=100, progress=False)
    repeated = sum(passes) - 12
    assert len(load_scores(out)) == 12
    # At most the batch that could not be written was scored twice.
    assert repeated == (passes[before - 1] if before and size < 4000 else 0)


# -- stale, partial, damaged, foreign


def test_finished_scores_are_left_alone_and_stale_ones_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, formatter, out = make_model(), Formatter(tiny_tokenizer), tmp_path / "s"
    score(EXAMPLES, model, formatter, out, progress=False)
    passes = counted(monkeypatch)
    assert score(EXAMPLES, model, formatter, out, progress=False) == out
    other_format = Formatter(tiny_tokenizer, PromptFormat(system_prompt="a"))
    other_tokenizer = Formatter(make_tokenizer(vocab_size=300))
    for message, arguments in {
        "the model's weights": (EXAMPLES, make_model(seed=1), formatter, out),
        "the chat template, what it renders, the system prompt or BOS": (EXAMPLES, model, other_format, out),
        "the examples": (EXAMPLES[:-1], model, formatter, out),
        "the tokenizer": (EXAMPLES, model, other_tokenizer, out),
    }.items():
        with pytest.raises(CollmError, match=f"is stale: it was made with something else in {message}"):
            score(*arguments, progress=False)
    with pytest.raises(CollmError, match=r"something else in max_length \(None there, 100 here\)"):
        score(EXAMPLES, model, formatter, out, max_length=100, progress=False)
    assert passes == []
    score(EXAMPLES[:-1], model, formatter, out, resume=False, progress=False)
    assert len(load_scores(out)) == 11


def test_what_training_expects(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    out = score(EXAMPLES, model, formatter, tmp_path / "s", progress=False)
    expect = scores_fingerprint(EXAMPLES, local_identity(model), formatter)
    assert len(load_scores(out, expect=expect)) == 12
    assert len(load_scores(out, expect={"data": expect["data"]})) == 12
    with pytest.raises(CollmError, match="stale.*weights .*max_length"):
        load_scores(out, expect={**expect, "model": {**expect["model"], "weights": "others"}, "max_length": 7})


def test_the_base_s_system_prompt_does_not_make_its_completions_others(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A tool is scored through the base's format; whether the base's formatter is given once more says nothing."""
    base = Formatter(tiny_tokenizer, PromptFormat(system_prompt="Add."))
    plain = Formatter(tiny_tokenizer)
    other = Formatter(tiny_tokenizer, PromptFormat(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    tool = {"kind": "tool"}
    fingerprint = scores_fingerprint(EXAMPLES, tool, base)
    assert fingerprint == scores_fingerprint(EXAMPLES, tool, base, completions_from=plain)
    assert fingerprint != scores_fingerprint(EXAMPLES, tool, base, completions_from=other)
    assert fingerprint != scores_fingerprint(EXAMPLES, tool, plain, completions_from=base)


def test_partial_scores_of_something_else_are_not_gone_on_with(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    formatter, out = Formatter(tiny_tokenizer), tmp_path / "s"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, stop_at=1)
        score(EXAMPLES, make_model(), formatter, out, batch_tokens=100, progress=False)
    with pytest.raises(CollmError, match=r"s\.partial is stale.*the model's weights"):
        score(EXAMPLES, make_model(seed=1), formatter, out, progress=False)
    score(EXAMPLES, make_model(seed=1), formatter, out, resume=False, progress=False)
    expect = scores_fingerprint(EXAMPLES, local_identity(make_model(seed=1)), formatter)
    assert len(load_scores(out, expect=expect)) == 12


def test_damaged_missing_and_newer_scores(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="does not exist; make scores with"):
        load_scores(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    for resume in (True, False):
        with pytest.raises(CollmError, match="is not a folder of scores"):
            score(EXAMPLES, model, formatter, tmp_path / "mine", resume=resume, progress=False)
    assert (tmp_path / "mine" / "thesis.txt").exists()

    out = score(EXAMPLES, model, formatter, tmp_path / "s", progress=False)
    info = load_info(out)
    (out / "scores.json").write_text(json.dumps({**info, "num_examples": 13}))
    with pytest.raises(CollmError, match="12 rows of 13"):
        load_scores(out)
    (out / "scores.json").write_text(json.dumps({**info, "format_version": 99}))
    with pytest.raises(CollmError, match="newer format.*upgrade"):
        load_scores(out)
    (out / "scores.json").write_text(json.dumps(info))
    next(out.glob("*.arrow")).write_bytes(b"torn")
    with pytest.raises(CollmError, match="damaged"):
        load_scores(out)


def test_nan_names_the_example(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, formatter = make_model(), Formatter(tiny_tokenizer)
    (nine,) = tiny_tokenizer.encode("9")
    with torch.no_grad():
        model.get_input_embeddings().weight[nine] = math.nan  # type: ignore[union-attr,index,operator]
    with pytest.raises(CollmError, match=r"example '(q3|q7|q9|q8|q10)': the model's log-probabilities are NaN"):
        score(EXAMPLES, model, formatter, tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()


def test_a_tokenizer_that_is_too_large_for_the_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="they do not belong together"):
        score(EXAMPLES, make_model(vocab_size=100), Formatter(tiny_tokenizer), tmp_path / "s", progress=False)


def test_progress_shows_speed_on_stderr(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    score(EXAMPLES, make_model(), Formatter(tiny_tokenizer), tmp_path / "s")
    printed = capsys.readouterr()
    assert printed.out == "" and "tokens/s" in printed.err


# -- tools


class Parrot(LanguageModel):
    """Says that the next token is the last one again, and abstains after odd ones."""

    name = "parrot"

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [[self._reply(q, i, q.view.token_ids[end - 1]) for i, end in enumerate(q.ends)] for q in queries]

    @staticmethod
    def _reply(query: Query, i: int, last: int) -> Reply:
        if last % 2:
            return None
        law = torch.full((320,), -torch.inf)
        law[last] = 0.0
        return requested(answer_of(law, query.draw, 0), query, i)


def test_tool(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    formatter = Formatter(tiny_tokenizer)
    turns = ({"role": "user", "content": "2?"}, {"role": "assistant", "content": "22334411"}) * 2
    examples = [Example("two turns", messages=turns), Example("plain", prompt="4", completion="44")]
    data = load_scores(score_tool(examples, Parrot(), formatter, tmp_path / "s", progress=False))
    for example, row in zip(examples, data, strict=True):
        ids, flags = formatter.encode(example).token_ids, formatter.encode(example).labelled
        expected = [ids[t - 1] == ids[t] and ids[t - 1] % 2 == 0 for t in range(1, len(ids)) if flags[t]]
        assert row["top1"] == expected
        assert row["log_prob"] == [0.0 if right else -np.inf for right in expected]
        assert any(expected) and not all(expected)
    info = load_info(tmp_path / "s")
    assert info["fingerprint"]["model"]["kind"] == "own" and info["mean_log_prob"] is None
    with pytest.raises(CollmError, match="the model's weights"):
        score(examples, make_model(), formatter, tmp_path / "s", progress=False)


def test_no_columns_are_left_out(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As a file beside the table may say of them."""
    score(EXAMPLES[:2], make_model(), Formatter(tiny_tokenizer), tmp_path / "scores", progress=False)
    expected = load_scores(tmp_path / "scores").to_dict()
    state = tmp_path / "scores" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "_format_columns": ["id"], "_format_type": "numpy"}))
    assert load_scores(tmp_path / "scores").to_dict() == expected


def test_journal_survives_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with resumable.Journal(path, {"run": 1}) as journal:
        for n in range(3):
            journal.append({"n": n})
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\x00\xff garbage\n", lines[3]]))
    with resumable.Journal(path, {"run": 1}) as journal:
        assert journal.records == [{"n": 0}]
        journal.append({"n": 9})
    with resumable.Journal(path, {"run": 2}) as journal:
        assert journal.found == {"run": 1} and journal.records == [{"n": 0}, {"n": 9}]
