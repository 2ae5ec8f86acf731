"""Token accuracy on gold text: what every model, every way to defer and the oracle would have written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from writers import questions

from collm.cli import main
from collm.cli.oracle import _show
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.decoding.policies import ByEntropy, ExpectedGain, Random, Threshold, log_odds
from collm.errors import CollmError
from collm.evaluation.oracle import OracleReport, Row, is_report, report
from collm.evaluation.reading import Reading, read
from collm.models.fake import FakeModel
from collm.types import BASE
from collm.values import GREEDY, Answer, Query


def row(found: OracleReport, name: str) -> Row:
    [one] = [row for row in found.rows if row.name == name]
    return one


def reading(right: Sequence[Sequence[int]], gate: Sequence[Sequence[float]] | None, **columns: Any) -> Reading:
    size = np.array(right).shape
    plain = Reading(
        right=np.array(right, np.bool_),
        answers=np.ones(size, np.bool_),
        top_log_prob=np.zeros(size),
        entropy=np.zeros(size[0]),
        log_gate=None if gate is None else np.log(np.array(gate)),
        example=np.arange(size[0]),
    )
    return replace(plain, **{name: np.array(value) for name, value in columns.items()})


def test_by_hand_with_one_assistant() -> None:
    right = [[1, 0], [0, 1], [0, 1], [1, 1], [0, 0]]
    gate = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6], [0.45, 0.55]]
    doubt = [3.0, 2.0, 1.0, 0.5, 0.1]
    certain = [[0.9, 0.5], [0.5, 0.6], [0.7, 0.6], [0.4, 0.4], [0.3, 0.5]]
    found = report(
        reading(right, gate, entropy=doubt, top_log_prob=np.log(certain)), ["base", "helper"], rates=(0.2, 1.0)
    )
    assert (row(found, "base").accuracy, row(found, "base").deferral_rate) == (0.4, 0)
    assert (row(found, "helper").accuracy, row(found, "helper").deferral_rate) == (0.6, 1)
    # Above 0.5 the gate defers tokens 2, 4 and 5.
    assert (row(found, "gate").accuracy, row(found, "gate").deferral_rate) == (0.6, 0.6) and found.rate == 0.6
    assert row(found, "gate").asked_rate == row(found, "random").asked_rate == row(found, "entropy").asked_rate == 0.6
    # The three of most entropy: tokens 1, 2 and 3.
    assert (row(found, "entropy").accuracy, row(found, "entropy").deferral_rate) == (0.6, 0.6)
    # The three of smallest top probability: tokens 5, 4 and 2.
    assert row(found, "top probability").accuracy == 0.6
    # Gate times 1 - top probability: 0.01, 0.4, 0.09, 0.36, 0.385.
    assert (row(found, "expected gain").accuracy, row(found, "expected gain").deferral_rate) == (0.6, 0.6)
    assert row(found, "random").accuracy == pytest.approx(0.4 * 0.4 + 0.6 * 0.6)
    # Tokens 2 and 5 go to the helper; at 4 the two are equally sure and the base writes.
    assert (row(found, "more confident").accuracy, row(found, "more confident").deferral_rate) == (0.6, 0.4)
    assert (row(found, "oracle").accuracy, row(found, "oracle").deferral_rate) == (0.8, 0.4)
    assert found.by_rate[0] == pytest.approx(
        {"rate": 0.2, "gate": 0.6, "expected gain": 0.6, "entropy": 0.2, "top probability": 0.4, "random": 0.44}
    )
    assert {round(value, 9) for name, value in found.by_rate[1].items() if name != "rate"} == {0.6}
    assert (found.examples, found.tokens, found.threshold) == (5, 5, 0.5)


def test_those_that_abstain_hand_on_or_back() -> None:
    """Gate 0.3, 0.2, 0.5: the second assistant first, then the first with log 0.2/0.3, then the base."""
    answers = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 1]]
    right = [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    one = reading(right, [[0.3, 0.2, 0.5]] * 4, answers=np.array(answers, np.bool_))
    found = report(one, ["base", "x", "y"], threshold=0.39)
    assert (row(found, "gate").accuracy, row(found, "gate").deferral_rate) == (1.0, 0.75)
    strict = report(one, ["base", "x", "y"], threshold=0.41)  # above 0.2 / (0.2 + 0.3)
    assert (row(strict, "gate").accuracy, row(strict, "gate").deferral_rate) == (0.75, 0.5)
    assert row(found, "gate").asked_rate == 1.0 == row(found, "more confident").asked_rate
    # Drawn evenly each writes 2 of 4; asked everywhere, chance reaches no more than that.
    assert row(found, "random").asked_rate == pytest.approx(1.0)
    assert (row(found, "x").deferral_rate, row(found, "x").asked_rate) == (0.5, 1.0)
    assert row(found, "random").deferral_rate == pytest.approx(0.5)
    assert row(found, "random").accuracy == pytest.approx((0.5 + 0.5 + 1 + 0.5) / 4)
    assert row(found, "oracle").accuracy == 1.0 and row(found, "oracle").deferral_rate == 0.75


def test_a_rate_that_a_tool_cannot_reach_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """It answers at one place of four: at 30 % as at 50 % there is no more to be deferred."""
    tool = reading([[0, 1], [1, 0], [1, 0], [1, 0]], None, answers=np.array([[1, 1], [1, 0], [1, 0], [1, 0]], np.bool_))
    found = report(tool, ["base", "calculator"], rates=(0.005, 0.25, 0.5))
    assert [set(reached.values()) for reached in found.reached] == [{0.0, 0.005}, {0.25}, {0.25}]
    _show(found)
    low, met, missed = capsys.readouterr().out.splitlines()[-3:]
    assert low.startswith("at a rate of 0.5%: entropy 75.0% (rate reached: 0.0%), ") and low.count("reached") == 2
    assert met == "at a rate of 25%: entropy 100.0%, top probability 100.0%, random 100.0%"
    assert missed.startswith("at a rate of 50%: entropy 100.0% (rate reached: 25.0%), top prob")
    assert missed.count("reached: 25.0%") == 3


def test_without_a_gate_the_rivals_take_the_rate_of_the_oracle() -> None:
    found = report(reading([[1, 0], [0, 1], [1, 1], [1, 0]], None, entropy=[0, 1, 0, 0]), ["base", "helper"])
    assert found.threshold is None and found.rate == 0.25 and "gate" not in {row.name for row in found.rows}
    assert row(found, "entropy").accuracy == 1.0 == row(found, "oracle").accuracy


def fakes(tokenizer: PreTrainedTokenizerFast, num_assistants: int, **kwargs: Any) -> list[FakeModel]:
    base = FakeModel("base", len(tokenizer), num_assistants=num_assistants, concentration=0.005)
    helpers = [FakeModel(f"a{k}", len(tokenizer), concentration=0.005, **kwargs) for k in range(1, 1 + num_assistants)]
    return [base, *helpers]


def test_reading_is_what_the_policies_would_do_on_gold_text(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.evaluation.reading.LAWS", 3)
    models, formatter = fakes(tiny_tokenizer, 2, abstention=0.3), Formatter(tiny_tokenizer)
    examples = questions(12)
    seen = read(models, [formatter] * 3, examples, progress=False)
    doubts = {"entropy": ByEntropy(1.0, 2), "expected gain": ExpectedGain.of_probability(0.3)}
    policies = {"gate": Threshold(0.7), "random": Random(0.5, 2), **doubts}
    wrote: dict[str, list[int]] = {name: [] for name in policies}
    at = 0
    for number, example in enumerate(examples):
        item = formatter.encode(example)
        for t in (t for t, labelled in enumerate(item.labelled) if labelled):
            answers = [model.answer(item.token_ids[:t]) for model in models]
            base = answers[BASE]
            assert isinstance(base, Answer) and base.log_gate is not None
            assert seen.answers[at].tolist() == [answer is not None for answer in answers]
            assert seen.right[at].tolist() == [
                isinstance(a, Answer) and a.top_token_id == item.token_ids[t] for a in answers
            ]
            assert seen.entropy[at] == base.entropy and seen.log_gate is not None
            assert log_odds(seen.log_gate[at].tolist()) == log_odds(base.log_gate) and seen.example[at] == number
            for name, policy in policies.items():
                asked = policy.decide(base, GREEDY, at).authors
                wrote[name].append(next(z for z in asked if answers[z] is not None))
            at += 1
    assert at == len(seen.right)
    found = report(seen, ["base", "x", "y"], threshold=1 / (1 + math.exp(-0.7)))
    assert row(found, "gate").deferral_rate == np.mean([z != BASE for z in wrote["gate"]])
    assert row(found, "gate").accuracy == np.mean([seen.right[i, z] for i, z in enumerate(wrote["gate"])])
    for name in doubts:
        rate = float(np.mean([z != BASE for z in wrote[name]]))
        at_rate = report(seen, ["base", "x", "y"], rates=(rate,)).by_rate[0]
        assert 0.1 < rate < 0.9
        assert at_rate[name] == pytest.approx(np.mean([seen.right[i, z] for i, z in enumerate(wrote[name])]))


def test_a_stopped_reading_goes_on(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Stopped(FakeModel):
        def predict(self, queries: Sequence[Query]) -> list[Any]:
            if self.calls == 5:
                raise KeyboardInterrupt
            return super().predict(queries)

    models, formatters, examples = fakes(tiny_tokenizer, 1), [Formatter(tiny_tokenizer)] * 2, questions(9)
    file = tmp_path / "read.jsonl"
    whole = read(models, formatters, examples, progress=False)
    with pytest.raises(KeyboardInterrupt):
        stopped = Stopped("a1", len(tiny_tokenizer), concentration=0.005)
        read([models[0], stopped], formatters, examples, out=file, progress=False)
    with file.open("a") as half:
        half.write('{"id": "q5", "ri')
    before = models[1].calls
    again = read(models, formatters, examples, out=file, progress=False)
    assert models[1].calls - before == 4
    for name in ("right", "answers", "top_log_prob", "entropy", "log_gate", "example"):
        assert np.array_equal(getattr(again, name), getattr(whole, name))
    assert read(models, formatters, examples, out=file, progress=False).right.tolist() == whole.right.tolist()
    with pytest.raises(CollmError, match=r"another text \(examples: "):
        read(models, formatters, questions(8), out=file, progress=False)
    with pytest.raises(CollmError, match=r"\.jsonl"):
        read(models, formatters, examples, out=tmp_path / "read.json", progress=False)


def test_the_report_is_json(tmp_path: Path) -> None:
    found = report(reading([[1, 0], [0, 1]], None), ["base", "helper"], rates=(0.5,))
    found.save(tmp_path / "oracle.json")
    there = json.loads((tmp_path / "oracle.json").read_text())
    assert is_report(tmp_path / "oracle.json") and there["reached"] == [
        {"entropy": 0.5, "top probability": 0.5, "random": 0.5}
    ]
    (tmp_path / "older.json").write_text(
        json.dumps({key: there[key] for key in there if key not in ("unit", "reached")})
    )
    assert is_report(tmp_path / "older.json")
    assert there["rows"][-1]["name"] == "oracle" and there["rows"][-1]["accuracy"] == 1.0 and there["tokens"] == 2


def test_the_commands(
    tmp_path: Path,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, seed in (("base", 0), ("helper", 1)):
        tiny_model(seed=seed).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    rows = [{"id": f"q{i}", "prompt": f"What is {i}?", "completion": f"12 + {i} = {12 + i}"} for i in range(3)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def collm(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    together = ["--assistant", tmp_path / "helper"]
    read_it = ["oracle", tmp_path / "base", "--data", tmp_path / "data.jsonl"]
    found = collm(*read_it, *together, "--out", tmp_path / "read.jsonl", "--json")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert told == json.loads((tmp_path / "read.json").read_text()) and told["examples"] == 3
    examples = load_examples(str(tmp_path / "data.jsonl"))
    assert told["tokens"] == sum(len(Formatter(tiny_tokenizer).completions(example)[0]) for example in examples)
    shown = collm(*read_it, *together, "--rates", "0.5")
    assert "oracle" in shown.stdout and "at a rate of 50%: entropy" in shown.stdout
    assert "--assistant" in collm(*read_it).stderr
    write = ["generate", tmp_path / "base", "What is 3?", "--max-tokens", 4, "--json"]
    made = json.loads(collm(*write, *together, "--method", "contrastive").stdout)
    assert made["usage"]["forward_passes"] == [4, 4] and {step["author"] for step in made["steps"]} == {1}
    assert "needs --deferral-rate or --threshold" in collm(*write, *together, "--method", "entropy").stderr
    # No figures of a reading that was deleted stand beside one that is stopped.
    (tmp_path / "read.jsonl").unlink()
    monkeypatch.setattr("collm.evaluation.reading._read_one", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    collm(*read_it, *together, "--out", tmp_path / "read.jsonl")
    assert (tmp_path / "read.jsonl").exists() and not (tmp_path / "read.json").exists()
