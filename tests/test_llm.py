"""The facade, on tiny transformers models: cached = uncached, streamed = whole, batched = one by one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

from collm.data.formatting import Formatter
from collm.decoding.pace import FixedPace
from collm.decoding.policies import Never, Threshold
from collm.errors import CollmError
from collm.llm import CollaborativeLM, GenerationFailed
from collm.llm.assistants import load_assistants
from collm.llm.deferral import cut_for_rate, make_policy
from collm.models.checkpoint import save_checkpoint
from collm.models.fake import FakeModel
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo
from collm.models.loading import load_model, weights_fingerprint
from collm.models.local import LocalModel
from collm.models.tools import Calculator
from collm.sampling_params import SamplingParams
from collm.types import BASE, Generation, Message, Usage
from collm.values import GREEDY, Answer, Query, Replies
from collm.views import Text

QUESTIONS: list[Sequence[Message] | str] = [
    [{"role": "user", "content": "Anna has 12 apples and buys 30 more."}],
    "56 * 9 = ",
    [{"role": "system", "content": "Solve."}, {"role": "user", "content": "How many books? " * 8}],
    "Paris is the capital",
    [{"role": "user", "content": "Straße 👋"}],
]
MODES: dict[str, dict[str, Any]] = {
    "threshold": {"threshold": 0.5},
    "sampled": {"deferral": "sampled", "temperature": 1.0, "top_p": 0.9},
    "compose": {"deferral": "compose"},
    "random": {"deferral": "random", "threshold": 0.4, "temperature": 0.7, "top_k": 20},
    "entropy": {"deferral": "entropy", "threshold": 5.1},
    "never": {"deferral": "never"},
    "always": {"deferral": "always"},
}


def gate(num_assistants: int, width: int = 32) -> DeferralHead:
    head = DeferralHead(width, num_assistants)
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight, std=0.3)
    return head


def pair(
    tokenizer: PreTrainedTokenizerFast, kinds: Sequence[str] = ("llama", "qwen3"), cache: bool = True, **config: Any
) -> CollaborativeLM:
    """A base with a gate, an assistant for each further kind, and the calculator."""
    networks = [make_model(kind, seed=i, **config) for i, kind in enumerate(kinds)]
    head = gate(len(kinds))
    models: list[Any] = [
        LocalModel(network, tokenizer, None if i else head, name=f"m{i}" if i else "base", cache=cache)
        for i, network in enumerate(networks)
    ]
    models.append(Calculator(tokenizer))
    return CollaborativeLM(models, [Formatter(tokenizer)] * len(models))


def same(a: Generation, b: Generation) -> bool:
    """Equal texts, authors and reasons; numbers up to rounding. What it cost may differ."""
    assert [s.log_prob for s in a.steps] == pytest.approx([s.log_prob for s in b.steps], abs=1e-3)
    assert [g for s in a.steps for g in s.gate] == pytest.approx([g for s in b.steps for g in s.gate], abs=1e-3)
    assert [s.signal or 0 for s in a.steps] == pytest.approx([s.signal or 0 for s in b.steps], abs=1e-3)
    neutral: dict[str, Any] = {"log_prob": 0.0, "gate": (), "draft": "", "discarded": 0, "signal": None}
    rounded = [replace(g, steps=tuple(s._replace(**neutral) for s in g.steps), usage=Usage()) for g in (a, b)]
    return rounded[0] == rounded[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kinds", [("llama", "qwen3"), ("gemma3_text", "llama")], ids="+".join)
def test_cached_batched_streamed_all_write_the_same(
    kinds: tuple[str, ...], mode: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    llm, plain = pair(tiny_tokenizer, kinds), pair(tiny_tokenizer, kinds, cache=False)
    params = [SamplingParams(max_tokens=20, seed=i, stop=("\n\n", "zq"), **MODES[mode]) for i in range(len(QUESTIONS))]
    batched = llm.generate_batch(QUESTIONS, params, batch_size=3)
    for question, own, found in zip(QUESTIONS, params, batched, strict=True):
        assert same(found, plain.generate(question, own))
        assert same(found, llm.generate(question, own))
        chunks = list(llm.stream(question, own))
        assert chunks[-1].generation is not None and same(found, chunks[-1].generation)
        assert "".join(chunk.text for chunk in chunks) == found.text
        assert "".join(chunk.piece for chunk in chunks) == "".join(found.pieces)
        assert [c.step.token_id for c in chunks if c.step is not None] == list(found.token_ids)
    deferred = sum(step.deferred for generation in batched for step in generation.steps)
    assert (deferred == 0) == (mode == "never")
    assert any(g.completion_tokens > 16 for g in batched)  # past the sliding window of 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pace", [FixedPace(4), FixedPace(1, 4)], ids=["base drafts", "assistant drafts"])
def test_speculative_writes_what_plain_writes(
    mode: str, pace: FixedPace, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.llm.preparing.AdaptivePace", lambda experience: pace)
    llm, plain = pair(tiny_tokenizer), pair(tiny_tokenizer, cache=False)
    params = [SamplingParams(max_tokens=24, seed=i, stop=("zq",), **MODES[mode]) for i in range(len(QUESTIONS))]
    drafted = 0
    for own, question, found in zip(params, QUESTIONS, llm.generate_batch(QUESTIONS, params, 3), strict=True):
        expected = plain.generate(question, replace(own, speculative=False))
        assert same(found, expected) and expected.usage.drafted == 0
        drafted += found.usage.drafted
        assert found.usage.tokens_by_author == expected.usage.tokens_by_author
    assert (drafted > 0) == (mode not in ("never", "compose"))


def test_a_model_that_fails_costs_its_own_text_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Failing(Calculator):
        def predict(self, queries: Sequence[Query]) -> Replies:
            if any("7 + 7" in self._decode(query.view.token_ids[: query.length]) for query in queries):
                raise ConnectionError("gone")
            return super().predict(queries)

    head = DeferralHead(32, 1)
    torch.nn.init.constant_(head.bias, 5.0)
    base = LocalModel(make_model(), tiny_tokenizer, head)
    llm = CollaborativeLM([base, Failing(tiny_tokenizer)], [Formatter(tiny_tokenizer)] * 2)
    params = SamplingParams(max_tokens=3)
    good, bad = llm.generate_batch(["56 * 9 = ", "7 + 7 = "], params)
    assert good.text == "504" and good.error is None
    assert bad.finish_reason == "error" and bad.error == "calculator: ConnectionError: gone" and bad.steps == ()
    with pytest.raises(GenerationFailed, match="gone") as failure:
        llm.generate("7 + 7 = ", params)
    assert failure.value.generation.finish_reason == "error"
    rescued = llm.generate("7 + 7 = ", replace(params, on_assistant_error="base"))
    assert rescued.finish_reason == "length" and all(step.fault for step in rescued.steps)


def test_a_generation_is_consistent(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = pair(tiny_tokenizer)
    found = llm.generate(QUESTIONS[0], SamplingParams(max_tokens=20, speculative=False))
    assert found.model_names == ("base", "m1", "calculator")
    assert found.prompt_tokens == len(llm.formatters[0].prompt(QUESTIONS[0]))
    assert "".join(found.pieces) == tiny_tokenizer.decode(found.token_ids)
    assert len(found.pieces) == len(found.steps) and found.forward_passes[BASE] == len(found.steps)
    assert llm.decode(found.token_ids[:3]) == tiny_tokenizer.decode(found.token_ids[:3])


def test_agrees_with_transformers_generate(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = pair(tiny_tokenizer)
    ids = list(llm.formatters[0].prompt(QUESTIONS[0]))
    base = llm.models[0]
    assert isinstance(base, LocalModel)
    expected = base.model.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0, len(ids) :].tolist()
    found = llm.generate(QUESTIONS[0], SamplingParams(max_tokens=30, deferral="never"))
    assert list(found.token_ids) == expected


def test_the_calculator_writes_where_the_gate_defers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    head = DeferralHead(32, 1)
    torch.nn.init.constant_(head.bias, 5.0)
    base = LocalModel(make_model(), tiny_tokenizer, head)
    llm = CollaborativeLM([base, Calculator(tiny_tokenizer)], [Formatter(tiny_tokenizer)] * 2)
    found = llm.generate("56 * 9 = ", SamplingParams(max_tokens=5))
    assert found.text.startswith("504") and [step.author for step in found.steps] == [1, 1, 1, 0, 0]
    assert [step.abstained for step in found.steps] == [False, False, False, True, True]
    alone = llm.generate("56 * 9 = ", alone="calculator")
    assert (alone.text, alone.finish_reason, alone.forward_passes) == ("504", "abstained", (0, 4))
    assert llm.generate("56 * 9 = ", SamplingParams(max_tokens=5), alone=0).deferral_rate == 0
    with pytest.raises(CollmError, match="no model 'calc'; the models are base, calculator"):
        llm.generate("1", alone="calc")


def test_prompts_at_the_end_of_the_context(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = pair(tiny_tokenizer, max_position_embeddings=24)
    room = "a" * 20
    found = llm.generate(room, SamplingParams(max_tokens=50, deferral="never"))
    assert found.prompt_tokens == 20 and found.completion_tokens <= 5
    assert found.finish_reason == "length" or found.completion_tokens < 5
    with pytest.raises(CollmError, match="prompt 2 has 25 tokens, more than the context of 24 tokens of base"):
        llm.generate_batch([room, "a" * 25])


def test_one_params_for_each_prompt_or_one_for_all(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = pair(tiny_tokenizer)
    assert llm.generate_batch([]) == []
    with pytest.raises(CollmError, match="2 prompts but 1 sampling params"):
        llm.generate_batch(["a", "b"], [SamplingParams()])


def test_a_policy_of_ones_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm, params = pair(tiny_tokenizer), SamplingParams(max_tokens=8)
    never = llm.generate("a", params, policy=Never())
    assert never == llm.generate("a", replace(params, deferral="never"))
    always = llm.generate("a", params, policy=Threshold(-math.inf))
    assert all(step.deferred or step.abstained for step in always.steps)


def test_a_fake_pair_needs_no_transformer(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    models = [FakeModel("base", 320, num_assistants=1), FakeModel("helper", 320)]
    llm = CollaborativeLM(models, [Formatter(tiny_tokenizer)] * 2)
    found = llm.generate("hello", SamplingParams(max_tokens=30))
    assert 0 < found.deferral_rate < 1 and found.model_names == ("base", "helper")


# -- deferral


def table(
    task: str = "t", rows: Sequence[tuple[float, float]] = (), achieved: Sequence[float] | None = None
) -> CalibrationTable:
    made = [
        CalibrationRow(target_rate=r, achieved_rate=a, threshold=0.5, log_odds=x, metric_value=0.0)
        for (r, x), a in zip(rows, achieved or [r for r, _ in rows], strict=True)
    ]
    return CalibrationTable(task=task, metric="m", seed=0, num_prompts=1, rows=made)


TABLE = table(rows=[(0.0, math.inf), (0.1, 2.0), (0.2, 1.0), (0.5, -2.0), (1.0, -math.inf)])


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0, math.inf), (1, -math.inf), (0.1, 2.0), (0.15, 1.5), (0.5, -2.0), (0.3, 0.0), (0.1 + 0.2 - 0.1, 1.0)],
)
def test_rates_become_thresholds(rate: float, expected: float) -> None:
    assert cut_for_rate([TABLE], rate) == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_rates_that_were_missed_are_not_handed_out_silently() -> None:
    """What counts is what a cut achieved, not what calibration was after."""
    rows = [(0.0, math.inf), (0.1, 3.0), (0.3, 1.0), (0.4, 1.0), (0.5, 1.0), (0.6, -1.0), (1.0, -math.inf)]
    missed = table(rows=rows, achieved=[0.0, 0.11, 0.21, 0.21, 0.21, 0.61, 0.97])
    assert cut_for_rate([missed], 0.1) == 3.0 and cut_for_rate([missed], 0.6) == -1.0
    assert cut_for_rate([missed], 0.2) == pytest.approx(1.2)
    for rate, cut in ((0.3, 0.55), (0.4, 0.05), (0.5, -0.45)):
        with pytest.warns(UserWarning, match=rf"deferral_rate {rate} was not measured: .* achieved is 0\.\d+\. For"):
            assert cut_for_rate([missed], rate) == pytest.approx(cut)
    # Nothing lies above: as near as calibration came, and said.
    short = table(rows=rows[:5], achieved=[0.0, 0.11, 0.21, 0.21, 0.21])
    with pytest.warns(UserWarning, match=r"deferral_rate 0\.5 was not measured: the nearest .* is 0\.21"):
        assert cut_for_rate([short], 0.5) == 1.0


def test_rates_that_calibration_does_not_know() -> None:
    # 0 never defers: there is no threshold to interpolate from.
    works = r"Rates that work: 0, any from 0\.1 to 0\.5, 1\. For 0\.05, .* --rates 0,0\.05,0\.1,0\.2,0\.5,1$"
    with pytest.raises(CollmError, match=works):
        cut_for_rate([TABLE], 0.05)
    with pytest.raises(CollmError, match=r"Rates that work: 0, 0\.3, 1\."):
        cut_for_rate([table(rows=[(0.0, math.inf), (0.3, 1.0), (1.0, -math.inf)])], 0.2)
    unreachable = table(rows=[(0.1, math.inf), (0.3, 1.0), (0.4, 0.5), (0.9, -math.inf)])
    assert cut_for_rate([unreachable], 0.9) == -math.inf
    with pytest.raises(CollmError, match=r"Rates that work: 0, 0\.1, any from 0\.3 to 0\.4, 0\.9, 1\."):
        cut_for_rate([unreachable], 0.6)
    with pytest.raises(CollmError, match="run collm calibrate"):
        cut_for_rate([], 0.2)
    two = [TABLE, table("u", [(0.2, 7.0)])]
    with pytest.raises(CollmError, match=r"several tasks \(t, u\)"):
        cut_for_rate(two, 0.2)
    assert cut_for_rate(two, 0.2, "u") == 7.0
    with pytest.raises(CollmError, match="not calibrated for task 'v', only for t, u"):
        cut_for_rate(two, 0.2, "v")


def test_policies_that_need_what_is_not_there() -> None:
    with pytest.raises(CollmError, match="needs a gate"):
        make_policy(SamplingParams(), 1, False, [])
    with pytest.raises(CollmError, match="needs a gate"):
        make_policy(SamplingParams(deferral="always"), 2, False, [])
    with pytest.raises(CollmError, match="no assistant"):
        make_policy(SamplingParams(threshold=0.3), 0, False, [])
    assert make_policy(SamplingParams(), 0, False, []) == Never()
    unread = Answer(0, 0.0, 0, 0.0, 0.0)
    assert make_policy(SamplingParams(deferral="always"), 1, False, []).decide(unread, GREEDY, 0).authors == (1, BASE)
    assert make_policy(SamplingParams(deferral_rate=0.2), 1, True, [TABLE]) == Threshold(1.0)
    assert make_policy(SamplingParams(), 1, True, []) == Threshold(0.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deferral": "always", "threshold": 0.3}, "threshold is read by .*leave out deferral='always'"),
        ({"deferral": "never", "threshold": 0.3}, "threshold is read by"),
        ({"deferral": "never", "deferral_rate": 0.3}, "deferral_rate is read by"),
        ({"deferral": "random", "deferral_rate": 0.3, "task": "t"}, "no calibration of random deferral"),
        ({"task": "t"}, "task says in whose calibration"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CollmError, match=words):
        make_policy(SamplingParams(**settings), 1, True, [TABLE])


def test_compose_ignores_nothing_silently(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="threshold is read by"):
        pair(tiny_tokenizer).generate("a", SamplingParams(deferral="compose", threshold=0.3))


# -- from_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` and `expert`: models; `pair`: a checkpoint with assistants `expert` and `calculator`."""
    root, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for name, network in {"plain": make_model(seed=0), "expert": make_model("qwen3", seed=1)}.items():
        network.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    base = make_model(seed=2)
    info = CheckpointInfo(
        base_fingerprint=weights_fingerprint(base),
        assistants=[
            AssistantInfo(name="expert", spec=str(root / "expert"), format={"system_prompt": "Be brief."}),
            AssistantInfo(name="calculator", spec="calculator"),
        ],
        calibration=[TABLE],
    )
    save_checkpoint(root / "pair", info, base, gate(2), tokenizer)
    return root


def test_a_checkpoint_with_its_assistants(folders: Path) -> None:
    expert = str(folders / "expert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_order = CollaborativeLM.from_pretrained(folders / "pair", [expert])
    assert by_order.model_names == ("base", "expert", "calculator")
    params = SamplingParams(max_tokens=16, deferral_rate=0.2)
    found = by_order.generate(QUESTIONS[0], params)
    by_name = CollaborativeLM.from_pretrained(
        folders / "pair", ["calculator=calculator", f"expert={expert}"], cache=False
    )
    assert same(found, by_name.generate(QUESTIONS[0], params))
    assert same(found, by_order.generate(QUESTIONS[0], replace(params, deferral_rate=None), policy=Threshold(1.0)))
    # The expert sees the system prompt it was trained with, the base does not.
    lengths = [len(formatter.prompt(QUESTIONS[0])) for formatter in by_order.formatters]
    assert lengths[0] == lengths[2] < lengths[1]


def test_what_is_refused_starts_no_engine(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor captures graphs, which may take minutes."""
    monkeypatch.setattr("collm.llm.shared_engine.Engine", lambda *_, **__: pytest.fail("an engine was started"))
    llm = pair(tiny_tokenizer, ("llama",))
    for write in (llm.generate, llm.stream, llm.astream):
        with pytest.raises(CollmError, match="needs a calibration"):
            write("Paris", SamplingParams(deferral="entropy", deferral_rate=0.3))
    llm.close()
    with pytest.raises(CollmError, match="this system is closed"):
        llm.generate("Paris")


def test_a_plain_model_defers_never_always_or_at_random(folders: Path) -> None:
    alone = CollaborativeLM.from_pretrained(folders / "plain")
    text = alone.generate("Paris", SamplingParams(max_tokens=5)).text
    llm = CollaborativeLM.from_pretrained(folders / "plain", [str(folders / "expert")])
    assert llm.model_names == ("base", "expert") and not llm.has_gate
    assert llm.generate("Paris", SamplingParams(max_tokens=5, deferral="never")).text == text
    assert llm.generate("Paris", SamplingParams(max_tokens=5, deferral="always")).deferral_rate == 1
    llm.generate("Paris", SamplingParams(max_tokens=5, deferral="random", deferral_rate=0.5))
    for deferral in ("threshold", "sampled", "compose"):
        with pytest.raises(CollmError, match="needs a gate"):
            llm.generate("Paris", SamplingParams(deferral=deferral))


def test_assistants_that_do_not_fit(folders: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    expert = str(folders / "expert")
    # Where the assistant lies where it lay in training, it need not be given.
    assert CollaborativeLM.from_pretrained(folders / "pair").model_names == ("base", "expert", "calculator")
    (folders / "expert").rename(folders / "moved")
    with pytest.raises(CollmError, match="'expert' is missing; give it as assistant expert=SPEC"):
        CollaborativeLM.from_pretrained(folders / "pair")
    (folders / "moved").rename(folders / "expert")
    with pytest.raises(CollmError, match="no assistant called xpert; its assistants are expert, calculator"):
        CollaborativeLM.from_pretrained(folders / "pair", [f"xpert={expert}"])
    with pytest.raises(CollmError, match="3 assistants were given, but the checkpoint was trained with 2"):
        CollaborativeLM.from_pretrained(folders / "pair", [expert, "calculator", expert])
    with pytest.raises(CollmError, match="two assistants have one name"):
        CollaborativeLM.from_pretrained(folders / "plain", [expert, expert])


def test_tools_are_found_by_themselves_and_models_of_ones_own_taken(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    base, infos = (
        Formatter(tiny_tokenizer),
        [AssistantInfo(name=n, spec=s) for n, s in [("calc", "calculator"), ("x", "y")]],
    )
    own = FakeModel("mine", 320)
    assert [m.name for m, _ in load_assistants([own], infos, base)] == ["calc", "mine"]
    assert [m.name for m, _ in load_assistants([FakeModel("calc", 320), own], infos, base)] == ["calc", "mine"]
    assert [m.name for m, _ in load_assistants([own, "calculator"], infos, base)] == ["calc", "mine"]
    with pytest.raises(CollmError, match="another kind of writer"):
        load_assistants(["x=calculator", own], infos, base)


def test_other_weights_of_the_base_are_noticed(folders: Path) -> None:
    helper = AssistantInfo(name="calculator", spec="calculator")
    info = CheckpointInfo(
        kind="gate", base_model=str(folders / "plain"), base_fingerprint="0" * 16, assistants=[helper]
    )
    save_checkpoint(folders / "gate", info, make_model(), gate(1), None)
    with pytest.warns(UserWarning, match="calibrate again"):
        CollaborativeLM.from_pretrained(folders / "gate", ["calculator"])


def test_one_stop_string_is_not_its_characters() -> None:
    stop: Any = "no way"
    assert SamplingParams(stop=stop) == SamplingParams(stop=("no way",))
    stop = ["a", "b"]
    assert SamplingParams(stop=stop).stop == ("a", "b")


@pytest.mark.parametrize(
    ("device", "message"), [("gpu", "no kind of device 'gpu'"), ("cuda", "torch sees no CUDA device")]
)
def test_devices_that_are_not_there(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(CollmError, match=message):
        load_model("anything", device=device)


def test_mistyped_names_are_told_apart_from_network_faults() -> None:
    with pytest.raises(CollmError, match="did you mean the tool 'calculator'"):
        load_model("calculater")
    with pytest.raises(CollmError, match="runs/nope: there is no such folder"):
        load_model("runs/nope")


def test_each_assistant_has_its_own_place(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    make_model("llama", seed=1).save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    spec = str(tmp_path / "a")
    formatter = Formatter(tiny_tokenizer)
    [(model, _), (other, _)] = load_assistants([f"one={spec}?dtype=bfloat16&device=cpu", f"two={spec}"], [], formatter)
    assert isinstance(model, LocalModel) and isinstance(other, LocalModel)
    assert (model.name, model.model.dtype, other.model.dtype) == ("one", torch.bfloat16, torch.float32)
    [(unnamed, _)] = load_assistants([f"{spec}?dtype=bfloat16"], [], formatter)
    assert isinstance(unnamed, LocalModel) and unnamed.model.dtype == torch.bfloat16
    for bad, told in (("colour=red", "dtype=..., device=..."), ("dtype=float8", "dtype is one of")):
        with pytest.raises(CollmError, match=told):
            load_assistants([f"{spec}?{bad}"], [], formatter)


def test_an_assistant_that_is_a_checkpoint_sees_prompts_as_in_its_training(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    info = CheckpointInfo(base_format={"system_prompt": "Be brief."})
    save_checkpoint(tmp_path / "a", info, make_model(seed=1), None, tiny_tokenizer)
    base = Formatter(tiny_tokenizer)
    formatters = [f for s in ("", "?dtype=bfloat16") for _, f in load_assistants([f"{tmp_path / 'a'}{s}"], [], base)]
    assert [f.format.system_prompt for f in formatters] == ["Be brief.", "Be brief."]
    # A gate that was trained with it showed it the prompts in its own way, which stands.
    trained = [AssistantInfo(name="a", spec=str(tmp_path / "a"))]
    [(_, formatter)] = load_assistants([], trained, base)
    assert formatter.format.system_prompt is None


def test_memory_is_bounded(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    info = CheckpointInfo(assistants=[AssistantInfo(name="a", spec="a")])
    save_checkpoint(tmp_path / "c", info, make_model(seed=0), gate(1), tiny_tokenizer)
    make_model("qwen3", seed=1).save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    free = CollaborativeLM.from_pretrained(tmp_path / "c", [str(tmp_path / "a")])
    tight = CollaborativeLM.from_pretrained(tmp_path / "c", [str(tmp_path / "a")], max_cache_tokens=64)
    params = SamplingParams(max_tokens=16, deferral="always")
    prompts = ["a" * n for n in (3, 10, 14, 5)]
    for a, b in zip(tight.generate_batch(prompts, params), free.generate_batch(prompts, params), strict=True):
        assert same(a, b)
    held, unbounded = tight.models[0], free.models[0]
    assert isinstance(held, LocalModel) and isinstance(unbounded, LocalModel)
    assert held.cache_bytes < unbounded.cache_bytes
    with pytest.raises(
        CollmError, match="75 tokens .* cache of base: raise max_cache_tokens to at least 75, or lower max_tokens"
    ):
        tight.generate("a" * 60, params)


def test_who_writes_alone_needs_no_room_in_the_caches_of_others(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Nor is it held back by what they have."""
    info = CheckpointInfo(assistants=[AssistantInfo(name="a", spec="a")])
    save_checkpoint(tmp_path / "c", info, make_model(seed=0), gate(1), tiny_tokenizer)
    make_model("qwen3", seed=1).save_pretrained(tmp_path / "a")
    tiny_tokenizer.save_pretrained(tmp_path / "a")
    llm = CollaborativeLM.from_pretrained(tmp_path / "c", [str(tmp_path / "a")])
    longest = [Text([[5] * 7, [6] * 9], alone=number).longest(10) for number in (None, 0, 1)]
    assert longest == [(16, 18), (16, 0), (0, 18)]
    [base, helper] = llm.models
    assert isinstance(base, LocalModel) and isinstance(helper, LocalModel)
    [tight, _] = CollaborativeLM.from_pretrained(tmp_path / "c", [str(tmp_path / "a")], max_cache_tokens=64).models
    mixed = CollaborativeLM([tight, helper], llm.formatters)
    params = SamplingParams(max_tokens=100)
    found = mixed.generate("a" * 60, params, alone=helper.name)
    assert same(found, llm.generate("a" * 60, params, alone=helper.name))
    with pytest.raises(CollmError, match="does not fit into the cache of base"):
        mixed.generate("a" * 60, params, alone="base")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "empty"),
        ([], "a text or a list of messages"),
        (None, "not None"),
        (3, "type int"),
        (["one", "two"], "generate_batch"),
        ([[{"role": "user", "content": "hi"}]], "generate_batch"),
        ([{"role": "u", "content": "hi"}], "a role is one of"),
        ([{"role": "user"}], "no text as its content, but None"),
        ([{"role": "user", "content": [{"type": "image_url", "text": "hi"}]}], "only text"),
        ("cut \ud83d off", "half a surrogate pair"),
        ([3], "message 1"),
    ],
)
def test_prompts_of_another_shape_are_refused(prompt: Any, told: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = pair(tiny_tokenizer)
    with pytest.raises(CollmError, match=told):
        llm.generate(prompt)
    with pytest.raises(CollmError, match="list of prompts"):
        llm.generate_batch("one prompt")


def test_a_rate_that_is_never_reached_asks_everywhere() -> None:
    """A tool abstains at most places: its highest rate is what asking always gives."""

    def row(target: float, achieved: float, odds: float) -> CalibrationRow:
        return CalibrationRow(
            target_rate=target, achieved_rate=achieved, threshold=0.5, log_odds=odds, metric_value=0.5
        )

    rows = [row(0, 0, math.inf), row(0.1, 0.1, 2.0), row(0.14, 0.14, 0.0), row(1, 0.15, -math.inf)]
    table = CalibrationTable(task="t", metric="m", seed=0, num_prompts=9, rows=rows, best=2)
    assert cut_for_rate([table], 0.12) == pytest.approx(1.0)
    assert [cut_for_rate([table], rate) for rate in (0.145, 0.2, 0.9)] == [-math.inf] * 3
    with pytest.raises(CollmError, match="Rates that work"):
        cut_for_rate([table], 0.05)
