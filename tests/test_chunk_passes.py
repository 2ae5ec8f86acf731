"""What models with different tokenizers cost: the passes of each, counted out from what was written and decided."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from test_chunked import PROMPTS, system

from collm.decoding import chunked as decoder
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunked import MISSES, _State
from collm.llm import CollaborativeLM
from collm.sampling_params import SamplingParams
from collm.types import BASE, Generation


class Closed(NamedTuple):
    """A chunk, written in `own` tokens. `holds`: what was seen behind it still does; `as_read`: in the very tokens in
    which its tokenizer would read it."""

    author: int
    data: bytes
    own: int
    holds: bool
    as_read: bool


class Cut(NamedTuple):
    """The base was read, and this model is to write."""

    author: int


class Looked(NamedTuple):
    """Behind a chunk that was held, to see whether it `ended` there."""

    ended: bool


Event = Closed | Cut | Looked


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """All that happens to a text, in order."""
    found: list[Event] = []
    close, decide, looked = ChunkText.close, decoder.decide, _State.looked

    def noting_close(self: ChunkText, model: int, chunk: bytes) -> bool:
        own = self.written(model)
        as_read = self.codecs[model].canonical(chunk) == own
        holds = close(self, model, chunk)
        found.append(Closed(model, chunk, len(own), holds, as_read))
        return holds

    def noting_decide(*arguments: Any) -> Any:
        decision = decide(*arguments)
        found.append(Cut(decision.authors[0]))
        return decision

    def noting_looked(self: _State, text: ChunkText, verdict: Any) -> Any:
        steps = looked(self, text, verdict)
        found.append(Looked(steps is not None))
        return steps

    monkeypatch.setattr(ChunkText, "close", noting_close)
    monkeypatch.setattr(decoder, "decide", noting_decide)
    monkeypatch.setattr(_State, "looked", noting_looked)
    return found


SETTINGS = [
    (2, {"deferral": "random", "threshold": 0.5}, 40, 0.0, False),
    (2, {"deferral": "random", "threshold": 0.5}, 2, 0.8, False),
    (2, {"deferral": "never"}, 40, 0.0, True),
    (2, {"deferral": "always"}, 9, 0.0, False),
    (2, {"deferral": "threshold", "threshold": 0.5}, 40, 0.0, False),
    (2, {"deferral": "threshold", "threshold": 0.5}, 40, 0.8, False),
    (3, {"deferral": "threshold", "threshold": 0.6}, 40, 0.8, False),
    (2, {"deferral": "expected_gain", "threshold": 0.4}, 40, 0.0, False),
    (2, {"deferral": "entropy", "threshold": 4.0}, 40, 0.0, False),
    (2, {"deferral": "top_probability", "threshold": 0.1}, 40, 0.0, False),
    (3, {"deferral": "sampled"}, 40, 0.8, False),
    (3, {"deferral": "random", "threshold": 0.4}, 48, 0.8, False),
]
WAYS = ("count", "who", "max_tokens", "temperature", "ends")


def prompts(ends: bool) -> Sequence[Any]:
    return [f"{n} + {n} =" for n in range(12)] if ends else PROMPTS


@pytest.mark.parametrize(WAYS, SETTINGS)
def test_passes_are_exactly_those_that_the_rule_needs(
    count: int, who: dict[str, Any], max_tokens: int, temperature: float, ends: bool, events: list[Event]
) -> None:
    """Told at once, also where a text is cut off within a chunk, and where it ends."""
    llm = system(count, ends=66 if ends else None)
    reasons, authors = set(), set()
    for prompt in prompts(ends):
        events.clear()
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=4, **who)
        generation = list(llm.stream(prompt, params))[-1].generation
        assert generation is not None
        asked = [{BASE, step.author} for step in generation.steps]
        assert list(generation.forward_passes) == passes_at_once(llm, generation, asked, events, max_tokens)
        reasons.add(generation.finish_reason)
        authors |= {step.author for step in generation.steps}
    assert reasons == ({"stop", "length"} if ends else {"length"})
    assert authors == {"never": {0}, "always": {1}}.get(who["deferral"], set(range(count)))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_passes_of_nudging(temperature: float, events: list[Event]) -> None:
    """The assistant is asked at each cut but within a word of the base; the base only where that one is in doubt."""
    llm = system(ascii=True)
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=4, deferral="nudging", threshold=0.0)
    signals = sorted(step.signal or 0.0 for prompt in PROMPTS for step in llm.generate(prompt, params).steps)
    for threshold, writers in ((0.0, {1}), (math.exp(-signals[len(signals) // 2]), {0, 1}), (1.0, {0})):
        authors = set()
        for prompt in PROMPTS:
            events.clear()
            generation = llm.generate(prompt, replace(params, threshold=threshold))
            # A signal is the assistant's doubt; what the base would open with is known if it was asked.
            asked = [
                {z for z, told in enumerate((step.base_token_id, step.signal)) if told is not None}
                for step in generation.steps
            ]
            assert list(generation.forward_passes) == passes_at_once(llm, generation, asked, events, 60)
            authors |= {step.author for step in generation.steps}
        assert authors == writers


def has_room(llm: CollaborativeLM, chunk: Closed, room: int) -> bool:
    """For more tokens of the base: what an assistant has written may be fewer of those, and is not cut off within a
    character."""
    assert llm.sharing is not None
    if chunk.own < room or chunk.author == BASE:
        return chunk.own < room
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(chunk.data)
        within, _ = decoder.getstate()
    except UnicodeDecodeError:  # no text
        within = b""
    return bool(within) or len(llm.sharing.codecs[BASE].chunk_ids(chunk.data)) < room


def passes_at_once(
    llm: CollaborativeLM, generation: Generation, asked: Sequence[set[int]], events: Sequence[Event], max_tokens: int
) -> list[int]:
    """A model that is asked at a cut has a pass, unless it looked ahead there. Who writes has one for each further
    token of the chunk, and one to look ahead at its end: not where that closes by itself, nor where no room is."""
    assert llm.sharing is not None
    free, passes, room = llm.sharing.cuts.free, [0] * len(generation.forward_passes), max_tokens
    closed = [event for event in events if isinstance(event, Closed)]
    known: set[int] = set()
    for number, (step, models) in enumerate(zip(generation.steps, asked, strict=True)):
        for model in models - known:
            passes[model] += 1
        if not step.data:  # an end
            assert number + 1 == len(generation.steps)
            continue
        chunk = closed[number]
        assert chunk.author == step.author and (chunk.data == step.data or number + 1 == len(generation.steps))
        looks = not free[chunk.data[-1]] and has_room(llm, chunk, room)
        passes[chunk.author] += chunk.own - 1 + looks
        known = {chunk.author} if looks and chunk.holds else set()
        room -= len(step.token_ids)
    return passes


@pytest.mark.parametrize(WAYS, [each for each in SETTINGS if each[2] > 2])
def test_passes_where_a_look_waits(
    count: int,
    who: dict[str, Any],
    max_tokens: int,
    temperature: float,
    ends: bool,
    events: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where nobody reads along: the look behind a chunk is one pass with the next question to its author, or one of
    its own at the end and before another assistant; what would have gone on is written again, from what is known."""
    monkeypatch.setattr("collm.decoding.chunked.FAR", 10**9)  # nothing is looked at in between
    llm = system(count, ends=66 if ends else None)
    held = again = 0
    for prompt in prompts(ends):
        for seed in range(1 if ends else 3):
            events.clear()
            params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **who)
            generation = llm.generate(prompt, params)
            needed = passes_waiting(llm, events, max_tokens, waits=who["deferral"] != "always")
            assert list(generation.forward_passes) == needed
            looks = [event.ended for event in events if isinstance(event, Looked)]
            held += len(looks)
            again += looks.count(False)
    if who["deferral"] not in ("never", "always"):
        assert held > 3, (held, again)


def passes_waiting(llm: CollaborativeLM, events: Sequence[Event], max_tokens: int, *, waits: bool) -> list[int]:
    """From what was decided at each cut, written, and found behind what was held."""
    assert llm.sharing is not None
    free, base = llm.sharing.cuts.free, llm.sharing.codecs[BASE]
    passes = [0] * len(llm.models)
    known: set[int] = set()
    room, careful, chunks, looks, misses = max_tokens, -1, 0, 0, 0
    held: tuple[int, set[int], int, int] | None = None  # author, and in front of it: what was known, room, chunks
    asked: int | None = None  # who is to be asked what it would open with, if nothing is taken back first
    for event in [*events, None]:
        if isinstance(event, Looked):
            assert held is not None
            passes[held[0]] += 1
            looks += 1
            if event.ended:
                if asked == held[0]:  # one pass for both
                    known, asked = known | {asked}, None
            else:
                misses += 1
                _, known, room, chunks = held
                careful, asked = chunks, None
            held = None
            continue
        if asked is not None:
            passes[asked] += 1
            known, asked = known | {asked}, None
        if isinstance(event, Cut):
            passes[BASE] += BASE not in known
            known = known | {BASE}
            asked = None if event.author in known else event.author
        elif isinstance(event, Closed):
            may_go_on = not free[event.data[-1]] and has_room(llm, event, room)
            likely = event.author != BASE and event.data[-1:].isalnum() and event.as_read
            waiting = may_go_on and likely and waits and misses <= 1 + looks * MISSES and chunks != careful
            passes[event.author] += event.own - 1 + (may_go_on and not waiting)
            if waiting:
                held = event.author, known, room, chunks
            known = {event.author} if may_go_on and not waiting and event.holds else set()
            room -= event.own if event.author == BASE else len(base.chunk_ids(event.data))
            chunks += 1
    return passes
