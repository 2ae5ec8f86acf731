"""The batched driver as an engine: admission, fairness, cancellation, a thousand requests."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from collm.decoding.collaborative import Flow
from collm.decoding.pace import FixedPace
from collm.decoding.policies import Threshold
from collm.decoding.run import Engine, Finished, run
from collm.decoding.speculative import speculative
from collm.models.fake import FakeModel
from collm.sampling_params import SamplingParams
from collm.types import Step

V = 5
MODELS = [FakeModel("base", V, num_assistants=1, agreement=0.5), FakeModel("a1", V, agreement=0.5)]


def flow(seed: int, max_tokens: int = 8, deferrals: int = 3) -> Flow:
    prompt = (seed % V, seed // V % V, seed // V**2 % V)
    params = SamplingParams(max_tokens=max_tokens, seed=seed)
    return speculative([prompt] * 2, params, Threshold.of_probability(0.5), [frozenset()] * 2, FixedPace(deferrals))


def text(seed: int, max_tokens: int = 8) -> list[int]:
    return [event.token_id for _, event in run([flow(seed, max_tokens)], MODELS) if isinstance(event, Step)]


def drain(engine: Engine) -> dict[int, list[Step | Finished]]:
    found: dict[int, list[Step | Finished]] = {}
    while engine.num_unfinished:
        for number, event in engine.step():
            found.setdefault(number, []).append(event)
    return found


def tokens(events: Sequence[Step | Finished]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Step)]


def test_a_request_joins_a_running_batch() -> None:
    engine = Engine(MODELS, 4)
    found: dict[int, list[Step | Finished]] = {}
    for seed in range(6):
        assert engine.submit(flow(seed)) == seed
        for number, event in engine.step():
            found.setdefault(number, []).append(event)
    for number, events in drain(engine).items():
        found.setdefault(number, []).extend(events)
    assert {number: tokens(events) for number, events in found.items()} == {n: text(n) for n in range(6)}


@pytest.mark.parametrize("rounds", range(12))
def test_cancelled_at_any_point(rounds: int) -> None:
    engine = Engine(MODELS, 2)
    numbers = [engine.submit(flow(seed)) for seed in range(4)]
    found: dict[int, list[Step | Finished]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number, event in engine.step():
            found[number].append(event)
    before = len(found[1])
    ended = engine.cancel(1)
    assert ended is not None and ended.finish_reason == "cancelled" and ended.usage.completion_tokens == before
    waiting = engine.cancel(3)
    for number, events in drain(engine).items():
        found[number].extend(events)
    assert engine.cancel(1) is None and len(found[1]) == before
    assert tokens(found[0]) == text(0) and tokens(found[2]) == text(2)
    assert waiting is None or not any(isinstance(event, Finished) for event in found[3])


def test_cancelled_by_whoever_reads_its_events() -> None:
    engine = Engine(MODELS, 3)
    for seed in range(3):
        engine.submit(flow(seed))
    seen: list[int] = []
    while engine.num_unfinished:
        for number, _ in engine.step():
            seen.append(number)
            if number == 0:
                engine.cancel(1)
    assert 1 not in seen[seen.index(0) :]


def test_first_come_first_served() -> None:
    engine = Engine(MODELS, 2)
    for seed in range(10):
        engine.submit(flow(seed))
    order = []
    while engine.num_unfinished:
        for number, event in engine.step():
            if isinstance(event, Finished):
                order.append(number)
    assert all(abs(place - number) <= 2 for place, number in enumerate(order))


def test_a_thousand_requests() -> None:
    most = 0

    def fits(lengths: Sequence[tuple[int, ...]]) -> bool:
        nonlocal most
        most = max(most, len(lengths))
        return True

    engine = Engine(MODELS, 16, fits=fits)
    for seed in range(1000):
        engine.submit(flow(seed % 125, max_tokens=4), (7, 7))
    found = drain(engine)
    assert most == 16 and len(found) == 1000
    assert all(isinstance(events[-1], Finished) and events[-1].finish_reason == "length" for events in found.values())
    assert tokens(found[640]) == text(640 % 125, 4)


def test_texts_wait_until_the_caches_have_room() -> None:
    def fits(lengths: Sequence[tuple[int, ...]]) -> bool:
        return sum(base for base, _ in lengths) <= 20

    engine = Engine(MODELS, 8, fits=fits)
    for seed, length in enumerate((12, 12, 8, 30, 8)):
        engine.submit(flow(seed), (length, length))
    first = {number for number, _ in engine.step()}
    assert first <= {0}
    found = drain(engine)
    assert isinstance(found[3][-1], Finished) and found[3][-1].finish_reason == "error"
    assert "30 tokens" in str(found[3][-1].error)
    for number in (1, 2, 4):
        assert tokens(found[number]) == text(number)


def test_usage_adds_up() -> None:
    for deferrals in (1, 4):
        events = [event for _, event in run([flow(3, 40, deferrals)], MODELS)]
        finished = events[-1]
        assert isinstance(finished, Finished)
        usage = finished.usage
        assert usage.completion_tokens == 40 == sum(usage.tokens_by_author)
        assert usage.tokens_by_author[1] == sum(isinstance(event, Step) and event.deferred for event in events)
        assert usage.forward_passes[0] >= 40 and 0 < usage.first_token_seconds < usage.seconds
        assert (usage.drafted > 0) == (deferrals > 1) and usage.tokens_per_second > 0
