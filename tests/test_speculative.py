"""Speculative decoding: the plain decoder's text in fewer passes, whatever is drafted; and when drafting pays."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flows import writing
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_on import WritingOn

from collm.decoding.collaborative import collaborative
from collm.decoding.drafts import MIN_GAIN, Numbers, best_draft, best_stride, draft_cost, plain_cost, run_cost
from collm.decoding.experience import Experience, PassCosts
from collm.decoding.pace import AdaptivePace, FixedPace, Leave, Pace
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
)
from collm.decoding.speculative import speculative
from collm.engine import Finished, run
from collm.engine.scheduler import Scheduler
from collm.engine.twin import Twin
from collm.models.fake import FakeModel
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import Answer, Fault, LanguageModel, Query, Replies, Reply
from collm.views import Text

V = 5
PROMPT = (3, 1, 4)
POLICIES: dict[str, Policy] = {
    "threshold 0": Threshold.of_probability(0),
    "threshold 0.3": Threshold.of_probability(0.3),
    "threshold 0.7": Threshold.of_probability(0.7),
    "threshold 1": Threshold.of_probability(1),
    "sampled": Sampled(),
    "random": Random(0.5, 1),
    "entropy": ByEntropy(0.8, 1),
    "expected gain": ExpectedGain.of_probability(0.3),
    "top probability": ByTopProbability.of_probability(0.6, 1),
    "never": Never(),
    "always": Always(),
}


class RandomPace:
    """Drafts now near, now far: nothing about the text may depend on it."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def leave(self, pending: int) -> Leave:
        return Leave(int(self._rng.integers(1, 9)) if self._rng.random() < 0.5 else None, int(self._rng.integers(0, 5)))

    def asks(self, assistant: int, pending: int) -> bool:
        return pending >= int(self._rng.integers(1, 6))

    def run(self, assistant: int) -> int:
        return int(self._rng.integers(0, 5))

    def observe(self, author: int, agreed: bool) -> None:
        pass


def fakes(num_assistants: int, eos: int | None = None, **kwargs: Any) -> list[FakeModel]:
    ends = frozenset() if eos is None else frozenset({eos})
    shared = {"agreement": kwargs.pop("agreement", 0.6), "concentration": 0.3, "eos_token_ids": ends}
    base = FakeModel("base", V, num_assistants=num_assistants, **shared)
    return [base, *[FakeModel(f"a{k}", V, **shared, **kwargs) for k in range(1, num_assistants + 1)]]


def texts(
    models: Sequence[Any], params: SamplingParams, policy: Policy, pace: Pace | None, prompt: tuple[int, ...] = PROMPT
) -> tuple[list[Step], Finished]:
    eos = [model.eos_token_ids for model in models]
    prompts = [prompt] * len(models)
    if pace is None:
        own = writing(collaborative, prompts, params, policy, eos)
    else:
        own = writing(speculative, prompts, params, policy, eos, pace)
    events = [event for _, event in run([own], models)]
    assert isinstance(events[-1], Finished)
    return [event for event in events[:-1] if isinstance(event, Step)], events[-1]


def plainly(steps: Sequence[Step]) -> list[Step]:
    return [step._replace(draft="", discarded=0) for step in steps]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("num_assistants", [1, 2])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=3),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    eos=st.sampled_from([None, 0]),
    abstention=st.sampled_from([0.0, 0.3]),
    max_tokens=st.integers(1, 24),
    writes_on=st.sampled_from([None, 0.0, 0.3]),
)
def test_speculative_equals_plain(
    name: str,
    num_assistants: int,
    seed: int,
    prompt: list[int],
    temperature: float,
    eos: int | None,
    abstention: float,
    max_tokens: int,
    writes_on: float | None,
) -> None:
    """Also if the models write on by themselves, and stop now and then for no reason."""
    plain = fakes(num_assistants, eos, abstention=abstention)
    models: list[LanguageModel] = list(plain)
    if writes_on is not None:
        models = [WritingOn(model, seed + n, writes_on, lies=0.1) for n, model in enumerate(plain)]
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=0.9 if temperature else 1, seed=seed)
    steps, finished = texts(plain, params, POLICIES[name], None, tuple(prompt))
    again, at_once = texts(models, params, POLICIES[name], None, tuple(prompt))
    # Not a pass more is made than where each token is asked for.
    assert again == steps and at_once.usage.forward_passes == finished.usage.forward_passes
    fast, end = texts(models, params, POLICIES[name], RandomPace(seed), tuple(prompt))
    assert plainly(fast) == steps and end.finish_reason == finished.finish_reason
    usage = end.usage
    assert usage.accepted == sum(step.draft == "accepted" for step in fast)
    assert usage.drafted == usage.accepted + usage.recovered + sum(step.discarded for step in fast)


@pytest.mark.parametrize("stops", [0.0, 0.3, 0.7])
def test_a_call_that_goes_on_has_the_leave_that_is_left(stops: float) -> None:
    """Wherever a model stops by itself, it drafts past as many deferrals as were meant: not a pass more."""
    params, policy = SamplingParams(max_tokens=120, seed=5), Random(0.3, 1)
    plain = fakes(1)
    models = [WritingOn(model, n, stops) for n, model in enumerate(plain)]
    steps, token_by_token = texts(plain, params, policy, FixedPace(4))
    again, on = texts(models, params, policy, FixedPace(4))
    assert again == steps and on.usage.forward_passes == token_by_token.usage.forward_passes
    assert tuple(sum(model.calls) for model in models) == token_by_token.usage.forward_passes


@pytest.mark.parametrize("agreement", [0.5, 0.9, 0.98])
def test_of_strides_that_cost_nearly_the_same_the_shortest_is_taken(agreement: float) -> None:
    """Texts of which each token is judged: the expected seconds of a settled one, by trying out."""

    def base(tokens: Numbers) -> Numbers:
        return 0 * tokens + 1

    def assistant(tokens: Any) -> Any:
        return np.where(tokens <= 16, 7.0, 12.0)  # a step, as passes of a GPU have

    def cost(drafted: int) -> float:
        rng = random.Random(drafted)
        settled = 0
        for _ in range(4000):
            stood = next((n for n in range(1, drafted) if rng.random() > agreement), drafted)
            settled += stood
        return float(4000 * (drafted + assistant(drafted)) / settled)

    costs = {drafted: cost(drafted) for drafted in range(1, 65)}
    found = best_stride(1.0, agreement, base, assistant)
    least = min(costs.values())
    assert costs[found] < (1 + 1.6 * MIN_GAIN) * least
    assert all(costs[shorter] > (1 + 0.4 * MIN_GAIN) * least for shorter in range(1, found))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("pace", [None, FixedPace(1), FixedPace(4), FixedPace(1, 2)])
def test_what_the_base_begins_with_is_what_it_is_asked(pace: Pace | None, temperature: float) -> None:
    """Where no text ends and no assistant abstains, by the tokens alone that an assistant has chosen."""
    params = SamplingParams(max_tokens=60, seed=5, temperature=temperature)
    models = [WritingOn(model, n, 0.0) for n, model in enumerate(fakes(1))]
    steps, _ = texts(models, params, Random(0.3, 1), pace)
    base, assistant = models
    deferred = sum(step.deferred for step in steps)
    assert deferred > 8
    assert base.asked.issuperset(base.foreseen) and not assistant.foreseen
    runs = isinstance(pace, FixedPace) and pace.num_run > 0
    # The last token may be an assistant's; where it writes on by itself the base checks what it has written.
    assert len(base.foreseen) >= (0 if runs else len(assistant.calls) - 1)


class Failing(WritingOn):
    """Its answers are faults from a position on, but for what it is told to begin with."""

    def __init__(self, model: FakeModel, since: int) -> None:
        super().__init__(model, stops=1.0)
        self._since = since

    def predict(self, queries: Sequence[Query]) -> Replies:
        found = super().predict(queries)
        for query, replies in zip(queries, found, strict=True):
            for n, end in enumerate(query.ends):
                if end - query.view.prompt_length >= self._since:
                    replies[n] = Fault("base: NaN")
        return found


@pytest.mark.parametrize("since", range(3, 12))
def test_a_draft_that_ends_in_a_fault_costs_no_token_before_it(since: int) -> None:
    params, policy = SamplingParams(max_tokens=30, seed=5), Random(0.3, 1)
    models = [WritingOn(model, stops=1.0) for model in fakes(1, agreement=1.0)]
    steps, _ = texts(models, params, policy, None)
    models = [Failing(models[0]._model, since), WritingOn(models[1]._model, stops=1.0)]
    found, finished = texts(models, params, policy, FixedPace(4))
    assert plainly(found) == steps[:since] and finished.error == "base: NaN"


def test_whoever_begins_in_vain_costs_nobody_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    params, policy = SamplingParams(max_tokens=30, seed=5), Random(0.3, 1)
    calls = []

    def fails(self: WritingOn, coming: Sequence[object]) -> None:
        calls.append(coming)
        raise RuntimeError("no room")

    models = [WritingOn(model, stops=1.0) for model in fakes(1)]
    steps, _ = texts(models, params, policy, FixedPace(4))
    monkeypatch.setattr(WritingOn, "foresee", fails)
    models = [WritingOn(model, stops=1.0) for model in fakes(1)]
    found, finished = texts(models, params, policy, FixedPace(4))
    assert found == steps and finished.error is None and len(calls) == 1


def test_the_base_begins_while_texts_wait_for_others_to_end() -> None:
    """But not where one ends: the prompt of the next one joins the pass that follows."""
    models = [WritingOn(model, n, 0.0) for n, model in enumerate(fakes(1))]
    flows = (
        writing(
            collaborative,
            [(3, 1, seed % V)] * 2,
            SamplingParams(max_tokens=12, seed=seed),
            Random(0.5, 1),
            [frozenset()] * 2,
        )
        for seed in range(6)
    )
    twin, ended = Twin(models, 2), 0
    for flow, text, max_tokens in flows:
        twin.submit(flow, text, max_tokens)
    while ended < 6:
        ended += sum(isinstance(event, Finished) for _, event in twin.step())
    base, assistant = models
    assert base.asked.issuperset(base.foreseen)
    assert len(base.foreseen) > len(assistant.calls) / 2


@pytest.mark.parametrize("num_assistants", [1, 2])
def test_sampled_texts_follow_the_enumerated_law(num_assistants: int) -> None:
    """Z drawn, X drawn, both sides drafting: the marginal `prod_t sum_z P(z) P_z(x)` over all texts of three tokens."""
    models = [
        FakeModel("base", 3, num_assistants=num_assistants, agreement=0.5),
        *[FakeModel(f"a{k}", 3, agreement=0.5) for k in range(1, num_assistants + 1)],
    ]
    law = {}
    for text in itertools.product(range(3), repeat=3):
        probability = 1.0
        for t in range(3):
            answers = [model.answer((1, *text[:t])) for model in models]
            assert all(isinstance(answer, Answer) for answer in answers)
            gate = np.exp(answers[BASE].log_gate)  # type: ignore[union-attr, arg-type]
            probability *= sum(
                g * float(a.law[text[t]].exp())  # type: ignore[union-attr]
                for g, a in zip(gate, answers, strict=True)
            )
        law[text] = probability
    assert sum(law.values()) == pytest.approx(1)
    draws = 1500
    flows = (
        writing(
            speculative,
            [(1,)] * len(models),
            SamplingParams(max_tokens=3, temperature=1.0, seed=seed),
            Sampled(),
            [frozenset()] * len(models),
            RandomPace(seed),
        )
        for seed in range(draws)
    )
    written: dict[int, list[int]] = {}
    for number, event in run(flows, models, 64):
        if isinstance(event, Step):
            written.setdefault(number, []).append(event.token_id)
    counts = Counter(tuple(text) for text in written.values())
    chi2 = sum((counts[text] - draws * p) ** 2 / (draws * p) for text, p in law.items())
    assert chi2 < 54.1  # 0.999 quantile, 26 degrees of freedom


def test_passes_of_a_draft_that_stands() -> None:
    """The assistant always agrees: four deferrals, one pass of the assistant; none of the base is wasted."""
    models = fakes(1, agreement=1.0)
    params = SamplingParams(max_tokens=16)
    steps, finished = texts(models, params, Always(), FixedPace(num_deferrals=4))
    assert finished.usage.forward_passes == (16, 4)
    assert [step.draft for step in steps] == ["accepted", "accepted", "accepted", ""] * 4
    assert (finished.usage.drafted, finished.usage.accepted, finished.usage.recovered) == (12, 12, 0)
    _, plain = texts(models, params, Always(), None)
    assert plain.usage.forward_passes == (16, 16)


def test_passes_of_a_run_the_assistant_drafts() -> None:
    """All deferred: the assistant writes five, the base reads their gates in one pass."""
    models = fakes(1, agreement=0.0)
    steps, finished = texts(models, SamplingParams(max_tokens=16), Always(), FixedPace(num_run=4))
    # One pass for the first token, and one for each block of five; the last block has none behind it to check.
    assert finished.usage.forward_passes == (4, 16)
    assert finished.usage.recovered == 0 and len(steps) == 16


def test_waste_is_counted() -> None:
    """The assistant never agrees: every draft of three falls at its first token."""
    models = fakes(1, agreement=0.0)
    tokens = 200
    steps, finished = texts(models, SamplingParams(max_tokens=tokens), Always(), FixedPace(num_deferrals=3))
    usage = finished.usage
    agreed = sum(step.draft == "accepted" for step in steps)
    assert usage.recovered == sum(step.discarded > 0 or step.draft == "recovered" for step in steps)
    assert usage.drafted > 1.5 * (usage.accepted + usage.recovered) * 0.9 and agreed < tokens / 2
    assert usage.forward_passes[BASE] > tokens + usage.recovered / 2


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), abstention=st.sampled_from([0.0, 0.4]), agreement=st.sampled_from([0.0, 0.5, 0.9]))
def test_asking_late_never_costs_an_assistant_pass_more(seed: int, abstention: float, agreement: float) -> None:
    models = fakes(1, agreement=agreement, abstention=abstention)
    params, policy = SamplingParams(max_tokens=30), Threshold.of_probability(0.4)
    prompt = (seed % V, seed // V % V, seed // V // V % V)
    _, plain = texts(models, params, policy, None, prompt)
    for deferrals in (1, 2, 5):
        _, fast = texts(models, params, policy, FixedPace(deferrals), prompt)
        assert fast.usage.forward_passes[1] <= plain.usage.forward_passes[1]
        if deferrals == 1:
            assert fast.usage.forward_passes == plain.usage.forward_passes and fast.usage.drafted == 0


def test_costs_by_hand() -> None:
    def base(tokens: Numbers) -> Numbers:
        return 1 + 0.1 * (tokens - 1)

    def assistant(tokens: Numbers) -> Numbers:
        return 8 + 0.2 * (tokens - 1)

    # Two deferrals, a gap of 2: four base steps and a block of four, for 1 + 0.5 deferrals; less one step in between.
    assert draft_cost(2.0, 2, 0.5, base, assistant) == pytest.approx((4 + 8.6) / 1.5 - 1)
    # Plain decoding reads what the assistant has missed since it was last asked.
    plain = plain_cost(2, base, assistant)
    late = draft_cost(1.0, 2, 0.5, base, assistant), run_cost(0.0, 2, 0.5, base, assistant)
    assert late == (plain, plain) == pytest.approx((9.2, 9.2))
    # One token further: two steps of the assistant, a block of two, for 1 + 0.5 tokens.
    assert run_cost(1.0, 2, 0.5, base, assistant) == pytest.approx((16.2 + 1.1) / 1.5)
    assert best_draft(3.3, 0.0, 0.0, base, assistant) == (1, 0)
    deferrals, run_length = best_draft(3.3, 0.9, 0.3, base, assistant)
    assert deferrals > 3 and run_length == 0
    # A cheap assistant in long runs drafts for the base.
    deferrals, run_length = best_draft(1.5, 0.5, 0.9, assistant, base)
    assert deferrals == 1 and run_length > 2
    assert best_draft(1.0, 1.0, 0.0, base, assistant)[0] == 16


def test_pass_costs_find_the_line() -> None:
    costs = PassCosts()
    rng = np.random.default_rng(0)
    for _ in range(300):
        tokens = int(rng.integers(1, 20))
        costs.observe(1, tokens, 0.05 + 0.004 * tokens + rng.normal(0, 0.001))
    assert costs.block(1) == pytest.approx(0.054, rel=0.05) and costs.block(16) == pytest.approx(0.114, rel=0.05)
    costs.observe(1, 1, 5.0)
    assert costs.block(1) < 0.08
    batch = PassCosts()
    for _ in range(50):
        batch.observe(4, 4, 0.1)
    assert batch.block(1) == pytest.approx(0.025, rel=0.01)


def test_costs_of_many_numbers_of_tokens_are_those_of_each() -> None:
    """On a measured curve, a dip in it included."""
    experience = Experience()
    experience.expect(0, [(1, 1.0), (8, 1.4), (16, 1.3), (32, 2.0), (128, 5.0)])
    costs = experience.costs[0]
    tokens = np.array([0.5, 1.0, 3.0, 8.0, 12.0, 16.0, 17.0, 40.0, 128.0, 300.0])
    for rows in (1, 4):
        one_by_one = [costs.pass_seconds(rows * each) / rows for each in tokens]
        assert costs.blocks(rows)(tokens) == pytest.approx(one_by_one)
    assert costs.pass_seconds(12) == costs.pass_seconds(16) == pytest.approx(1.4)


class Clocked(LanguageModel):
    """A fake whose passes take as long as one says, on a clock of its own."""

    name, eos_token_ids = "", frozenset()  # type: ignore[assignment]

    def __init__(self, model: FakeModel, clock: list[float], alpha: float, beta: float) -> None:
        self._model, self._clock, self._alpha, self._beta = model, clock, alpha, beta
        self.name, self.eos_token_ids = model.name, model.eos_token_ids  # type: ignore[misc]

    def predict(self, queries: Sequence[Query]) -> Replies:
        self._clock[0] += self._alpha + self._beta * sum(query.num_last for query in queries)
        return self._model.predict(queries)


def test_a_measured_curve_has_a_knee() -> None:
    """As on a GPU: 128 tokens cost what one costs, then they begin to count. A machine that is busy is slower by a
    factor, which is learnt."""
    experience = Experience()
    experience.expect(0, [(1, 1.0), (128, 1.0), (256, 2.0)])
    experience.expect(1, [])
    assert not experience.knows(1) and 1 not in experience.costs
    experience.expect(1, [(1, 4.0), (128, 4.0), (256, 8.0)])
    assert experience.knows(1)
    costs = experience.costs[0]
    assert [costs.pass_seconds(tokens) for tokens in (0.5, 1, 100, 192, 256, 384)] == [1, 1, 1, 1.5, 2, 3]
    for _ in range(100):
        experience.observe_pass(0, 16, 64, 1.5)
    assert costs.pass_seconds(192) == pytest.approx(2.25) and costs.block(8) == pytest.approx(1.5 / 16, rel=0.05)
    assert AdaptivePace(experience).deferrals(1) > 1


def seconds_of_sixteen(experience: Experience, shared: bool) -> float:
    """Of 16 texts at once, where a pass of the base takes a second and one of the assistant seven, whatever its rows;
    for each token of a text."""
    clock, ended, models = [0.0], list[Finished](), fakes(1, agreement=0.95)
    scheduler = Scheduler(models, experience=experience, clock=lambda: clock[0], post=lambda call: call())
    [device] = scheduler.devices
    if not shared:
        experience.share_device([])
    for n in range(16):
        text, params = Text([(n % V, n // V)] * 2), SamplingParams(max_tokens=128, seed=n)
        flow = speculative(text, params, Random(0.3, 1), [frozenset()] * 2, AdaptivePace(experience))
        scheduler.submit(n, flow, text, 128, lambda event: ended.append(event) if isinstance(event, Finished) else None)
    scheduler.admit()
    while len(ended) < 16:
        batch = scheduler.next_pass(device)
        assert batch is not None
        seconds = (1.0, 7.0)[batch.model]
        clock[0] += seconds
        scheduler.finish(device, batch, models[batch.model].predict(batch.queries), seconds)
    assert all(each.finish_reason == "length" for each in ended)
    return clock[0] / 128


def test_texts_draft_in_step_where_a_pass_over_many_costs_what_one_over_one_does() -> None:
    """A dear assistant judges all texts at once, and no place in a pass of the base is empty. Where passes of both
    overlap, on other devices, or costs are unknown, each text goes at its own pace."""
    seconds = {}
    for shared in (True, False):
        experience = Experience()
        experience.expect(0, [(1, 1.0), (128, 1.0), (256, 1.0)])
        experience.expect(1, [(1, 7.0), (128, 7.0), (256, 7.0)])
        seconds[shared] = seconds_of_sixteen(experience, shared)
        assert (experience.stride(1) is not None) == (shared and experience.costs[0].rows >= 1.5)
    assert seconds[True] < 0.92 * seconds[False]
    unknown = Experience()
    seconds_of_sixteen(unknown, True)
    assert unknown.stride(1) is None


@pytest.mark.parametrize("agreement", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("ratio", [0.2, 1.0, 8.0])
def test_the_adaptive_pace_gains_where_there_is_something_to_gain(agreement: float, ratio: float) -> None:
    clock = [0.0]
    base, assistant = fakes(1, agreement=agreement)
    models: Any = [Clocked(base, clock, 1.0, 0.03), Clocked(assistant, clock, ratio, 0.03 * ratio)]
    policy, experience = Random(0.3, 1), Experience()
    seconds = {False: 0.0, True: 0.0}
    for n in range(16):
        params = SamplingParams(max_tokens=64, seed=n)
        for fast in (False, True):
            clock[0] = 0.0
            own = AdaptivePace(experience) if fast else FixedPace()
            text = writing(speculative, [(n % V, n // V)] * 2, params, policy, [frozenset()] * 2, own)
            list(run([text], models, experience=experience, clock=lambda: clock[0]))
            seconds[fast] += clock[0]
    gain = seconds[False] / seconds[True]
    assert gain > 0.97
    if agreement >= 0.9 and ratio >= 8:
        assert gain > 1.3
    if agreement == 0.0 and ratio == 8:
        assert gain < 1.1  # nothing to be had: 1 + 1/8 if every base step were free


def broken(models: list[FakeModel], *, raises: bool, at: int) -> list[Any]:
    """The assistant fails for prompts that begin with 9, from a length on."""

    class Broken(FakeModel):
        def predict(self, queries: Sequence[Query]) -> Replies:
            bad = [query.view.token_ids[0] == 9 and query.length >= at for query in queries]
            if raises and any(bad):
                raise RuntimeError("out of ink")
            return [
                [Fault("a1: out of ink")] * query.num_last if is_bad else models[1].predict([query])[0]
                for query, is_bad in zip(queries, bad, strict=True)
            ]

    return [models[0], Broken("a1", V)]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_a_failing_assistant_costs_one_text(raises: bool, fast: bool) -> None:
    healthy = fakes(1)
    models = broken(healthy, raises=raises, at=6)
    params, policy = SamplingParams(max_tokens=12), Threshold.of_probability(0.3)
    prompts = [(1, 2), (9, 2), (3, 2)]

    def events(among: Sequence[Any], chosen: SamplingParams) -> dict[int, list[Any]]:
        pace = FixedPace(3) if fast else FixedPace()
        flows = [writing(speculative, [p, p], chosen, policy, [frozenset()] * 2, pace) for p in prompts]
        found: dict[int, list[Any]] = {n: [] for n in range(3)}
        for n, event in run(flows, among, 3):
            found[n].append(event)
        return found

    whole, found = events(healthy, params), events(models, params)
    for n in (0, 2):
        assert found[n][:-1] == whole[n][:-1] and found[n][-1].finish_reason == "length"
    failed = found[1][-1]
    assert failed.finish_reason == "error" and "out of ink" in failed.error and "a1" in failed.error
    assert plainly(found[1][:-1]) == plainly(whole[1][: len(found[1]) - 1]) and len(found[1]) > 1
    rescued = events(models, replace(params, on_assistant_error="base"))[1]
    assert rescued[-1].finish_reason == "length" and len(rescued) == 13
    faults = [step for step in rescued[:-1] if step.fault]
    assert faults and all(step.abstained and step.author == BASE and "out of ink" in step.fault for step in faults)


def test_a_failing_base_ends_the_text() -> None:
    class Base(FakeModel):
        def answer(self, token_ids: Sequence[int], *how: Any) -> Reply:
            return Fault("base: not a number") if len(token_ids) == 7 else super().answer(token_ids, *how)

    models = [Base("base", V, num_assistants=1), FakeModel("a1", V)]
    for pace in (None, FixedPace(8), FixedPace(1, 8)):
        steps, finished = texts(models, SamplingParams(max_tokens=12), Always(), pace)
        assert (finished.finish_reason, finished.error, len(steps)) == ("error", "base: not a number", 4)


def clocked(
    clock: list[float], rates: Sequence[float], patience: float, tokens: int = 48
) -> tuple[float, dict[int, float], list[list[int]]]:
    """Seconds of a batch whose texts defer at these rates to a dear assistant; when each ended; what they wrote."""
    clock[0] = 0.0
    base, assistant = fakes(1, agreement=0.5)
    models: Any = [Clocked(base, clock, 1.0, 0.01), Clocked(assistant, clock, 8.0, 0.1)]
    flows = [
        writing(
            speculative,
            [(n % V, n // V)] * 2,
            SamplingParams(max_tokens=tokens, seed=n),
            Random(rate, 1),
            [frozenset()] * 2,
            FixedPace(),
        )
        for n, rate in enumerate(rates)
    ]
    ended: dict[int, float] = {}
    written: list[list[int]] = [[] for _ in rates]
    for number, event in run(flows, models, len(rates), patience=patience, clock=lambda: clock[0]):
        if isinstance(event, Step):
            written[number].append(event.token_id)
        else:
            ended[number] = clock[0]
    return clock[0], ended, written


def test_texts_wait_for_one_another_at_a_dear_assistant() -> None:
    clock = [0.0]
    at_once, _, expected = clocked(clock, [0.3] * 16, 0)
    gathered, _, written = clocked(clock, [0.3] * 16, 1)
    assert written == expected and gathered < 0.75 * at_once
    # One text that defers, among others that never do, is not left waiting for them.
    _, impatient, _ = clocked(clock, [0.3, *[0.0] * 15], 0, tokens=200)
    _, patient, _ = clocked(clock, [0.3, *[0.0] * 15], 1, tokens=200)
    assert patient[0] < 2.1 * impatient[0]
