"""The baselines: each law against a few lines of numpy, what it costs, and where it is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flows import says, writing
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast
from writers import questions

from collm.calibration import calibrate
from collm.data.formatting import Formatter
from collm.decoding.baselines import (
    Combination,
    Contrastive,
    Mixture,
    MoreConfident,
    ProxyTuning,
    UniformMixture,
    combined,
)
from collm.decoding.nudging import Nudging, nudging
from collm.decoding.policies import ByEntropy, ByTopProbability, Random
from collm.engine import Finished, run
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.llm import CollaborativeLM
from collm.llm.deferral import make_policy, to_cut, to_threshold
from collm.llm.methods import word_starts
from collm.models.fake import FakeModel
from collm.models.info import CalibrationRow, CalibrationTable
from collm.models.tools import Calculator
from collm.sampling_params import SamplingParams, Signal
from collm.types import BASE, Generation, Step
from collm.values import Answer, Fault, LanguageModel, Query, Replies, Reply

V = 6
PROMPT = (3, 1, 4)
Laws = list[NDArray[np.float64]]


def fakes(num_assistants: int, vocab: int = V, **kwargs: Any) -> list[FakeModel]:
    base = FakeModel("base", vocab, num_assistants=num_assistants)
    return [base, *[FakeModel(f"a{k}", vocab, **kwargs) for k in range(1, num_assistants + 1)]]


def laws_at(models: Sequence[FakeModel], prefix: tuple[int, ...]) -> tuple[Laws, NDArray[np.float64]]:
    """The laws of all models, none of which abstains, and the gate."""
    answers = [model.answer(prefix) for model in models]
    assert all(isinstance(answer, Answer) for answer in answers)
    laws = [answer.law.double().exp().numpy() for answer in answers]  # type: ignore[union-attr]
    return laws, np.exp(np.array(answers[BASE].log_gate))  # type: ignore[union-attr, arg-type]


def contrast(laws: Laws, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    amateur, expert = laws
    law = np.where(expert >= 0.1 * expert.max(), expert**1.5 / amateur**0.5, 0)
    return law / law.sum()


def proxy(laws: Laws, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    tuned, large, untuned = laws
    return large * tuned / untuned / (large * tuned / untuned).sum()


def gated(laws: Laws, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.einsum("z,zx->x", gate, np.array(laws))


def surest(laws: Laws, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    return laws[int(np.argmax([law.max() for law in laws]))]


def mean(laws: Laws, gate: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.mean(laws, axis=0)


Direct = Callable[[Laws, NDArray[np.float64]], NDArray[np.float64]]
CASES: list[tuple[Combination, int, Direct]] = [
    (Mixture(), 2, gated),
    (UniformMixture(), 2, mean),
    (MoreConfident(), 2, surest),
    (Contrastive(), 1, contrast),
    (ProxyTuning(), 2, proxy),
]
IDS = [type(case[0]).__name__ for case in CASES]


def written(flow: Any, models: Sequence[Any]) -> tuple[list[Step], Finished]:
    events = [event for _, event in run([flow], models)]
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Step)], events[-1]


def start(combination: Combination, models: Sequence[Any], params: SamplingParams) -> Any:
    return writing(combined, [PROMPT] * len(models), params, combination, [frozenset()] * len(models))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("combination", "num_assistants", "direct"), CASES, ids=IDS)
def test_each_law_is_its_formula(
    combination: Combination, num_assistants: int, direct: Direct, temperature: float
) -> None:
    models = fakes(num_assistants)
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=2)
    steps, finished = written(start(combination, models, params), models)
    assert finished.finish_reason == "length" and len(steps) == 40
    assert finished.usage.forward_passes == (40,) * len(models)  # every model at every token
    prefix = PROMPT
    for step in steps:
        laws, gate = laws_at(models, prefix)
        law = direct(laws, gate)
        assert step.log_prob == pytest.approx(math.log(law[step.token_id]), abs=1e-4)
        assert step.base_token_id == int(laws[BASE].argmax()) and step.gate == pytest.approx(tuple(gate))
        if temperature == 0:
            assert step.token_id == int(law.argmax())
        prefix = (*prefix, step.token_id)
    if isinstance(combination, Contrastive | ProxyTuning):
        assert {step.author for step in steps} == {1}
    else:
        assert len({step.author for step in steps}) > 1


@pytest.mark.parametrize(("combination", "num_assistants", "direct"), CASES[1:], ids=IDS[1:])
def test_sampled_texts_follow_the_enumerated_law(combination: Combination, num_assistants: int, direct: Direct) -> None:
    models = fakes(num_assistants, vocab=3)
    law = {
        (a, b): direct(*laws_at(models, PROMPT))[a] * direct(*laws_at(models, (*PROMPT, a)))[b]
        for a, b in itertools.product(range(3), repeat=2)
    }
    assert sum(law.values()) == pytest.approx(1)
    draws = 500
    params = [SamplingParams(max_tokens=2, temperature=1.0, seed=seed) for seed in range(draws)]
    texts: dict[int, list[int]] = {i: [] for i in range(draws)}
    for i, event in run((start(combination, models, p) for p in params), models, 200):
        if isinstance(event, Step):
            texts[i].append(event.token_id)
    counts = Counter(tuple(text) for text in texts.values())
    assert all(law[text] > 0 for text in counts)  # the cut-off holds
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in law.items() if p > 0)
    assert chi_square < 26.2  # the 99.9 % point for 8 degrees of freedom


def prediction(*law: float, gate: tuple[float, ...] | None = None) -> Answer:
    return says(torch.tensor(law).log(), gate)


def test_by_hand() -> None:
    base, sure = prediction(0.6, 0.3, 0.1), prediction(0.0, 0.0, 1.0)
    confident = MoreConfident().combine({0: base, 1: prediction(0.3, 0.6, 0.1)})
    assert confident.author(int(confident.law.argmax())) == BASE and confident.law is base.law  # ties: the base
    assert MoreConfident().combine({0: base, 2: sure}).author(2) == 2
    # Only those that answer count: half of 0.6, 0.3, 0.1 and half of a tool's one token.
    mixed = UniformMixture().combine({0: base, 2: sure})
    assert mixed.law.exp().tolist() == pytest.approx([0.3, 0.15, 0.55])
    assert [mixed.author(token_id) for token_id in (0, 1, 2)] == [BASE, BASE, 2]
    # p = 0.5 and 0.1 are kept at alpha = 0.2, and 0.09 is not, however little the amateur thinks of it.
    contrasted = Contrastive(alpha=0.2, beta=1.0).combine(
        {0: prediction(0.8, 0.1, 0.05, 0.05), 1: prediction(0.5, 0.31, 0.1, 0.09)}
    )
    scores = np.array([0.25 / 0.8, 0.31**2 / 0.1, 0.01 / 0.05, 0])
    assert contrasted.law.exp().tolist() == pytest.approx(list(scores / scores.sum()), abs=1e-5)
    assert int(contrasted.law.argmax()) == 1


def test_tokens_that_some_model_does_not_know_stay_finite() -> None:
    """Padded vocabularies: probability 0 under one model, never NaN."""
    base, large, small = prediction(0.5, 0.5, 0.0), prediction(0.2, 0.3, 0.5), prediction(0.5, 0.5, 0.0)
    tuned = ProxyTuning().combine({0: base, 1: large, 2: small})
    assert tuned.law.exp().tolist() == pytest.approx([0.4, 0.6, 0.0])
    assert bool(torch.isfinite(Contrastive().combine({0: base, 1: large}).law).all())
    with pytest.raises(ValueError, match="alpha"):
        Contrastive(alpha=0)


class Scripted(LanguageModel):
    """Says at each position a token and how probable it is; `None` abstains."""

    name, eos_token_ids = "", frozenset()  # type: ignore[assignment]

    def __init__(self, name: str, script: Sequence[tuple[int, float] | None], eos: int | None = None) -> None:
        self.name, self.script, self.asked = name, script, []  # type: ignore[misc, var-annotated]
        self.eos_token_ids = frozenset() if eos is None else frozenset({eos})  # type: ignore[misc]

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [[self._answer(query.length - query.view.prompt_length)] for query in queries]

    def _answer(self, position: int) -> Reply:
        self.asked.append(position)
        said = self.script[position]
        if said is None:
            return None
        law = torch.full((20,), (1 - said[1]) / 19)
        law[said[0]] = said[1]
        return says(law.log())


def nudged(
    base: Sequence[tuple[int, float]], writer: Sequence[tuple[int, float] | None], **params: Any
) -> tuple[list[Step], Finished, list[list[int]]]:
    """Tokens from 10 on begin a word; 19 ends a text."""
    models = [Scripted("small", base, 19), Scripted("large", writer, 19)]
    method = Nudging(lambda token_id: token_id >= 10, 0.4)
    own = SamplingParams(**{"max_tokens": len(base), **params})
    steps, finished = written(writing(nudging, [PROMPT] * 2, own, method, [frozenset({19})] * 2), models)
    return steps, finished, [model.asked for model in models]


def test_nudging_writes_whole_words_where_the_writer_is_in_doubt() -> None:
    # The writer is sure at 0 and 4 and in doubt at 1, where the base writes a word of three tokens.
    base = [(10, 0.9), (11, 0.9), (2, 0.9), (3, 0.9), (12, 0.9), (13, 0.9), (19, 0.9)]
    writer = [(14, 0.9), (15, 0.3), (15, 0.9), (15, 0.9), (16, 0.5), (17, 0.2), (17, 0.9)]
    steps, finished, asked = nudged(base, writer)
    assert [step.token_id for step in steps] == [14, 11, 2, 3, 16, 13, 19]
    assert [step.author for step in steps] == [1, 0, 0, 0, 1, 0, 0]
    assert finished.finish_reason == "stop"
    # The base at its own tokens, and at 4 to see that its word is over; the writer never inside a word.
    assert asked == [[1, 2, 3, 4, 5, 6], [0, 1, 4, 5]]
    assert finished.usage.forward_passes == (6, 4)
    assert [step.base_token_id for step in steps] == [None, 11, 2, 3, 12, 13, 19]


def test_the_writer_does_not_end_a_nudged_text() -> None:
    steps, finished, _ = nudged([(10, 0.9), (5, 0.9), (19, 0.9)], [(19, 0.99), (6, 0.9), (6, 0.9)])
    assert [(step.token_id, step.author) for step in steps] == [(10, 0), (5, 0), (19, 0)]
    assert finished.finish_reason == "stop"
    steps, finished, _ = nudged([(10, 0.9)] * 2, [(14, 0.9), None])
    assert len(steps) == 1 and finished.error is not None and "abstains" in finished.error


def test_a_token_begins_a_word(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer.encode("Anna has 12 apples\n#### 42")
    starts = word_starts(tiny_tokenizer)
    words = "".join("|" * starts(token_id) + str(tiny_tokenizer.decode([token_id])) for token_id in ids)
    assert words == "Anna| has| 12| apples|\n####| 42"
    assert not starts(tiny_tokenizer.eos_token_id)


# -- through the facade


def system(
    tokenizer: PreTrainedTokenizerFast, num_assistants: int, gate: bool = True, **kwargs: Any
) -> CollaborativeLM:
    shared = {"eos_token_ids": frozenset({2}), "agreement": 0.3}
    base = FakeModel("base", len(tokenizer), num_assistants=num_assistants if gate else None, **shared)
    helpers = [FakeModel(f"a{k}", len(tokenizer), **shared, **kwargs) for k in range(num_assistants)]
    return CollaborativeLM([base, *helpers], [Formatter(tokenizer)] * (1 + num_assistants), has_gate=gate)


NAMES: dict[str, tuple[int, dict[str, Any]]] = {
    "entropy": (2, {"threshold": 5.35}),
    "top_probability": (2, {"threshold": 0.02}),
    "random": (2, {"deferral_rate": 0.3}),
    "confident": (2, {}),
    "mixture": (2, {}),
    "contrastive": (1, {}),
    "proxy_tuning": (2, {}),
    "nudging": (1, {"threshold": 0.02}),
}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_works_without_a_gate_and_batched_is_single(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    num_assistants, settings = NAMES[name]
    llm = system(tiny_tokenizer, num_assistants, gate=False)
    prompts = [f"What is {n}" for n in range(4)]
    params = [
        # How far is drafted depends on what passes have been seen to cost.
        SamplingParams(12, n % 2, seed=n, deferral=name, speculative=False, **settings)  # type: ignore[arg-type]
        for n in range(4)
    ]
    together = llm.generate_batch(prompts, params, batch_size=4)
    alone = [llm.generate(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    assert [g.steps for g in together] == [g.steps for g in alone]
    assert [g.forward_passes for g in together] == [g.forward_passes for g in alone]
    assert sum(g.deferral_rate for g in together) > 0
    chunks = list(llm.stream(prompts[0], params[0]))
    assert chunks[-1].generation is not None and chunks[-1].generation.text == together[0].text


@pytest.mark.parametrize("name", ["entropy", "top_probability"])
def test_doubt_costs_a_pass_of_the_base_a_token_and_one_of_an_assistant_a_deferral(
    name: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    llm = system(tiny_tokenizer, 1)
    settings: dict[str, Any] = {"deferral": name, **NAMES[name][1], "max_tokens": 40, "speculative": False}
    found = llm.generate("What is 3", SamplingParams(**settings))
    assert 0 < found.deferral_rate < 1
    assert found.forward_passes == (len(found.steps), sum(step.deferred for step in found.steps))
    for step in found.steps:
        assert step.signal is not None
        cut = to_cut(name, settings["threshold"])  # type: ignore[arg-type]
        assert step.deferred == (step.signal > cut)


def table(signal: Signal, *rows: tuple[float, float]) -> CalibrationTable:
    made = [
        CalibrationRow(
            target_rate=rate, achieved_rate=rate, threshold=to_threshold(signal, cut), log_odds=cut, metric_value=0.0
        )
        for rate, cut in rows
    ]
    return CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=made, signal=signal)


def test_each_signal_has_its_own_calibration() -> None:
    tables = [table(signal, (0.1, cut), (0.3, cut - 1)) for signal, cut in (("gate", 3.0), ("entropy", 2.5))]
    params = SamplingParams(deferral="entropy", deferral_rate=0.2)
    assert make_policy(params, 2, True, tables) == ByEntropy(2.0, 2)
    assert make_policy(replace(params, deferral_rate=1.0), 1, False, tables) == ByEntropy(-math.inf, 1)
    doubt = replace(params, deferral="top_probability")
    with pytest.raises(CollmError, match="collm calibrate --signal top_probability"):
        make_policy(doubt, 1, True, tables)
    given = replace(doubt, deferral_rate=None, threshold=0.25)
    assert make_policy(given, 1, True, tables) == ByTopProbability(math.log(4), 1)
    # Chance needs no calibration, but follows one: assistants that abstain write less than they are asked.
    chance = SamplingParams(deferral="random", deferral_rate=0.1)
    assert make_policy(chance, 1, True, tables) == Random(pytest.approx(0.1), 1)  # type: ignore[arg-type]
    with pytest.raises(CollmError, match=r"calculator has nothing to say.*--signal random.*threshold=0\.1"):
        make_policy(chance, 1, True, tables, ["calculator"])
    own = table("random", (0.1, -math.log(0.4)))
    assert make_policy(chance, 1, True, [own], ["calculator"]) == Random(pytest.approx(0.4), 1)  # type: ignore[arg-type]
    assert make_policy(chance, 1, True, [*tables, own]) == Random(pytest.approx(0.4), 1)  # type: ignore[arg-type]
    asked = SamplingParams(deferral="random", threshold=0.1)
    assert make_policy(asked, 1, True, [*tables, own]) == Random(pytest.approx(0.1), 1)  # type: ignore[arg-type]
    with pytest.raises(CollmError, match="--signal random, or leave out task"):
        make_policy(replace(chance, task="t"), 1, True, tables)


@pytest.mark.parametrize("signal", ["expected_gain", "entropy", "top_probability", "random"])
def test_a_rival_defers_as_often_as_the_gate_once_calibrated(
    signal: Signal, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    llm = system(tiny_tokenizer, 1, abstention=0.5)
    short, examples = SamplingParams(max_tokens=15), questions(8)
    found = calibrate(
        llm, "exact_match", examples, signal=signal, params=short, target_rates=(0, 0.25, 1), rounds=4, progress=False
    )
    assert found.signal == signal
    llm.info.calibration.append(found)
    for row in found.rows:
        params = replace(short, deferral=signal, deferral_rate=row.target_rate)
        result = evaluate(llm, "exact_match", examples, params, progress=False)
        assert result.deferral_rate == pytest.approx(row.achieved_rate, abs=0.011 if signal == "random" else 0)
    rates = [row.achieved_rate for row in found.rows]
    assert rates[0] == 0 and rates[1] == pytest.approx(0.25, abs=0.03) and 0.4 < rates[2] < 0.6


def test_thresholds_and_cuts_are_inverse() -> None:
    for signal, threshold in (
        ("gate", 0.3),
        ("expected_gain", 0.2),
        ("entropy", 4.2),
        ("top_probability", 0.3),
        ("random", 0.7),
    ):
        assert to_threshold(signal, to_cut(signal, threshold)) == pytest.approx(threshold)  # type: ignore[arg-type]
    for signal, never, always in (
        ("gate", 1, 0),
        ("expected_gain", 1, 0),
        ("entropy", math.inf, 0),
        ("top_probability", 0, 1),
        ("random", 0, 1),
    ):
        found = [to_threshold(signal, cut) for cut in (math.inf, -math.inf)]  # type: ignore[arg-type]
        assert found == [never, always]


@pytest.mark.parametrize(
    ("settings", "num_assistants", "words"),
    [
        (
            {"deferral": "proxy_tuning"},
            1,
            r"proxy_tuning is defined for 3 models \(base: the small tuned model, assist",
        ),
        ({"deferral": "contrastive"}, 2, "contrastive is defined for 2 models"),
        ({"deferral": "nudging"}, 2, "nudging is defined for 2 models"),
        ({"deferral": "confident"}, 0, "no assistant"),
        ({"deferral": "entropy", "threshold": 1.0}, 0, "no assistant"),
        ({"deferral": "confident", "threshold": 0.5}, 1, "threshold is read by"),
        ({"deferral": "nudging", "deferral_rate": 0.5}, 1, "deferral_rate is read by"),
        ({"deferral": "compose"}, 1, "needs a gate"),
        ({"deferral": "expected_gain", "threshold": 0.1}, 1, "needs a gate"),
        ({"deferral": "entropy", "deferral_rate": 0.2}, 1, "collm calibrate --signal entropy"),
    ],
)
def test_what_is_not_defined_is_refused(
    settings: dict[str, Any], num_assistants: int, words: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(CollmError, match=words):
        system(tiny_tokenizer, num_assistants, gate=False).generate("a", SamplingParams(**settings))


def test_tools_have_no_part_in_arithmetic_on_laws(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    vocab = len(tiny_tokenizer)
    llm = CollaborativeLM([FakeModel("base", vocab), Calculator(tiny_tokenizer)], [Formatter(tiny_tokenizer)] * 2)
    for name in ("contrastive", "nudging"):
        with pytest.raises(CollmError, match="whole vocabulary from every model, and calculator is a tool"):
            llm.generate("a", SamplingParams(deferral=name))  # type: ignore[arg-type]
    # Where they are defined: the calculator is as sure as can be.
    found = llm.generate("56 * 9 = ", SamplingParams(deferral="confident", max_tokens=4))
    assert found.text.startswith("504") and [step.author for step in found.steps] == [1, 1, 1, 0]
    # A tool of one's own is found out when it abstains.
    silent = system(tiny_tokenizer, 1, abstention=0.5)
    [failed] = silent.generate_batch(["a"], SamplingParams(deferral="contrastive", max_tokens=40))
    assert failed.error is not None and "not with tools" in failed.error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deferral": "entropy"}, "needs deferral_rate or threshold"),
        ({"deferral": "expected_gain"}, "needs deferral_rate or threshold"),
        ({"deferral": "random"}, "needs deferral_rate or threshold"),
        ({"deferral": "entropy", "threshold": -1.0}, "nats"),
        ({"deferral": "top_probability", "threshold": 1.5}, r"\[0, 1\]"),
    ],
)
def test_settings_without_meaning(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**settings)
    assert SamplingParams(deferral="entropy", threshold=3.5).threshold == 3.5


def test_a_failing_assistant_leaves_the_base_writing() -> None:
    models = fakes(1)

    class Failing(FakeModel):
        def answer(self, token_ids: Sequence[int], *how: Any) -> Reply:
            return Fault("out of ink") if len(token_ids) == 6 else super().answer(token_ids, *how)

    broken = [models[0], Failing("a1", V)]
    for combination in (Contrastive(), UniformMixture()):
        steps, finished = written(start(combination, broken, SamplingParams(max_tokens=6)), broken)
        assert (finished.finish_reason, finished.error, len(steps)) == ("error", "out of ink", 3)
        kind = SamplingParams(max_tokens=6, on_assistant_error="base")
        steps, finished = written(start(combination, broken, kind), broken)
        assert [(step.author, step.fault) for step in steps][3] == (BASE, "out of ink") and len(steps) == 6
        assert steps[3].token_id == steps[3].base_token_id


def test_the_entropy_of_a_generation_is_that_of_its_base(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = system(tiny_tokenizer, 1)
    found: Generation = llm.generate("a", SamplingParams(max_tokens=5, deferral="entropy", threshold=100.0))
    prefix = llm.formatters[BASE].prompt("a")
    for step in found.steps:
        answer = llm.models[BASE].predict([Query.of(prefix)])[0][0]
        assert isinstance(answer, Answer) and step.signal == answer.entropy
        prefix = (*prefix, step.token_id)
