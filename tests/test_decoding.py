"""Decoders, policies, noise, driver and detokenisation, on toy models."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flows import alone, says, writing
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from collm.decoding.baselines import Mixture, combined
from collm.decoding.choosing import choose, race, token_noise, truncated
from collm.decoding.choosing import draw as draw_rows
from collm.decoding.collaborative import collaborative
from collm.decoding.policies import (
    Always,
    ByEntropy,
    ByTopProbability,
    ExpectedGain,
    Never,
    Policy,
    Random,
    Sampled,
    Threshold,
    by_gate,
    log_odds,
    to_log_odds,
    to_nats,
    to_probability,
)
from collm.decoding.text import Detokenizer, TextStream, TokenPieces, Transcript, stopping
from collm.engine import Event, Finished, Twin, run
from collm.engine.twin import Writing
from collm.models.fake import FakeModel
from collm.noise import philox, uniforms
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import GREEDY, Answer, Draw, LanguageModel, Query, Replies, Reply

V = 7
PROMPT = (3, 1, 4)


def authors(policy: Policy, log_gate: Sequence[float] | None, seed: int = 0, position: int = 0) -> tuple[int, ...]:
    """What a policy makes of a gate alone."""
    gate = None if log_gate is None else tuple(log_gate)
    return policy.decide(says(torch.zeros(2).log_softmax(0), gate), Draw(seed), position).authors


def fakes(num_assistants: int, **kwargs: Any) -> list[FakeModel]:
    base = FakeModel("base", V, num_assistants=num_assistants)
    return [base, *[FakeModel(f"a{k}", V, **kwargs) for k in range(1, num_assistants + 1)]]


def no_eos(models: Sequence[object]) -> list[frozenset[int]]:
    return [frozenset()] * len(models)


def written(flow: Writing, models: Sequence[FakeModel]) -> tuple[list[Step], Finished]:
    events = [event for _, event in run([flow], models)]
    assert isinstance(events[-1], Finished)
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == len(events) - 1
    return steps, events[-1]


# -- policies


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=3))
def test_log_odds_are_those_of_the_softmax(scores: list[float]) -> None:
    log_gate = torch.tensor([0.0, *scores], dtype=torch.float64).log_softmax(dim=0).tolist()
    assert log_odds(log_gate) == pytest.approx(float(torch.tensor(scores, dtype=torch.float64).logsumexp(0)), abs=1e-6)


def test_a_threshold_is_strict_and_lives_in_log_odds() -> None:
    gate = tuple(torch.log_softmax(torch.tensor([0.0, 17.5]), 0).tolist())
    just = log_odds(gate)
    assert authors(Threshold(just), gate, 0, 0) == (BASE,)
    assert authors(Threshold(math.nextafter(just, -math.inf)), gate, 0, 0) == (1, BASE)
    # As float32 probabilities these two are both 1.
    assert authors(Threshold(17.4), gate, 0, 0) != authors(Threshold(17.6), gate, 0, 0)


@pytest.mark.parametrize(
    ("probability", "gate", "expected"),
    [
        (0.0, (0.999, 0.0005, 0.0005), (1, 2, BASE)),
        (1.0, (1e-12, 1 - 1e-12, 0.0), (BASE,)),
        (0.5, (0.4, 0.25, 0.35), (2, BASE)),  # 0.6 for any assistant; without the second 0.25 / 0.65 = 0.38
        (0.35, (0.4, 0.25, 0.35), (2, 1, BASE)),
        (0.6, (0.4, 0.25, 0.35), (BASE,)),
        (0.0, (1.0, 0.0, 0.0), (BASE,)),
    ],
)
def test_threshold(probability: float, gate: tuple[float, ...], expected: tuple[int, ...]) -> None:
    log_gate = tuple(math.log(p) if p else -math.inf for p in gate)
    threshold = Threshold.of_probability(probability)
    if probability == 0.6:  # exactly on the gate up to rounding: settle the tie
        threshold = Threshold(max(threshold.log_odds, log_odds(log_gate)))
    assert authors(threshold, log_gate, 0, 0) == expected


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=4), st.floats(-6, 6))
def test_an_assistant_that_abstains_might_as_well_not_exist(scores: list[float], eta: float) -> None:
    """What follows the first choice is the whole answer for the gate renormalised without it."""
    log_gate = torch.tensor([0.0, *scores], dtype=torch.float64).log_softmax(dim=0)
    first, *rest = authors(Threshold(eta), tuple(log_gate.tolist()), 0, 0)
    if first == BASE:
        return
    others = [z for z in range(len(log_gate)) if z != first]
    renormalised = tuple(log_gate[others].log_softmax(dim=0).tolist())
    assume(abs(log_odds(renormalised) - eta) > 1e-9)
    assert rest[0] == others[authors(Threshold(eta), renormalised, 0, 0)[0]]


def test_the_next_assistant_writes_only_where_its_own_share_argues_for_it() -> None:
    """By hand: gate 0.3, 0.2, 0.5; without the second assistant 0.2 / (0.3 + 0.2) = 0.4."""
    log_gate = tuple(math.log(p) for p in (0.3, 0.2, 0.5))
    assert authors(Threshold.of_probability(0.5), log_gate, 0, 0) == (2, BASE)
    assert authors(Threshold.of_probability(0.39), log_gate, 0, 0) == (2, 1, BASE)
    assert authors(Threshold.of_probability(0.41), log_gate, 0, 0) == (2, BASE)
    assert authors(Always(), log_gate, 0, 0) == (2, 1, BASE)
    assert authors(Always(), None, 0, 0) == (1, BASE)


@given(st.floats(-40, 36))
def test_log_odds_and_probabilities_are_inverse(value: float) -> None:
    # Near 1 a float's spacing is 2^-53, which moves the log-odds by up to 2^-53 e^value.
    tolerance = 1e-9 + 2**-52 * math.exp(max(0.0, value))
    assert to_probability(value) == pytest.approx(to_probability(to_log_odds(to_probability(value))), abs=2**-52)
    if value < 33:
        assert to_log_odds(to_probability(value)) == pytest.approx(value, abs=tolerance)
    assert (to_log_odds(0), to_log_odds(1)) == (-math.inf, math.inf)
    assert (to_probability(-math.inf), to_probability(math.inf)) == (0, 1)


def test_sampled_orders_models_as_the_gate_and_its_renormalisations() -> None:
    gate = np.array([0.2, 0.5, 0.3])
    orders = Counter(authors(Sampled(), tuple(np.log(gate)), 11, position) for position in range(8000))
    first = Counter(order[0] for order in orders.elements())
    for z in range(3):
        assert first[z] / 8000 == pytest.approx(gate[z], abs=0.02)
    assert all(order[-1] == BASE for order in orders)
    # Where 1 is drawn first and abstains, 2 comes next with probability 0.3 / (0.3 + 0.2).
    after_one = [order[1] for order in orders.elements() if order[0] == 1]
    assert after_one.count(2) / len(after_one) == pytest.approx(0.6, abs=0.03)


def test_random_defers_at_its_rate_to_everybody() -> None:
    drawn = Counter(authors(Random(0.3, 2), None, 5, position)[0] for position in range(8000))
    assert drawn[1] / 8000 == pytest.approx(0.15, abs=0.02) == pytest.approx(drawn[2] / 8000, abs=0.02)
    assert all(authors(Random(0.0, 1), None, 5, i) == (BASE,) for i in range(50))
    assert all(authors(Random(1.0, 1), None, 5, i) == (1, BASE) for i in range(50))


LAW = (0.5, 0.25, 0.125, 0.125, 0.0)
"""Entropy 1.75 bits."""


def test_doubt_is_measured_in_nats_and_thresholds_are_strict() -> None:
    law = torch.tensor(LAW).log()
    base = says(law)
    assert base.entropy == pytest.approx(1.75 * math.log(2), rel=1e-6)
    for policy, doubt in ((ByEntropy, base.entropy), (ByTopProbability, -float(law[0]))):
        assert policy(doubt, 1).decide(base, GREEDY, 0) == ((BASE,), doubt)
        assert policy(math.nextafter(doubt, 0), 1).decide(base, GREEDY, 0) == ((1, BASE), doubt)
        assert policy(math.inf, 1).decide(base, GREEDY, 0).authors == (BASE,)
        assert policy(-math.inf, 1).decide(base, GREEDY, 0).authors == (1, BASE)
    assert ByTopProbability.of_probability(0.51, 1).decide(base, GREEDY, 0).authors == (1, BASE)
    assert ByTopProbability.of_probability(0.49, 1).decide(base, GREEDY, 0).authors == (BASE,)
    assert (to_nats(0), to_nats(1)) == (math.inf, 0)


@pytest.mark.parametrize("policy", [ByEntropy(0.0, 2), ByTopProbability(0.0, 2)])
def test_doubt_defers_to_the_largest_gate_and_without_one_to_anybody(policy: Policy) -> None:
    law = torch.tensor(LAW).log()
    gated = says(law, tuple(math.log(p) for p in (0.9, 0.02, 0.08)))
    assert policy.decide(gated, GREEDY, 0).authors == (2, 1, BASE)
    drawn = Counter(policy.decide(says(law), Draw(1), position).authors for position in range(2000))
    assert set(drawn) == {(1, BASE), (2, BASE)} and abs(drawn[1, BASE] - 1000) < 100


def test_the_expected_gain_is_the_gate_where_the_base_may_be_wrong() -> None:
    law, gate = torch.tensor(LAW).log(), (0.8, 0.05, 0.15)
    base = says(law, tuple(math.log(p) for p in gate))
    gain = math.log(0.2 * 0.5)
    [signal] = {ExpectedGain(cut).decide(base, GREEDY, 0).signal for cut in (-math.inf, -9.0, gain, 0.0)}
    assert signal == pytest.approx(gain, rel=1e-6)
    assert ExpectedGain(signal).decide(base, GREEDY, 0).authors == (BASE,)
    # Where the second assistant abstains, the first is asked for its own share of what is left.
    alone = 0.05 / 0.85 * 0.5
    for threshold, authors in ((0.099, (2, BASE)), (alone + 1e-6, (2, BASE)), (alone - 1e-6, (2, 1, BASE))):
        assert ExpectedGain.of_probability(threshold).decide(base, GREEDY, 0).authors == authors
    assert ExpectedGain.of_probability(1).decide(base, GREEDY, 0).authors == (BASE,)


def test_where_the_base_is_certain_the_gate_still_orders() -> None:
    certain = torch.tensor([0.0, -math.inf])
    bases = [says(certain, (math.log1p(-p), math.log(p))) for p in (0.1, 0.9)]
    signals = [ExpectedGain(-math.inf).decide(base, GREEDY, 0) for base in bases]
    assert [decision.authors for decision in signals] == [(1, BASE)] * 2  # 0 is always
    assert [decision.signal for decision in signals] == pytest.approx([math.log(p * 2**-24) for p in (0.1, 0.9)])
    never = says(certain, (0.0, -math.inf))
    assert ExpectedGain(-99.0).decide(never, GREEDY, 0) == ((BASE,), -math.inf)


# -- sampling


def cut(law: torch.Tensor, temperature: float, top_p: float = 1, top_k: int = 0) -> list[float]:
    settings = torch.tensor([temperature]), torch.tensor([top_p]).double(), torch.tensor([top_k])
    whole = truncated(law.double()[None], *settings)[0]
    if top_p == 1 and top_k == 0:
        assert torch.equal(whole, truncated(law.double()[None], settings[0])[0])
    found: list[float] = whole.tolist()
    return found


def test_truncation_keeps_what_it_says() -> None:
    law = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    assert cut(law, 1) == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15])
    assert cut(law, 1, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert cut(law, 1, 0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert cut(law, 1, 0.71) == pytest.approx([0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85])
    assert cut(law, 1, 1e-9) == [0, 1, 0, 0, 0]
    squared = np.array([0.1, 0.4, 0.05, 0.3, 0.15]) ** 2
    assert cut(law, 0.5) == pytest.approx(list(squared / squared.sum()))
    assert cut(torch.tensor([0.25] * 4).log(), 1, top_k=2) == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-5])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    law = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    assert choose(law[None], [(Draw(1, temperature=temperature), 0)]).tolist() == [1]
    scaled = truncated(law.double()[None], torch.tensor([temperature], dtype=torch.float64))
    assert scaled.tolist() == [[0, 1, 0, 0, 0]]


def draw(law: torch.Tensor, seed: int, position: int, sample: int = 0) -> int:
    """A draw from a law of probabilities, through the door that models use."""
    return int(choose(law.log()[None], [(Draw(seed, sample, 1.0), position)])[0])


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda p: sum(p) > 0),
    st.integers(-(2**63), 2**64 - 1),
    st.integers(0, 99),
)
def test_a_draw_is_never_impossible(weights: list[float], seed: int, position: int) -> None:
    law = torch.tensor(weights, dtype=torch.float64)
    law /= law.sum()  # of a law, some probability is at least 1 / V; weights may all be too small to divide by
    assert law[draw(law, seed, position)] > 0


def test_draws_follow_the_law_and_close_laws_draw_alike() -> None:
    one, other = torch.tensor([0.5, 0.3, 0.2, 0.0]).double(), torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    draws = [(Draw(0, temperature=1.0), position) for position in range(20_000)]
    columns = [choose(law.log().expand(20_000, 4), draws).tolist() for law in (one, other)]
    pairs = list(zip(*columns, strict=True))
    for drawn, law in ((Counter(a for a, _ in pairs), one), (Counter(b for _, b in pairs), other)):
        chi2 = sum((drawn[i] - 20_000 * p) ** 2 / (20_000 * p) for i, p in enumerate(law.tolist()) if p)
        assert chi2 < 16.3  # 0.999 quantile, 3 degrees of freedom
    distance = 0.1
    assert sum(a == b for a, b in pairs) / len(pairs) > (1 - distance) / (1 + distance)


def test_philox_is_that_of_its_authors() -> None:
    """The known answers of Random123 (kat_vectors), for integers, numpy and torch."""
    ones = 0xFFFFFFFF
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    known = [
        (((0, 0, 0, 0), (0, 0)), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (((ones,) * 4, (ones, ones)), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for (counter, key), expected in known:
        assert philox(counter, key) == expected
        for make in (np.array, torch.tensor):
            words = philox(tuple(make([c]) for c in counter), tuple(make([k]) for k in key))  # type: ignore[arg-type]
            assert [int(word[0]) for word in words] == list(expected)


def test_noise_is_keyed_by_seed_sample_position_and_purpose() -> None:
    seeds = (0, 1, -1, 2**32, 2**63, 2**63 + 1, 2**64 - 2, -(2**63) + 2)
    draws = {
        uniforms(seed, sample, position, purpose)
        for seed, sample, position in itertools.product(seeds, (0, 1), (0, 1))
        for purpose in ("author", "token", "deferral")
    }
    assert len(draws) == len(seeds) * 2 * 2 * 3
    assert len(set(uniforms(0, 0, 0, "author", 9))) == 9
    assert uniforms(-1, 0, 0, "token") == uniforms(2**64 - 1, 0, 0, "token")  # two's complement


def test_a_batch_draws_what_each_row_draws_alone_and_the_host_says_so() -> None:
    rng = np.random.default_rng(0)
    laws = torch.from_numpy(rng.dirichlet(np.ones(37), size=9)).float().log()
    draws = [
        (Draw(seed, n % 3, (0.0, 0.7, 1.0)[n % 3], (1.0, 0.8)[n % 2], (0, 5)[n % 2]), n)
        for n, seed in enumerate([0, 5, 2**63, 2**64 - 1, -3, 7, 7, 2**40, 1])
    ]
    together = choose(laws, draws)
    assert together.tolist() == [int(choose(laws[n : n + 1], draws[n : n + 1])[0]) for n in range(9)]
    seed, sample, position = 2**63 + 5, 2, 11
    words = torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32])
    noise = race(words, torch.tensor([sample]), torch.tensor([position]), 37, torch.float64)
    expected = [-math.log(token_noise(Draw(seed, sample), position, token_id)) for token_id in range(37)]
    assert noise[0].tolist() == pytest.approx(expected, rel=1e-12)
    law = laws.double().exp()[:1]
    assert int(draw_rows(law, noise)[0]) == int(np.argmin(np.array(expected) / law[0].numpy()))


# -- flows


MODES: dict[str, Policy | None] = {
    "threshold": Threshold.of_probability(0.6),
    "expected gain": ExpectedGain.of_probability(0.4),
    "sampled": Sampled(),
    "random": Random(0.5, 3),
    "entropy": ByEntropy(1.2, 3),
    "top probability": ByTopProbability.of_probability(0.5, 3),
    "never": Never(),
    "always": Always(),
    "compose": None,
}


def for_models(policy: Policy | None, num_assistants: int) -> Policy | None:
    blind = isinstance(policy, Random | ByEntropy | ByTopProbability)
    return replace(policy, num_assistants=num_assistants) if blind else policy


def start(mode: str, models: Sequence[FakeModel], params: SamplingParams, prompt: tuple[int, ...] = PROMPT) -> Writing:
    policy, prompts = MODES[mode], [prompt] * len(models)
    policy = for_models(policy, len(models) - 1)
    eos = [model.eos_token_ids for model in models]
    if policy is None:
        return writing(combined, prompts, params, Mixture(), eos)
    return writing(collaborative, prompts, params, policy, eos)


@pytest.mark.parametrize("num_assistants", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_writes_what_its_definition_says(mode: str, temperature: float, num_assistants: int) -> None:
    models = fakes(num_assistants, abstention=0.5)
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3)
    steps, finished = written(start(mode, models, params), models)
    assert finished.finish_reason == "length" and len(steps) == 40
    prefix = PROMPT
    for position, step in enumerate(steps):
        answers = [model.answer(prefix) for model in models]
        base = answers[BASE]
        assert base is not None and base.log_gate is not None
        assert step.gate == pytest.approx(tuple(map(math.exp, base.log_gate)))
        assert step.base_token_id == base.top_token_id
        log_gate = torch.tensor(
            [g if a is not None else -math.inf for g, a in zip(base.log_gate, answers, strict=True)]
        )
        author = answers[step.author]
        assert author is not None
        if mode == "compose":
            shares = [g + a.law for g, a in zip(log_gate.log_softmax(0), answers, strict=True) if a is not None]
            law = torch.stack(shares).logsumexp(0)
        else:
            law = author.law
            policy = for_models(MODES[mode], num_assistants)
            assert policy is not None
            wanted = policy.decide(base, Draw(3), position).authors
            assert step.author == next(z for z in wanted if answers[z] is not None)
            assert step.abstained == (step.author == BASE and wanted[0] != BASE)
            top = float(base.law.max())
            gain = math.log1p(-math.exp(base.log_gate[BASE])) + math.log1p(-math.exp(top))
            signals = {"entropy": base.entropy, "top probability": -top, "expected gain": pytest.approx(gain)}
            assert mode == "random" or step.signal == signals.get(mode)
        assert step.log_prob == pytest.approx(float(law[step.token_id]), abs=1e-5)
        if temperature == 0:
            assert step.token_id == int(law.argmax())
        prefix = (*prefix, step.token_id)
    wrote = {step.author for step in steps}
    assert wrote == {"never": {BASE}}.get(mode, wrote)
    assert mode == "never" or len(wrote) > 1
    assert any(step.abstained for step in steps) == (mode not in ("never", "compose"))


def exact_law(models: Sequence[FakeModel], length: int, temperature: float) -> dict[tuple[int, ...], float]:
    """The marginal of all texts by enumeration: prod_t sum_z P(z) P_z(x_t), renormalised over models that answer."""
    laws: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(models[0].vocab_size), repeat=length):
        probability = 1.0
        for t in range(length):
            answers = [model.answer(PROMPT + text[:t]) for model in models]
            assert answers[BASE] is not None and answers[BASE].log_gate is not None
            present = [z for z, answer in enumerate(answers) if answer is not None]
            gate = {z: math.exp(answers[BASE].log_gate[z]) for z in present}
            inner = sum(gate[z] * _law(answers[z], temperature)[text[t]] for z in present)
            probability *= inner / sum(gate.values())
        laws[text] = probability
    return laws


def _law(answer: Reply, temperature: float) -> list[float]:
    assert isinstance(answer, Answer) and answer.law is not None
    return [float(p) for p in (answer.law.double() / temperature).softmax(0)]


@pytest.mark.parametrize(
    ("mode", "num_assistants", "abstention", "temperature"),
    [("sampled", 1, 0.0, 1.0), ("sampled", 2, 0.4, 1.0), ("sampled", 1, 0.0, 0.5), ("compose", 2, 0.4, 1.0)],
)
def test_sampled_texts_follow_the_marginal_law(
    mode: str, num_assistants: int, abstention: float, temperature: float
) -> None:
    models = [FakeModel("base", 3, num_assistants=num_assistants)]
    models += [FakeModel(f"b{k}", 3, abstention=abstention) for k in range(num_assistants)]
    if abstention:
        assert any(m.answer(PROMPT + t) is None for m in models[1:] for t in [(), (0,), (1,), (2,)])
    law = exact_law(models, 2, temperature)
    assert sum(law.values()) == pytest.approx(1)
    number = 1500
    params = [SamplingParams(max_tokens=2, temperature=temperature, seed=seed) for seed in range(number)]
    texts: dict[int, list[int]] = {i: [] for i in range(number)}
    for i, event in run((start(mode, models, p) for p in params), models, 200):
        if isinstance(event, Step):
            texts[i].append(event.token_id)
    counts = Counter(tuple(text) for text in texts.values())
    chi_square = sum((counts[t] - number * p) ** 2 / (number * p) for t, p in law.items())
    assert chi_square < 20.1  # the 99 % point for 8 degrees of freedom


@pytest.mark.parametrize("mode", MODES)
def test_texts_do_not_depend_on_their_batch(mode: str) -> None:
    models = fakes(2, abstention=0.2)
    prompts = [(n, 2 * n % 5, 1) for n in range(12)]
    params = [SamplingParams(max_tokens=3 + n % 7, temperature=1.0, seed=n) for n in range(12)]

    def texts(batch_size: int) -> dict[int, list[object]]:
        found: dict[int, list[object]] = {i: [] for i in range(12)}
        flows = (start(mode, models, p, prompt) for p, prompt in zip(params, prompts, strict=True))
        for i, event in run(flows, models, batch_size):
            timeless = (event.finish_reason, event.usage.forward_passes) if isinstance(event, Finished) else event
            found[i].append(timeless)
        return found

    one_by_one = texts(1)
    assert texts(5) == one_by_one == texts(12)
    assert all(isinstance(events[-1], tuple) for events in one_by_one.values())


def test_the_base_is_asked_for_all_texts_at_once() -> None:
    models = fakes(2)
    params = SamplingParams(max_tokens=10)
    flows = [start("threshold", models, params, (n, n + 1)) for n in range(8)]
    steps = [event for _, event in run(flows, models, 8, patience=0) if isinstance(event, Step)]
    assert models[BASE].calls == 10
    assert 0 < sum(step.deferred for step in steps) < 80
    assert models[1].calls <= 10 and models[2].calls <= 10


def test_forward_passes_are_counted() -> None:
    models = fakes(2, abstention=0.5)
    steps, finished = written(start("always", models, SamplingParams(max_tokens=20)), models)
    assert finished.usage.forward_passes[BASE] == 20
    # Asked are all assistants up to the one that wrote, in the order of the gate.
    asked = [2 if step.abstained else 1 + by_gate(step.gate).index(step.author) for step in steps]
    assert sum(finished.usage.forward_passes[1:]) == sum(asked) and {1, 2} == set(asked)
    _, finished = written(start("compose", models, SamplingParams(max_tokens=20)), models)
    assert finished.usage.forward_passes == (20, 20, 20)


class Scripted(LanguageModel):
    """Writes a fixed text; abstains after it."""

    name, eos_token_ids = "", frozenset()  # type: ignore[assignment]

    def __init__(self, name: str, text: Sequence[int], eos: frozenset[int] = frozenset(), gate: float | None = None):
        self.name, self.text, self.eos_token_ids, self.gate = name, text, eos, gate  # type: ignore[misc]

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [[self._answer(query.length - query.view.prompt_length)] for query in queries]

    def _answer(self, position: int) -> Reply:
        if position >= len(self.text):
            return None
        law = torch.full((400,), -torch.inf)
        law[self.text[position]] = 0
        return says(law, None if self.gate is None else (math.log1p(-self.gate), math.log(self.gate)))


@pytest.mark.parametrize(
    ("base_eos", "assistant_eos", "gate", "written_tokens"),
    [
        ({9}, set(), 0.9, 3),  # an EOS of the base ends the text whoever writes it
        (set(), {9}, 0.9, 3),
        (set(), {9}, 0.1, 4),  # of the assistant only where it is the author
        (set(), set(), 0.9, 4),
    ],
)
def test_whose_eos_ends_the_text(base_eos: set[int], assistant_eos: set[int], gate: float, written_tokens: int) -> None:
    models = [
        Scripted("base", [5, 6, 9, 8], frozenset(base_eos), gate),
        Scripted("a", [5, 6, 9, 8], frozenset(assistant_eos)),
    ]
    eos = [model.eos_token_ids for model in models]
    flow = writing(collaborative, [PROMPT] * 2, SamplingParams(max_tokens=4), Threshold(0.0), eos)
    events = [event for _, event in run([flow], models)]
    assert len(events) - 1 == written_tokens
    assert isinstance(events[-1], Finished)
    assert events[-1].finish_reason == ("stop" if written_tokens == 3 else "length")


def test_a_model_alone() -> None:
    models = fakes(1)
    steps, finished = written(alone(1, [(), PROMPT], SamplingParams(max_tokens=6), no_eos(models)), models)
    assert finished.usage.forward_passes == (0, 6) and all(step.author == 1 and step.gate == () for step in steps)
    silent = Scripted("a", [5, 6])
    events = [e for _, e in run([alone(1, [(), PROMPT], SamplingParams(), no_eos(models))], [models[0], silent])]
    assert isinstance(events[-1], Finished) and events[-1].finish_reason == "abstained" and len(events) == 3


def test_every_model_sees_its_own_prompt() -> None:
    params = SamplingParams(max_tokens=12)
    plain, _ = written(writing(collaborative, [PROMPT] * 2, params, Threshold(0.0), no_eos("..")), fakes(1))
    base, assistant = fakes(1)
    assistant.ignore_prompt = 2
    shifted, _ = written(
        writing(collaborative, [PROMPT, (6, 6, *PROMPT)], params, Threshold(0.0), no_eos("..")), [base, assistant]
    )
    assert shifted == plain and any(step.deferred for step in plain)


# -- text


def scripted_text(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: tuple[str, ...]
) -> tuple[str, int, str]:
    """Text, number of steps and finish reason of a flow that writes `ids` under stop strings; checked as streamed."""
    eos = [frozenset({tokenizer.eos_token_id})]
    params = SamplingParams(max_tokens=len(ids), stop=stop)
    flow, text, max_tokens = alone(0, [PROMPT], params, eos)
    transcript = Transcript.of_tokens(tokenizer, PROMPT, stop, eos)
    stream, deltas, steps = TextStream(TokenPieces(tokenizer, PROMPT, eos), stop), [], 0
    for _, event in run([(stopping(flow, transcript), text, max_tokens)], [Scripted("base", ids, eos[0])]):
        if isinstance(event, Step):
            steps += 1
            deltas.append(stream.push(event))
        else:
            reason = event.finish_reason
    whole = "".join(deltas) + stream.finish()
    last, told, pieces = transcript.finish()
    assert told == whole and told.endswith(last.text) and len(pieces) == steps
    return whole, steps, reason


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("Anna has 12 apples", (), "Anna has 12 apples"),
        ("Anna has 12 apples", ("12",), "Anna has "),
        ("Anna has 12 apples and", ("2 a",), "Anna has 1"),
        ("Anna has 12 apples", ("zzz", "pples", "12 ap"), "Anna has "),  # the earliest
        ("12 + 30 = 42\n#### 42\nMore", ("\n#", "M"), "12 + 30 = 42"),
        ("aaab aaaab", ("aaaa",), "aaab "),
        ("ends in a stop's beginning: 12 + 3", ("12 + 30",), "ends in a stop's beginning: 12 + 3"),
        ("naïve Straße 👋🏽 ok", ("👋",), "naïve Straße "),
        ("naïve Straße 👋🏽 ok", ("ße",), "naïve Stra"),
        ("", ("x",), ""),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer.encode(text) + [tiny_tokenizer.eos_token_id]
    found, steps, reason = scripted_text(tiny_tokenizer, ids, stop)
    assert (found, reason) == (expected, "stop")
    assert steps == len(ids) or text != expected
    if text != expected:
        # It stops at the token that completes the stop string, not later.
        complete = tiny_tokenizer.decode(ids[: steps - 1])
        assert not any(s in complete for s in stop)


def test_a_step_is_told_after_its_text_is_made(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Whoever reads it may do so in another thread at that very moment, and must not make it a second time."""
    ids = tiny_tokenizer.encode("12 + 30 = 42")
    flow, text, max_tokens = alone(0, [PROMPT], SamplingParams(max_tokens=len(ids)), [frozenset()])
    transcript = Transcript.of_tokens(tiny_tokenizer, PROMPT, ("zz",), [frozenset()])
    made: list[int] = []
    twin = Twin([Scripted("base", ids)])

    def told(event: Event) -> None:
        made.append(len(transcript._pieces))

    twin.scheduler.submit(0, stopping(flow, transcript), text, max_tokens, told)
    while twin.num_unfinished:
        twin.step()
    assert made == [*range(1, len(ids) + 1), len(ids)]


UNICODE = "Straße, 你好, 👋🏽 = 👩‍👩‍👧 — naïve"


def test_unfinished_characters_are_held_back(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tiny_tokenizer.encode(UNICODE)
    detokenizer = Detokenizer(tiny_tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) == UNICODE and len(ids) > len(UNICODE)
    assert "\ufffd" not in "".join(pieces) and "" in pieces
    cut = Detokenizer(tiny_tokenizer)
    wave = tiny_tokenizer.encode("a👋")
    assert [cut.push(token_id) for token_id in wave[:-1]] == ["a", *[""] * (len(wave) - 2)]
    assert cut.flush() == "\ufffd"


@given(text=st.text(max_size=20), noise_ids=st.lists(st.integers(0, 319), max_size=20))
def test_pieces_join_to_the_text_of_the_whole(
    text: str, noise_ids: list[int], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    valid = tiny_tokenizer.encode(text)
    for ids, skip in [(valid, True), (valid, False), ([*valid, 1, 2, 0], True), ([1, *valid, 2], False)]:
        detokenizer = Detokenizer(tiny_tokenizer, skip_special_tokens=skip)
        joined = "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()
        assert joined == tiny_tokenizer.decode(ids, skip_special_tokens=skip)
    detokenizer = Detokenizer(tiny_tokenizer)  # any bytes at all: nothing breaks
    for token_id in noise_ids:
        assert isinstance(detokenizer.push(token_id), str)


def test_the_prompt_gives_the_first_token_its_context() -> None:
    class Spaced:
        """As SentencePiece does: a space before each word, but not at the start of a text."""

        def decode(
            self, token_ids: list[int], skip_special_tokens: bool = True, *, clean_up_tokenization_spaces: bool = False
        ) -> str:
            return "".join(f" w{i}" for i in token_ids).removeprefix(" ")

    after_prompt = Detokenizer(Spaced(), [1, 2, 3])
    assert [after_prompt.push(4), after_prompt.push(5), after_prompt.flush()] == [" w4", " w5", ""]


def test_an_eos_token_is_never_text() -> None:
    class Plain:
        def decode(
            self, token_ids: list[int], skip_special_tokens: bool = True, *, clean_up_tokenization_spaces: bool = False
        ) -> str:
            return "".join(f"<{i}>" for i in token_ids)

    stream = TextStream(TokenPieces(Plain(), [], [frozenset({2}), frozenset({3})]), ())
    pushed = [stream.push(Step(t, a, 0.0)) for t, a in [(1, 0), (3, 0), (2, 1), (3, 1)]]
    assert pushed == ["<1>", "<3>", "", ""]


def test_params_are_checked() -> None:
    params = SamplingParams()
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"stop": ("",)}):
        with pytest.raises(ValueError):
            replace(params, **wrong)


def test_noise_in_float32_makes_nothing_of_the_impossible_possible() -> None:
    """Some devices know no float64; there the largest words are rounded to 1, whose noise would be 0."""
    words = torch.tensor([0, 1]), torch.tensor([0, 0])
    for position in range(40):
        noise = race(words, torch.tensor([0, 0]), torch.tensor([position, position]), 152_064, torch.float32)
        assert bool((noise > 0).all())
