"""The engine: admission, fairness, cancellation, faults; and that its threads write what its plain twin writes."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from queue import SimpleQueue
from typing import Any

import pytest
from flows import alone, writing
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_on import WritingOn

from collm.decoding.collaborative import Flow, collaborative, single
from collm.decoding.experience import FIRST_PIECE, SHORTEST_PIECE, Experience
from collm.decoding.pace import FixedPace
from collm.decoding.policies import Never, Threshold
from collm.decoding.speculative import speculative
from collm.engine import Engine, Event, Finished, Twin, run
from collm.engine.passes import answers
from collm.engine.scheduler import Scheduler
from collm.engine.turns import ON_THEIR_OWN, TOLD, Turn
from collm.engine.twin import Writing
from collm.errors import CollmError
from collm.models.fake import FakeModel
from collm.sampling_params import SamplingParams
from collm.types import Step
from collm.values import Extend, LanguageModel, Query, Replies, Reply, StreamingModel
from collm.views import Text

V = 5
MODELS = [FakeModel("base", V, num_assistants=1, agreement=0.5), FakeModel("a1", V, agreement=0.5)]
POLICY, EOS = Threshold.of_probability(0.5), [frozenset[int]()] * 2


def prompt_of(seed: int) -> tuple[int, ...]:
    return (seed % V, seed // V % V, seed // V**2 % V)


def flow(seed: int, max_tokens: int = 8, deferrals: int = 3) -> Writing:
    params = SamplingParams(max_tokens=max_tokens, seed=seed)
    return writing(speculative, [prompt_of(seed)] * 2, params, POLICY, EOS, FixedPace(deferrals))


def text(seed: int, max_tokens: int = 8) -> list[int]:
    return tokens([event for _, event in run([flow(seed, max_tokens)], MODELS)])


def tokens(events: Sequence[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Step)]


def drain(engine: Twin, found: dict[int, list[Event]] | None = None) -> dict[int, list[Event]]:
    found = {} if found is None else found
    while engine.num_unfinished or engine.events:
        for number, event in engine.step():
            found.setdefault(number, []).append(event)
    return found


def once(events: Sequence[Event]) -> Finished:
    """A text has exactly one end, and it comes last."""
    ends = [event for event in events if isinstance(event, Finished)]
    assert len(ends) == 1 and events[-1] is ends[0]
    return ends[0]


# -- whose turn it is


def test_a_request_joins_a_running_batch() -> None:
    engine, found = Twin(MODELS, 4), dict[int, list[Event]]()
    for seed in range(6):
        assert engine.submit(*flow(seed)) == seed
        for number, event in engine.step():
            found.setdefault(number, []).append(event)
    drain(engine, found)
    assert {number: tokens(events) for number, events in found.items()} == {n: text(n) for n in range(6)}


@pytest.mark.parametrize("rounds", range(12))
def test_cancelled_at_any_point(rounds: int) -> None:
    engine, found = Twin(MODELS, 2), dict[int, list[Event]]()
    for seed in range(4):
        engine.submit(*flow(seed))
    for _ in range(rounds):
        for number, event in engine.step():
            found.setdefault(number, []).append(event)
    for number in (1, 3, 3):
        engine.cancel(number)
    drain(engine, found)
    engine.cancel(1)
    assert tokens(found[0]) == text(0) and tokens(found[2]) == text(2)
    for number in range(4):
        end = once(found[number])
        assert end.usage.completion_tokens == len(found[number]) - 1
        assert number in (0, 2) or end.finish_reason == "cancelled" or tokens(found[number]) == text(number)


def test_cancelled_by_whoever_is_told_its_events() -> None:
    """Its flow is on the stack at that moment (review H6)."""
    engine = Twin(MODELS, 3)
    told: dict[int, list[Event]] = {n: [] for n in range(3)}

    def sink(number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            told[number].append(event)
            engine.scheduler.cancel(1)  # the text itself, and from another's event

        return tell

    for number in range(3):
        engine.scheduler.submit(number, *flow(number), sink(number))
    drain(engine)
    assert once(told[1]).finish_reason == "cancelled" and len(told[1]) <= 2
    assert tokens(told[0]) == text(0) and tokens(told[2]) == text(2)


def test_first_come_first_served() -> None:
    engine = Twin(MODELS, 2)
    for seed in range(10):
        engine.submit(*flow(seed))
    order = []
    while engine.num_unfinished:
        order += [number for number, event in engine.step() if isinstance(event, Finished)]
    assert all(abs(place - number) <= 2 for place, number in enumerate(order))


class Roomy(FakeModel):
    """Holds a number of tokens in all."""

    def __init__(self, room: int, **kwargs: Any) -> None:
        super().__init__("base", V, num_assistants=1, agreement=0.5, **kwargs)
        self.room, self.most = room, 0

    def fits(self, lengths: Sequence[int]) -> bool:
        self.most = max(self.most, len(lengths) if sum(lengths) <= self.room else 0)
        return sum(lengths) <= self.room


def test_a_thousand_requests() -> None:
    base = Roomy(10**6)
    engine = Twin([base, MODELS[1]], 16)
    for seed in range(1000):
        engine.submit(*flow(seed % 125, max_tokens=4))
    found = drain(engine)
    assert base.most == 16 and len(found) == 1000
    assert all(once(events).finish_reason == "length" for events in found.values())
    assert tokens(found[640]) == text(640 % 125, 4)


def test_texts_wait_until_the_caches_have_room() -> None:
    engine = Twin([Roomy(20), MODELS[1]], 8)
    for seed, length in enumerate((10, 10, 6, 6)):
        engine.submit(*flow(seed, length))  # each takes two tokens more, for its prompt
    with pytest.raises(CollmError, match=r"28 tokens .* base: raise max_cache_tokens to at least 28"):
        engine.submit(*flow(4, 26))
    found: dict[int, list[Event]] = {}
    for number, event in engine.step():
        found.setdefault(number, []).append(event)
    assert set(found) <= {0}
    drain(engine, found)
    assert {number: tokens(events) for number, events in found.items()} == {
        number: text(number, length) for number, length in enumerate((10, 10, 6, 6))
    }


def test_usage_adds_up() -> None:
    for deferrals in (1, 4):
        events = [event for _, event in run([flow(3, 40, deferrals)], MODELS)]
        usage = once(events).usage
        assert usage.completion_tokens == 40 == sum(usage.tokens_by_author)
        assert usage.tokens_by_author[1] == sum(isinstance(event, Step) and event.deferred for event in events)
        assert usage.forward_passes[0] >= 40 and 0 < usage.first_token_seconds < usage.seconds
        assert (usage.drafted > 0) == (deferrals > 1) and usage.tokens_per_second > 0


class Reading(FakeModel):
    """Knows what it has read of each text, and how much each pass had to read."""

    def __init__(self, name: str = "base", clock: list[float] | None = None, per_token: float = 0.0001) -> None:
        super().__init__(name, V, num_assistants=1 if name == "base" else None)
        self.per_token = per_token
        self.held: dict[object, int] = {}
        self.passes: list[tuple[int, int]] = []
        self.clock = [0.0] if clock is None else clock

    def missing(self, query: Query) -> int:
        return max(query.num_last, query.length - self.held.get(query.view, 0))

    def predict(self, queries: Sequence[Query]) -> Replies:
        read = sum(map(self.missing, queries))
        self.passes.append((len(queries), read))
        self.clock[0] += 0.01 + self.per_token * read
        for query in queries:
            self.held[query.view] = query.length
        return super().predict(queries)


def test_a_long_prompt_is_read_in_pieces_and_a_short_text_does_not_wait_for_it() -> None:
    model = Reading()
    params = SamplingParams(max_tokens=3)
    engine = Twin([model], clock=lambda: model.clock[0])
    engine.submit(*alone(0, [[1] * 8000], params, EOS))
    engine.submit(*alone(0, [[2] * 20], params, EOS))
    found: dict[int, list[Event]] = {0: [], 1: []}
    while not found[1]:
        for number, event in engine.step():
            found[number].append(event)
    assert len(model.passes) == 1  # it was eight
    drain(engine, found)
    assert len(tokens(found[0])) == 3 == len(tokens(found[1]))
    assert sum(read for _, read in model.passes) == 8000 + 20 + 2 * 2
    assert max(read for _, read in model.passes) <= 1024


def test_a_long_prompt_delays_the_others_by_a_usual_round_at_most() -> None:
    clock = [0.0]
    model = Reading(clock=clock)
    engine = Twin([model], clock=lambda: clock[0])
    for n in range(4):
        engine.submit(*alone(0, [[n] * 5], SamplingParams(max_tokens=400), EOS))
    for _ in range(40):
        engine.step()
    before = clock[0]
    engine.step()
    usual = clock[0] - before
    engine.submit(*alone(0, [[1] * 6000], SamplingParams(max_tokens=2), EOS))
    delays = []
    for _ in range(80):
        before = clock[0]
        engine.step()
        delays.append(clock[0] - before)
    # While nothing is known of what reading costs, the first piece is a guess.
    assert all(delay < 2.2 * usual for delay in delays[1:])
    assert max(model.held.values()) >= 6000, "and it gets on"


@pytest.mark.parametrize(("per_token", "most"), [(0.0001, 6), (0.01, 6), (0.1, 17), (1.0, 140)])
def test_no_piece_comes_near_the_time_out(per_token: float, most: int) -> None:
    """Alone or beside others, from the first pass on; and a machine that is quick loses one short pass."""
    for others in (0, 3):
        clock, timeout = [0.0], 120.0
        model = Reading(clock=clock, per_token=per_token)
        found: list[Event] = []
        scheduler = Scheduler([model], timeout=timeout, clock=lambda: clock[0], post=lambda call: call())  # noqa: B023
        scheduler.submit(0, *alone(0, [[1] * 4000], SamplingParams(max_tokens=2), EOS), found.append)
        for n in range(others):
            own = alone(0, [[2 + n] * 5], SamplingParams(max_tokens=8), EOS)
            scheduler.submit(1 + n, *own, lambda event: None)
        [device] = scheduler.devices
        while scheduler.running or scheduler.waiting:
            scheduler.admit()
            batch = scheduler.next_pass(device)
            assert batch is not None
            began = clock[0]
            replies = answers(model, batch.queries)
            assert clock[0] - began < timeout / 2
            scheduler.finish(device, batch, replies, clock[0] - began)
        assert once(found).finish_reason == "length"
        assert others or len(model.passes) <= most


def test_prompts_that_come_together_are_read_together() -> None:
    """Each may delay the others by most of a usual pass; in passes of their own they would never share one again."""
    clock = [0.0]
    base, helper = Reading(clock=clock), Reading("a1", clock)
    engine = Twin([base, helper], clock=lambda: clock[0])
    warm = [alone(model, [[9] * 5] * 2, SamplingParams(max_tokens=20), EOS) for model in (0, 1)]
    for own in warm:
        engine.submit(*own)
    drain(engine)
    base.passes.clear()
    helper.passes.clear()
    engine.submit(*alone(0, [[8] * 5] * 2, SamplingParams(max_tokens=30), EOS))
    engine.step()
    for n in range(6):
        engine.submit(*alone(1, [[n] * 90] * 2, SamplingParams(max_tokens=5), EOS))
    drain(engine)
    assert {rows for rows, _ in helper.passes} == {6} and helper.passes[-4:] == [(6, 6)] * 4
    assert sum(tokens for _, tokens in helper.passes) == 6 * (90 + 4) and len(helper.passes) <= 6


def test_between_two_pieces_of_an_assistant_the_base_has_its_turn() -> None:
    clock = [0.0]
    order: list[str] = []

    class Noted(Reading):
        def predict(self, queries: Sequence[Query]) -> Replies:
            order.append(self.name)
            return super().predict(queries)

    engine = Twin([Noted(clock=clock), Noted("a1", clock)], clock=lambda: clock[0])
    for model in (0, 1):
        engine.submit(*alone(model, [[9] * 5] * 2, SamplingParams(max_tokens=20), EOS))
    drain(engine)
    engine.submit(*alone(0, [[8] * 5] * 2, SamplingParams(max_tokens=200), EOS))
    engine.step()
    order.clear()
    engine.submit(*alone(1, [[7] * 3000] * 2, SamplingParams(max_tokens=1), EOS))
    drain(engine)
    pieces = [n for n, name in enumerate(order) if name == "a1"]
    assert len(pieces) > 5 and all(later - sooner > 1 for sooner, later in zip(pieces, pieces[1:], strict=False))


@settings(max_examples=60)
@given(
    plan=st.lists(
        st.tuples(st.sampled_from(["submit", "cancel", "step"]), st.integers(0, 30), st.integers(1, 9)), max_size=40
    ),
    seats=st.integers(1, 4),
)
def test_whatever_happens_every_text_has_one_end_and_is_its_own(plan: list[tuple[str, int, int]], seats: int) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 0.001
        return clock[0]

    engine, found = Twin(MODELS, seats, clock=tick), dict[int, list[Event]]()
    asked: list[tuple[int, int]] = []
    cancelled = set()
    for what, which, length in plan:
        if what == "submit":
            asked.append((which, length))
            engine.submit(*flow(which, length))
        elif what == "cancel" and asked:
            cancelled.add(which % len(asked))
            engine.cancel(which % len(asked))
        else:
            for number, event in engine.step():
                found.setdefault(number, []).append(event)
    drain(engine, found)
    for number, (seed, length) in enumerate(asked):
        end = once(found[number])
        whole = text(seed, length)
        assert tokens(found[number]) == whole[: len(found[number]) - 1]
        assert end.finish_reason == ("length" if len(tokens(found[number])) == length else "cancelled")
        assert number in cancelled or end.finish_reason == "length"


@settings(max_examples=60)
@given(
    plan=st.lists(
        st.tuples(
            st.sampled_from(["submit", "breaks", "reads", "cancel", "step", "step"]),
            st.integers(0, 30),
            st.integers(1, 9),
        ),
        max_size=30,
    ),
    every=st.integers(2, 7),
    how=st.sampled_from(["raises", "forgets", "mumbles"]),
    served=st.booleans(),
)
def test_whatever_fails_every_text_has_one_end(
    plan: list[tuple[str, int, int]], every: int, how: str, served: bool
) -> None:
    """Flows that raise, models that fail now and then, long prompts, servers, and texts cancelled in every state."""
    clock = [0.0]
    base = Reading(clock=clock)
    helper: LanguageModel = Streaming(MODELS[1], 3) if served else Faulty(every, how)
    engine, found = Twin([base, helper], 3, clock=lambda: clock[0]), dict[int, list[Event]]()
    submitted = 0
    for what, which, length in plan:
        if what == "cancel":
            engine.cancel(which % max(1, submitted))
        elif what == "step":
            clock[0] += 0.001
            for number, event in engine.step():
                found.setdefault(number, []).append(event)
        else:
            long = alone(0, [[which % V] * 700] * 2, SamplingParams(max_tokens=length), EOS)
            own = {"submit": flow(which, length), "breaks": raises_at(length // 2, which), "reads": long}[what]
            engine.submit(*own)
            submitted += 1
    drain(engine, found)
    assert set(found) == set(range(submitted))
    for events in found.values():
        end = once(events)
        assert end.usage.completion_tokens == len(events) - 1
        assert (end.error is not None) == (end.finish_reason == "error")
    assert engine.num_unfinished == 0 and all(
        engine.scheduler.next_pass(key) is None for key in engine.scheduler.devices
    )


def test_a_text_is_cancelled_while_its_pass_runs_or_hangs() -> None:
    model = Hangs(at=1)
    engine = Engine([MODELS[0], model])
    number, events = told_by(engine, alone(1, [prompt_of(1)] * 2, SamplingParams(max_tokens=5), EOS))
    waiting, others = told_by(engine, alone(1, [prompt_of(2)] * 2, SamplingParams(max_tokens=5), EOS))
    while not model.count:
        time.sleep(0.005)
    for each, own in ((number, events), (waiting, others)):
        engine.cancel(each)
        assert once(read(own)).finish_reason == "cancelled"
    assert engine.load.running == 0
    model.go.set()
    _, again = told_by(engine, alone(1, [prompt_of(3)] * 2, SamplingParams(max_tokens=5), EOS))
    assert once(read(again)).finish_reason == "length"
    engine.cancel(number)
    engine.close()


# -- faults


def raises_at(position: int, seed: int) -> Writing:
    own, about, max_tokens = flow(seed)

    def broken() -> Flow:
        reply, count = None, 0
        while True:
            event = own.send(reply)
            if isinstance(event, Step):
                count += 1
                if count > position:
                    raise ZeroDivisionError("a fault of the flow")
            reply = yield event

    return broken(), about, max_tokens


def test_a_flow_that_raises_costs_no_other(caplog: pytest.LogCaptureFixture) -> None:
    found: dict[int, list[Event]] = {n: [] for n in range(3)}
    for number, event in run([flow(0), raises_at(3, 1), flow(2)], MODELS):
        found[number].append(event)
    end = once(found[1])
    assert (end.finish_reason, end.error) == ("error", "ZeroDivisionError: a fault of the flow")
    assert "ZeroDivisionError" in caplog.text and tokens(found[1]) == text(1)[:3]
    assert tokens(found[0]) == text(0) and tokens(found[2]) == text(2)


class Faulty(FakeModel):
    """Fails in every k-th pass: raises, or answers too little."""

    def __init__(self, every: int, how: str) -> None:
        super().__init__("a1", V, agreement=0.5)
        self.every, self.how, self.count = every, how, 0

    def predict(self, queries: Sequence[Query]) -> Replies:
        self.count += 1
        found = super().predict(queries)
        if self.count % self.every:
            return found
        if self.how == "raises":
            raise RuntimeError("out of ink")
        return found[:-1] if self.how == "forgets" else [[] for _ in found]


@pytest.mark.parametrize("how", ["raises", "forgets", "mumbles"])
def test_a_model_that_fails_now_and_then(how: str) -> None:
    """A failed pass is asked again text by text, so only a text whose own pass fails has a fault."""
    models = [MODELS[0], Faulty(3, how)]
    found: dict[int, list[Event]] = {n: [] for n in range(8)}
    for number, event in run([flow(n, 20) for n in range(8)], models, 4):
        found[number].append(event)
    reasons = {once(events).finish_reason for events in found.values()}
    assert "error" in reasons and reasons <= {"length", "error"}
    for number, events in found.items():
        assert tokens(events) == text(number, 20)[: len(events) - 1]
        end = once(events)
        assert end.error is None or "a1" in end.error


class Hangs(FakeModel):
    """Its n-th pass comes back when it is told to."""

    def __init__(self, at: int = 3) -> None:
        super().__init__("a1", V, agreement=0.5)
        self.at, self.count, self.go = at, 0, threading.Event()

    @property
    def device(self) -> str:
        return "elsewhere"

    def predict(self, queries: Sequence[Query]) -> Replies:
        self.count += 1
        if self.count == self.at:
            assert self.go.wait(30)
        return super().predict(queries)


def told_by(engine: Engine, own: Writing) -> tuple[int, SimpleQueue[Event]]:
    events: SimpleQueue[Event] = SimpleQueue()
    return engine.submit(*own, events.put), events


def read(events: SimpleQueue[Event]) -> list[Event]:
    found = [events.get(timeout=30)]
    while not isinstance(found[-1], Finished):
        found.append(events.get(timeout=30))
    assert events.empty()
    return found


def test_a_model_that_hangs_ends_its_texts_and_comes_back() -> None:
    model = Hangs()
    engine = Engine([MODELS[0], model], timeout=0.3)
    _, hung = told_by(engine, flow(3, 30, 1))
    end = once(read(hung))
    assert end.finish_reason == "error" and "a1 has not answered within 0.3 seconds" in str(end.error)
    # Meanwhile whoever asks it fails at once, and whoever does not goes on.
    _, other = told_by(engine, alone(0, [prompt_of(5)] * 2, SamplingParams(max_tokens=5), EOS))
    assert once(read(other)).finish_reason == "length"
    _, late = told_by(engine, flow(4, 30, 1))
    assert once(read(late)).finish_reason == "error"
    model.go.set()
    for _ in range(100):
        _, again = told_by(engine, flow(3, 30, 1))
        events = read(again)
        if once(events).finish_reason == "length":
            break
        time.sleep(0.05)
    assert tokens(events) == text(3, 30)
    engine.close()


# -- threads


def test_the_engine_writes_what_its_twin_writes_from_eight_threads() -> None:
    engine = Engine(MODELS, max_num_seqs=5)
    wrong: list[str] = []

    def caller(number: int) -> None:
        rng = random.Random(number)
        for _ in range(12):
            seed, length = rng.randrange(60), rng.randrange(1, 20)
            submitted, events = told_by(engine, flow(seed, length))
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.004)
                engine.cancel(submitted)
            found = read(events)
            whole = text(seed, length)
            if tokens(found) != whole[: len(found) - 1]:
                wrong.append(f"{seed}: {tokens(found)} is not {whole}")
            if once(found).finish_reason != ("length" if len(found) - 1 == length else "cancelled"):
                wrong.append(f"{seed}: {found[-1]}")

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert engine.load.running == engine.load.waiting == 0
    engine.close()


class Sleeps(FakeModel):
    """A network on a device of its own whose passes take a while."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name, V, num_assistants=1 if name == "base" else None, agreement=0.5)
        self.seconds = seconds

    @property
    def device(self) -> str:
        return self.name

    def predict(self, queries: Sequence[Query]) -> Replies:
        time.sleep(self.seconds)
        return super().predict(queries)


def test_networks_of_different_devices_work_at_the_same_time() -> None:
    busy: list[str] = []
    together = []

    class Noted(Sleeps):
        def predict(self, queries: Sequence[Query]) -> Replies:
            busy.append(self.name)
            together.append(len(busy))
            found = super().predict(queries)
            busy.remove(self.name)
            return found

    engine = Engine([Noted("base", 0.005), Noted("a1", 0.01)])
    texts = [
        told_by(engine, alone(model, [prompt_of(1)] * 2, SamplingParams(max_tokens=n), EOS))[1]
        for model, n in ((0, 20), (1, 10))
    ]
    for events in texts:
        once(read(events))
    assert max(together) == 2
    engine.close()


def test_a_closed_engine_ends_its_texts_and_takes_no_more() -> None:
    engine = Engine([Sleeps("base", 0.01), Sleeps("a1", 0.01)], max_num_seqs=1)
    own = [told_by(engine, flow(n, 500))[1] for n in range(3)]
    own[0].get(timeout=10)
    engine.close()
    engine.close()
    for events in own:
        assert once(read(events)).finish_reason == "cancelled"
    with pytest.raises(CollmError, match="closed"):
        engine.submit(*flow(0), lambda event: None)
    engine.cancel(0)


def test_a_pass_that_never_comes_back_keeps_nobody_waiting_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the driver runs the passes itself."""

    class Here(Hangs):
        device = "cpu"  # type: ignore[assignment]

    monkeypatch.setattr("collm.engine.engine.PATIENCE_AT_CLOSE", 0.05)
    model = Here(at=1)
    engine = Engine([MODELS[0], model])
    own = [told_by(engine, alone(1, [prompt_of(n)] * 2, SamplingParams(max_tokens=5), EOS))[1] for n in range(2)]
    while not model.count:
        time.sleep(0.005)
    late = told_by(engine, flow(3))[1]
    engine.close()
    for events in (*own, late):
        assert once(read(events)).finish_reason == "cancelled"
    model.go.set()
    for thread in engine._driver._threads:
        thread.join(10)
        assert not thread.is_alive()
    assert all(events.empty() for events in (*own, late)), "nothing comes behind the end"


def test_an_engine_that_nobody_holds_stops_its_threads() -> None:
    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("collm")}

    before = threads()
    engine = Engine(MODELS)
    once(read(told_by(engine, flow(0))[1]))
    assert threads() - before
    del engine
    gc.collect()
    for _ in range(100):
        if not threads() - before:
            break
        time.sleep(0.02)
    assert not threads() - before


def test_a_reader_that_fails_costs_no_other() -> None:
    engine = Engine(MODELS)

    def broken(event: Event) -> None:
        raise RuntimeError("nobody listens")

    engine.submit(*flow(1), broken)
    assert tokens(read(told_by(engine, flow(2))[1])) == text(2)
    engine.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_is_told() -> None:
    program = """
import os
from test_engine import MODELS, flow, read, told_by
from collm.engine import Engine
from collm.errors import CollmError
engine = Engine(MODELS)
read(told_by(engine, flow(1))[1])
child = os.fork()
if not child:
    try:
        engine.submit(*flow(1), print)
    except CollmError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
"""
    assert "fork" in run_python(program)


def test_whoever_reads_on_behind_a_fork_is_told() -> None:
    program = """
import os
from conftest import make_tokenizer
from test_engine import Sleeps
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.llm import CollaborativeLM
llm = CollaborativeLM([Sleeps("base", 0.01), Sleeps("a1", 0.01)], [Formatter(make_tokenizer(chat_template=None))] * 2)
ways = [llm.stream("a", max_tokens=9), (made for made in llm.generate_each(["a", "a b"], batch_size=1, max_tokens=9))]
for way in ways:
    next(way)
child = os.fork()
if not child:
    for way in ways:
        try:
            for _ in way:
                pass
        except CollmError as error:
            print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
for way in ways:
    assert list(way)
"""
    assert run_python(program).count("fork") == 2


def test_the_interpreter_ends_with_texts_running() -> None:
    program = """
from test_engine import Sleeps, flow, told_by
from collm.engine import Engine
engine = Engine([Sleeps("base", 0.01), Sleeps("a1", 0.01)])
told_by(engine, flow(1, 10_000))[1].get()
print("written")
"""
    assert "written" in run_python(program)


def run_python(program: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, [os.path.dirname(__file__), *sys.path]))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


# -- models that write on by themselves


class Streaming(StreamingModel):
    """A fake behind an imagined server: a thread for each request; it stops where its policy defers."""

    def __init__(self, model: FakeModel, at_most: int = 10**6) -> None:
        self.model, self.at_most = model, at_most
        self.requests: list[Query | Extend] = []
        self.cancelled = 0

    @property
    def name(self) -> str:
        return self.model.name

    def predict(self, queries: Sequence[Query]) -> Replies:
        return self.model.predict(queries)

    def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
        self.requests.append(request)
        stopped = threading.Event()

        def cancel() -> None:
            self.cancelled += 1
            stopped.set()

        def work() -> None:
            if isinstance(request, Query):
                deliver(self.model.predict([request])[0])
                return
            ids, start = list(request.view.token_ids), request.view.prompt_length
            for _ in range(min(request.max_tokens, self.at_most)):
                if stopped.is_set():
                    return
                reply: Any = self.model.answer(ids, request.draw, len(ids) - start)
                deliver([reply])
                if request.until is not None and request.until.decide(reply, request.draw, len(ids) - start).authors[0]:
                    break
                ids.append(reply.token_id)
            deliver(None)

        threading.Thread(target=work, daemon=True).start()
        return cancel


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("at_most", [1, 4, 10**6])
@pytest.mark.parametrize("fast", [False, True])
def test_a_model_behind_a_server_writes_the_same_text(temperature: float, at_most: int, fast: bool) -> None:
    models: list[LanguageModel] = [Streaming(MODELS[0], at_most), Streaming(MODELS[1])]

    def texts(among: Sequence[LanguageModel]) -> list[list[Step]]:
        found: list[list[Step]] = [[] for _ in range(6)]
        own = []
        for n in range(6):
            params = SamplingParams(max_tokens=20, seed=n, temperature=temperature)
            make: Any = speculative if fast else collaborative
            own.append(writing(make, [prompt_of(n)] * 2, params, POLICY, EOS, *([FixedPace(3)] if fast else [])))
        for number, event in run(own, among, 3):
            if isinstance(event, Step):
                found[number].append(event)
            else:
                assert event.finish_reason == "length", event
        return found

    expected = texts(MODELS)
    assert texts(models) == expected
    base = models[0]
    assert isinstance(base, Streaming)
    if at_most > 4 and not fast:  # a request for each run of the base's own tokens, not for each token
        runs = sum(1 + sum(step.deferred for step in steps) for steps in expected)
        assert len(base.requests) <= runs < 120


def test_a_text_that_ends_cancels_what_is_being_written_for_it() -> None:
    base = Streaming(FakeModel("base", V, num_assistants=1))
    engine = Engine([base])
    number, events = told_by(engine, alone(0, [[1, 2]], SamplingParams(max_tokens=10**6), EOS))
    events.get(timeout=10)
    engine.cancel(number)
    read(events)
    assert base.cancelled == 1
    engine.close()


# -- asyncio


def test_sinks_reach_an_event_loop() -> None:
    engine = Engine(MODELS)

    async def one(seed: int) -> list[int]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        engine.submit(*flow(seed), lambda event: loop.call_soon_threadsafe(events.put_nowait, event) and None)
        found = [await events.get()]
        while not isinstance(found[-1], Finished):
            found.append(await events.get())
        return tokens(found)

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*(one(seed) for seed in range(10))))

    assert asyncio.run(all_of_them()) == [text(seed) for seed in range(10)]
    engine.close()


# -- texts


@given(st.lists(st.one_of(st.integers(0, 9), st.tuples(st.integers(0, 12))), max_size=40))
def test_what_a_cache_holds_of_a_view_is_still_its_text(actions: list[Any]) -> None:
    own = Text([[7, 7], [8]])
    view = own.views[0]
    remembered = [(list(view.token_ids), view.rewinds)]
    for action in actions:
        if isinstance(action, tuple):
            own.rewind(min(action[0], own.length))
        else:
            own.append(action)
        assert own.views[1].token_ids[1:] == view.token_ids[2:] and own.length == len(view) - 2
        for held, rewinds in remembered:
            valid = min(len(held), view.valid_since(rewinds))
            assert held[:valid] == view.token_ids[:valid]
        remembered.append((list(view.token_ids), view.rewinds))
        assert len(view._shortest) <= own.length + 1, "what it remembers is bounded by its text"


# -- what a hostile reading found


def test_a_model_that_keeps_nothing_reads_a_long_prompt_at_once(tiny_tokenizer: Any, tiny_model: Any) -> None:
    from collm.models.local import LocalModel

    model = LocalModel(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer, cache=False)
    params = SamplingParams(max_tokens=2)
    texts = [alone(0, [[5] * length], params, EOS) for length in (1100, 6)]
    ends = [event for _, event in run(texts, [model]) if isinstance(event, Finished)]
    assert [end.finish_reason for end in ends] == ["length", "length"]
    assert all(end.usage.forward_passes == (2,) for end in ends)


@pytest.mark.parametrize("busy", [1, 2])
def test_nobody_is_starved_by_texts_that_ask_again_and_again(busy: int) -> None:
    models = [*MODELS, FakeModel("a2", V)]
    engine = Twin(models)
    for model in range(1, busy + 1):
        engine.submit(*alone(model, [[1, 2]] * 3, SamplingParams(max_tokens=200), [frozenset()] * 3))
    engine.submit(*alone(0, [[1, 2]] * 3, SamplingParams(max_tokens=3), [frozenset()] * 3))
    rounds = 0
    while not any(number == busy and isinstance(event, Finished) for number, event in engine.step()):
        rounds += 1
    assert rounds < 12


class Leaves(FakeModel):
    """Fails in another way than models fail."""

    def __init__(self, how: str) -> None:
        super().__init__("base", V, num_assistants=1)
        self.how = how

    @property
    def device(self) -> str:
        return "elsewhere"

    def predict(self, queries: Sequence[Query]) -> Replies:
        if self.how == "predict":
            raise SystemExit(3)
        return super().predict(queries)

    def missing(self, query: Query) -> int:
        if self.how == "missing":
            raise RuntimeError("who knows")
        return super().missing(query)

    def release(self, view: Any) -> None:
        if self.how == "release":
            raise RuntimeError("will not let go")


@pytest.mark.parametrize("how", ["predict", "missing", "release"])
def test_a_model_that_fails_in_other_ways_ends_its_texts(how: str) -> None:
    engine = Engine([Leaves(how), MODELS[1]], timeout=60)
    for _ in range(3):
        end = once(read(told_by(engine, alone(0, [[1]] * 2, SamplingParams(max_tokens=3), EOS))[1]))
        assert end.finish_reason == ("length" if how == "release" else "error")
    assert once(read(told_by(engine, alone(1, [[1]] * 2, SamplingParams(max_tokens=3), EOS))[1])).error is None
    engine.close()


class Silent(Streaming):
    """A server that never answers."""

    def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
        self.requests.append(request)
        return lambda: None


@pytest.mark.parametrize("kind", ["extend", "query"])
def test_a_server_that_never_answers_is_given_up(kind: str) -> None:
    models: list[LanguageModel] = [Silent(MODELS[0]), MODELS[1]] if kind == "extend" else [MODELS[0], Silent(MODELS[1])]
    engine = Engine(models, timeout=0.2)
    end = once(read(told_by(engine, flow(3, 30, 1))[1]))
    assert end.finish_reason == "error" and "within 0.2 seconds" in str(end.error)
    engine.close()


@pytest.mark.parametrize("gives_up", [False, True])
def test_a_question_that_nobody_waits_for_is_cancelled(gives_up: bool) -> None:
    """As what is being written is: a server would work for nobody."""

    class Deaf(Silent):
        def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
            super().start(request, deliver)
            return self.cancel

        def cancel(self) -> None:
            self.cancelled += 1

    assistant = Deaf(MODELS[1])
    engine = Engine([MODELS[0], assistant], timeout=0.2 if gives_up else 60)
    number, events = told_by(engine, flow(3, 30, 1))
    until = time.monotonic() + 10
    while not assistant.requests:
        assert time.monotonic() < until
        time.sleep(0.001)
    if not gives_up:
        engine.cancel(number)
    assert once(read(events)).finish_reason == ("error" if gives_up else "cancelled")
    assert assistant.cancelled == len(assistant.requests) == 1
    engine.close()


def test_what_is_delivered_twice_is_no_answer_to_the_next_question() -> None:
    class Twice(Streaming):
        def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
            assert isinstance(request, Query)
            deliver(self.model.predict([request])[0])
            deliver(self.model.predict([request._replace(length=1, num_last=1)])[0])
            return lambda: None

    events = [event for _, event in run([flow(3, 30, 1)], [MODELS[0], Twice(MODELS[1])])]
    assert tokens(events) == text(3, 30)


def test_a_piece_of_a_prompt_takes_a_part_of_a_usual_pass() -> None:
    """On a CPU a token that is read costs nearly as much as one that is written: pieces get short, not passes long."""
    for reading, piece in ((0.003, 11), (0.03, SHORTEST_PIECE)):
        experience = Experience()
        assert experience.reading_tokens(0, 4) == FIRST_PIECE
        for _ in range(5):
            experience.observe_pass(0, 4, 4, 0.045)
        experience.observe_reading(0, 4, 64, 0.045 + 64 * reading)
        assert experience.reading_tokens(0, 4) == piece


# -- texts that write on by themselves


def turn(
    dear: float = 4.0, asked: Sequence[float] = (), heard: bool = False, patience: float = 1.0, longest: float = 100.0
) -> tuple[Turn, list[float]]:
    clock = [0.0]
    return Turn(lambda: clock[0], 0.0, asked, dear, patience, lambda: heard, longest), clock


def test_a_model_keeps_its_turn_as_long_as_it_would_get_it_again() -> None:
    keep_on, clock = turn()
    for now in range(10):
        clock[0] = now
        assert keep_on(3, 0), "nobody waits"
    # Three seconds, then six, then nine of waiting, where a pass of the dear model would delay two texts by eight.
    for now, stays in ((10, True), (11, True), (12, True), (13, False)):
        clock[0] = now
        assert keep_on(2, 3) == stays
    keep_on, clock = turn(dear=2.5)
    clock[0] = 1.0
    assert keep_on(100, 1)
    clock[0] = 3.5
    assert not keep_on(100, 1), "the first one waits for the time of a pass"
    # What waited before counts; a model that is no dearer goes first; so does whatever has come up meanwhile.
    keep_on, clock = turn(asked=[-3.0])
    clock[0] = 0.5
    assert keep_on(2, 0)
    clock[0] = 1.1
    assert not keep_on(2, 0)
    assert not turn(dear=0.0)[0](5, 1) and turn(dear=0.0)[0](5, 0)
    assert not turn(heard=True)[0](5, 0) and not turn()[0](0, 5) and not turn(patience=0.0)[0](5, 1)
    keep_on, clock = turn()
    clock[0] = 100.0
    assert not keep_on(5, 0), "readers want to see something"


@pytest.mark.parametrize(
    ("defers", "told", "full", "seconds"),
    [
        (False, True, False, TOLD),
        (True, True, False, ON_THEIR_OWN),
        (False, False, False, ON_THEIR_OWN),
        (False, True, True, ON_THEIR_OWN),
    ],
)
def test_how_long_texts_write_on_at_most(defers: bool, told: bool, full: bool, seconds: float) -> None:
    """Longer, where nobody waits for the end of a call: neither readers, nor a text for a place, nor what is learnt."""
    now = [0.0]
    model = WritingOn(FakeModel("base", V), stops=0.0)
    during = nullcontext() if told else None
    scheduler = Scheduler([model], clock=lambda: now[0], post=lambda call: call(), during=during, max_num_seqs=1)
    params = SamplingParams(max_tokens=1000)
    for number in range(1 + full):
        text = Text([[1, 2, 3]])
        flow = collaborative(text, params, Never(), [frozenset()]) if defers else single(0, text, params, [frozenset()])
        scheduler.submit(number, flow, text, 1000, lambda event: None)
    scheduler.admit()
    [device] = scheduler.devices
    found = scheduler.next_pass(device)
    assert found is not None and found.keep_on is not None
    now[0] = 0.99 * seconds
    assert found.keep_on(1, 0)
    now[0] = 1.01 * seconds
    assert not found.keep_on(1, 0)


def test_texts_write_on_until_somebody_comes() -> None:
    """A new text joins after the pass that runs, and a cancelled one ends."""
    model = WritingOn(FakeModel("base", V), stops=0.0)
    engine = Engine([model], max_num_seqs=2)
    told: SimpleQueue[tuple[int, Event]] = SimpleQueue()

    def submit(number: int, max_tokens: int) -> int:
        flow, text, _ = alone(0, [prompt_of(number)], SamplingParams(max_tokens=max_tokens), [frozenset()])
        return engine.submit(flow, text, max_tokens, lambda event: told.put((number, event)))

    try:
        long = submit(1, 10**6)
        while told.get(timeout=10)[1] is None:
            pass
        submit(2, 5)
        second = list[Event]()
        while not second or not isinstance(second[-1], Finished):
            number, event = told.get(timeout=10)
            if number == 2:
                second.append(event)
        assert len(second) == 6 and max(model.calls) > 1
        engine.cancel(long)
        while not isinstance(event, Finished) or number != 1:
            number, event = told.get(timeout=10)
        assert event.finish_reason == "cancelled"
        assert event.usage.forward_passes == (event.usage.completion_tokens,)
    finally:
        engine.close()
