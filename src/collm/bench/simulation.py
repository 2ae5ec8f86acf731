"""What a pair behind servers would write a second, from what steps and calls cost: the engine's own scheduler and flows
on a clock of their own, with servers that take time and compute nothing.

A server steps as vLLM does: all texts that it writes get a token in each step, and one that comes joins the next. Its
prefix cache keeps whole blocks; what a text has gained since is read when it comes again. Requests go to replicas by
the client's own rule (`remote.health`).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from collm.decoding.collaborative import collaborative
from collm.decoding.policies import Random
from collm.engine.running import Event, Finished
from collm.engine.scheduler import Scheduler
from collm.remote.ahead import Run
from collm.remote.health import Replica, Replicas
from collm.remote.rules import writes_alone
from collm.sampling_params import SamplingParams
from collm.types import BASE
from collm.values import NO_TOKEN, Answer, Extend, Query, Replies, Reply, StreamingModel
from collm.views import Text, View

TOKEN = 7
_WRITTEN = Answer(TOKEN, -1.0, TOKEN, -1.0, 1.0, (0.0, -20.0), defers=False)
_DEFERRED = Answer(NO_TOKEN, -1.0, None, -1.0, 1.0, (-20.0, 0.0), defers=True)


@dataclass(frozen=True, slots=True)
class ServerCosts:
    """Seconds: of a step, of each text in it beyond the first, of reading a token of a prompt, of a call on its way
    there and back, and of the server's time that a request takes from everybody (its front end, its scheduler).

    `block`: tokens that the prefix cache keeps together; 0: it keeps none. `seats`: texts in a step at most.
    `company`, `patience`: an idle server begins a step once so many requests wait, or the first has waited so long.
    """

    step: float
    row: float = 0.0
    read: float = 0.0
    call: float = 0.0
    admit: float = 0.0
    block: int = 16
    seats: int = 256
    company: int = 1
    patience: float = 0.0

    def __post_init__(self) -> None:
        numbers = (self.step, self.row, self.read, self.call, self.admit, self.block, self.patience)
        if self.step <= 0 or any(number < 0 for number in numbers) or self.seats < 1 or self.company < 1:
            raise ValueError(f"a step takes time, and nothing takes less than none: {self}")


def gpu_costs(
    billions: float,
    gpus: int = 1,
    *,
    bytes_each: float = 2.0,
    terabytes: float = 2.0,
    teraflops: float = 400.0,
    kv_megabytes: float = 0.13,
    context: int = 1024,
    overhead: float = 0.002,
    call: float = 0.004,
    admit: float = 0.0003,
) -> ServerCosts:
    """What a model would cost on GPUs, by the arithmetic of docs/scaling.md: a step reads all weights once and each
    text's keys and values; a prompt is limited by computing.

    Args:
        billions: parameters; `bytes_each`: of each.
        terabytes: that a GPU reads in a second; `teraflops`: it computes in one. About 60 and 40 % of an H100's.
        kv_megabytes: that a token of a text leaves behind; `context`: tokens of a text, about.
        overhead, call, admit: seconds, of launching a step, of a call, of taking in a request.
    """
    reads = terabytes * 1e12 * gpus
    return ServerCosts(
        step=billions * 1e9 * bytes_each / reads + overhead,
        row=kv_megabytes * 1e6 * context / reads,
        read=2 * billions * 1e9 / (teraflops * 1e12 * gpus),
        call=call,
        admit=admit,
    )


START = 1.0
"""Of time; 0 stands for what has not begun."""


class Clock:
    """Time passes from one event to the next."""

    def __init__(self) -> None:
        self.now = START
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), call))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.at(self.now + seconds, call)

    def tick(self) -> bool:
        """Do what comes next; False if nothing does."""
        if not self._events:
            return False
        self.now, _, call = heapq.heappop(self._events)
        call()
        return True


@dataclass(slots=True, eq=False)
class _Request:
    """`left` tokens are to be written behind the first `length` of a view. `wrote`: told after each, and with True at
    the end."""

    view: View
    length: int
    left: int
    wrote: Callable[[bool], None]
    came: float = 0.0


@dataclass(slots=True, eq=False)
class _Machine:
    """One replica."""

    costs: ServerCosts
    clock: Clock
    waiting: list[_Request] = field(default_factory=list)
    writing: list[_Request] = field(default_factory=list)
    stepping: bool = False
    cached: dict[int, int] = field(default_factory=dict)
    busy: float = 0.0

    def take(self, request: _Request) -> None:
        request.came = self.clock.now
        self.waiting.append(request)
        self._begin()

    def _begin(self) -> None:
        if self.stepping or not (self.waiting or self.writing):
            return
        costs = self.costs
        if not self.writing and len(self.waiting) < costs.company:
            until = self.waiting[0].came + costs.patience
            if self.clock.now < until:
                self.clock.at(until, self._begin)
                return
        room = costs.seats - len(self.writing)
        coming, self.waiting = self.waiting[:room], self.waiting[room:]
        reading = sum(self._missing(request) for request in coming)
        self.writing += coming
        seconds = costs.step + costs.row * (len(self.writing) - 1) + costs.read * reading + costs.admit * len(coming)
        self.stepping = True
        self.busy += seconds
        self.clock.after(seconds, self._end)

    def _missing(self, request: _Request) -> int:
        block = self.costs.block
        kept = 0 if not block else self.cached.get(id(request.view), 0) // block * block
        return max(0, request.length - kept - 1)  # the last one is the step's own

    def _end(self) -> None:
        self.stepping = False
        for request in self.writing:
            request.left -= 1
            request.length += 1
        written, self.writing = self.writing, [request for request in self.writing if request.left > 0]
        for request in written:
            if request.left <= 0:
                self.cached[id(request.view)] = request.length - 1
            request.wrote(request.left <= 0)
        self._begin()


@dataclass(slots=True, eq=False)
class _Ahead:
    """What an assistant writes behind the first `start` tokens of a text, of which one has been asked for
    (`remote.ahead`); `count` in all, `here` so far."""

    start: int
    count: int
    here: int = 0
    request: _Request | None = None
    awaited: Callable[[], None] | None = None

    def arrive(self) -> None:
        self.here += 1
        awaited, self.awaited = self.awaited, None
        if awaited is not None:
            awaited()

    def give_up(self) -> None:
        if self.request is not None:
            self.request.left = min(self.request.left, 0)


class SimulatedServer(StreamingModel):
    """A model behind replicas. What it writes is always the same token; a base defers where its policy draws so."""

    def __init__(self, name: str, costs: ServerCosts, clock: Clock, replicas: int = 1) -> None:
        self._name, self._costs, self._clock = name, costs, clock
        self.machines = {str(n): _Machine(costs, clock) for n in range(replicas)}
        self._replicas = Replicas([Replica(url) for url in self.machines], clock)
        self._runs: dict[int, Run] = {}
        self._ahead: dict[int, _Ahead] = {}
        self.calls = 0

    @property
    def name(self) -> str:
        return self._name

    def predict(self, queries: Sequence[Query]) -> Replies:
        raise AssertionError("it is asked by start alone")

    def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
        if isinstance(request, Query):
            self._answer(request, deliver)
        else:
            self._write_on(request, deliver)
        return lambda: None

    def _write_on(self, extend: Extend, deliver: Callable[[list[Reply] | None], None]) -> None:
        position = len(extend.view) - extend.view.prompt_length
        count = writes_alone(extend.until, extend.draw, position, extend.max_tokens)
        last = None if extend.until is None else extend.until.decide(_WRITTEN, extend.draw, position + count - 1)
        answers: list[Reply] = [_WRITTEN] * count
        if last is not None and last.authors[0] != BASE:
            answers[-1] = _DEFERRED

        def told() -> None:
            deliver(answers)
            deliver(None)

        self._send(extend.view, len(extend.view), count, told, each=False)

    def _answer(self, query: Query, deliver: Callable[[list[Reply] | None], None]) -> None:
        """A token, which may have been written ahead."""
        text, length = id(query.view), query.length
        run = self._runs.setdefault(text, Run())
        count, ahead = run.wanted(length), self._ahead.get(text)

        def told() -> None:
            deliver([_WRITTEN])

        # All tokens since then were its own.
        if ahead is not None and length - ahead.start <= run.count and length - ahead.start < ahead.count:
            if length - ahead.start < ahead.here:
                self._clock.after(0.0, told)
            else:
                ahead.awaited = told
            return
        if ahead is not None:
            ahead.give_up()
        ahead = self._ahead[text] = _Ahead(length, count, awaited=told)
        ahead.request = self._send(query.view, length, count, ahead.arrive)

    def release(self, view: View) -> None:
        self._runs.pop(id(view), None)
        ahead = self._ahead.pop(id(view), None)
        if ahead is not None:
            ahead.give_up()

    def _send(self, view: View, length: int, count: int, arrive: Callable[[], None], *, each: bool = True) -> _Request:
        """Ask a replica for so many tokens. `arrive`: told as each of them comes back, or the last alone."""
        self.calls += 1
        replica = self._replicas.choose(id(view))
        replica.began()

        def wrote(last: bool) -> None:
            if last:
                replica.ended(False)
            if last or each:
                self._clock.after(self._costs.call / 2, arrive)

        asked = _Request(view, length, count, wrote)
        self._clock.after(self._costs.call / 2, lambda: self.machines[replica.url].take(asked))
        return asked


@dataclass(frozen=True, slots=True)
class Load:
    """`streams` texts are written at any time, one after another has ended, `texts` in all; an assistant writes a share
    `rate` of each text's tokens, at random places."""

    streams: int
    rate: float
    tokens: int = 256
    prompt: int = 256
    texts: int = 0

    @property
    def count(self) -> int:
        return self.texts or 2 * self.streams


@dataclass(frozen=True, slots=True)
class Simulated:
    """`tokens_per_second` of all texts together; `text_seconds`: what one takes on average; `busy`: the share of time
    that base and assistant (each replica) compute; `calls_per_token`: requests of both."""

    tokens_per_second: float
    text_seconds: float
    busy: tuple[float, float]
    calls_per_token: float


def simulate(
    base: ServerCosts, assistant: ServerCosts, load: Load, *, base_replicas: int = 1, assistant_replicas: int = 1
) -> Simulated:
    """Drive the engine's scheduler over simulated servers until all texts are written."""
    clock = Clock()
    models = [
        SimulatedServer("base", base, clock, base_replicas),
        SimulatedServer("assistant", assistant, clock, assistant_replicas),
    ]
    scheduler = Scheduler(models, max_num_seqs=load.streams, clock=clock, post=lambda call: call())
    policy, took, written, texts = Random(load.rate, 1), list[float](), 0, list[Text]()
    for number in range(load.count):
        text = Text([[TOKEN] * load.prompt] * 2)
        texts.append(text)  # caches know texts by their views, which must not come again
        params = SamplingParams(max_tokens=load.tokens, seed=number, speculative=False)
        flow = collaborative(text, params, policy, (frozenset(), frozenset()))

        def told(event: Event) -> None:
            nonlocal written
            if isinstance(event, Finished):
                assert event.finish_reason == "length", event
                took.append(event.usage.seconds)
            else:
                written += 1

        scheduler.submit(number, flow, text, load.tokens, told)
    scheduler.admit()
    while len(took) < load.count:
        assert clock.tick(), "texts wait, and nothing happens"
        scheduler.admit()
    seconds = clock.now - START
    busy = [sum(each.busy for each in model.machines.values()) / seconds / len(model.machines) for model in models]
    calls = sum(model.calls for model in models) / written
    return Simulated(written / seconds, sum(took) / len(took), (busy[0], busy[1]), calls)
