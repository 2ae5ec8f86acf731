"""Callers of one system, all at once: threads, event loops, readers that go away, and a system that is closed."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.llm import CollaborativeLM, GenerationFailed
from collm.llm.samples import numbered
from collm.models.fake import FakeModel
from collm.models.head import DeferralHead
from collm.models.kv_pool import KVPool
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams
from collm.values import Query, Replies

PARAMS = SamplingParams(max_tokens=12, threshold=0.5)
PROMPTS = [f"{word} " * n for word, n in (("How many", 1), ("books", 7), ("7 * 6 =", 2), ("Paris", 20))]


def pair(tokenizer: PreTrainedTokenizerFast, **settings: bool) -> CollaborativeLM:
    head = DeferralHead(32, 1)
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight, std=0.3)
    models = [
        LocalModel(make_model("llama", seed=0), tokenizer, head, **settings),
        LocalModel(make_model("qwen3", seed=1), tokenizer, name="helper", **settings),
    ]
    return CollaborativeLM(models, [Formatter(tokenizer)] * 2)


def idle(llm: CollaborativeLM) -> bool:
    """Nothing runs any more; what was cancelled may take a moment."""
    for _ in range(500):
        if llm.engine.load.running == llm.engine.load.waiting == 0:
            return True
        time.sleep(0.01)
    return False


def test_eight_threads_write_what_each_would_write_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm, plain = pair(tiny_tokenizer), pair(tiny_tokenizer, cache=False)
    asked = [(prompt, replace(PARAMS, seed=n, temperature=n % 2)) for n, prompt in enumerate(PROMPTS)]
    alone = [plain.generate(*each) for each in asked]
    wrong: list[str] = []

    def caller(number: int) -> None:
        rng = random.Random(number)
        for turn in range(6):
            n = rng.randrange(len(asked))
            expected = alone[n].token_ids
            match (number + turn) % 5:
                case 0:
                    found = llm.generate(*asked[n]).token_ids
                case 1:
                    one, other = llm.generate_batch([asked[n][0], asked[0][0]], [asked[n][1], asked[0][1]])
                    found, expected = one.token_ids + other.token_ids, expected + alone[0].token_ids
                case 2:
                    found = tuple(c.step.token_id for c in llm.stream(*asked[n]) if c.step is not None)
                case 3:
                    found = asyncio.run(llm.agenerate(*asked[n])).token_ids
                case _:  # a reader that goes away half-way
                    chunks = llm.stream(*asked[n])
                    found = tuple(c.step.token_id for c in islice(chunks, rng.randrange(4)) if c.step is not None)
                    del chunks
                    expected = expected[: len(found)]
            if found != expected:
                wrong.append(f"caller {number}, turn {turn}, text {n}: {found} is not {expected}")

    threads = [threading.Thread(target=caller, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)
    assert idle(llm)
    llm.close()


class Slow(FakeModel):
    def predict(self, queries: Sequence[Query]) -> Replies:
        time.sleep(0.002)
        return super().predict(queries)


def slow_pair(tokenizer: PreTrainedTokenizerFast) -> CollaborativeLM:
    models = [Slow("base", 320, num_assistants=1), FakeModel("helper", 320)]
    return CollaborativeLM(models, [Formatter(tokenizer)] * 2)


LONG = SamplingParams(max_tokens=100_000)


async def _astream(llm: CollaborativeLM) -> None:
    async for _ in llm.astream("hello", LONG):
        pass


WAYS: dict[str, Callable[[CollaborativeLM], object]] = {
    "generate": lambda llm: llm.generate("hello", LONG),
    "generate_batch": lambda llm: llm.generate_batch(["hello", "you"], [LONG, replace(LONG, max_tokens=2)]),
    "stream": lambda llm: list(llm.stream("hello", LONG)),
    "astream": lambda llm: asyncio.run(_astream(llm)),
    "agenerate": lambda llm: asyncio.run(llm.agenerate("hello", LONG)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("way", WAYS)
def test_a_text_that_closing_cuts_short_is_an_error(way: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Never a short text that looks whole."""
    llm, raised = slow_pair(tiny_tokenizer), list[BaseException]()

    def write() -> None:
        try:
            WAYS[way](llm)
        except BaseException as error:
            raised.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    while not llm.engine.load.running:
        time.sleep(0.005)
    time.sleep(0.03)
    llm.close()
    writer.join(30)
    assert not writer.is_alive()
    [error] = raised
    assert isinstance(error, GenerationFailed) and "the system was closed while this text was written" in str(error)
    assert error.generation.finish_reason == "cancelled" and error.generation.error is not None
    for again in WAYS.values():
        with pytest.raises(CollmError, match="closed"):
            again(llm)
    llm.close()


def test_a_reader_that_goes_away_cancels_its_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = slow_pair(tiny_tokenizer)
    chunks = llm.stream("hello", LONG)
    next(chunks)
    assert llm.engine.load.running == 1
    del chunks
    assert idle(llm)
    each = llm.generate_each(["hello", "you"], [replace(LONG, max_tokens=1), LONG])
    assert next(each)[0] == 0
    del each
    assert idle(llm)

    async def broken_off() -> None:
        for reading in (_astream(llm), llm.agenerate("hello", LONG)):
            task: asyncio.Task[object] = asyncio.ensure_future(reading)
            while not llm.engine.load.running:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert idle(llm)

    asyncio.run(broken_off())
    assert len(llm.generate("hello", replace(LONG, max_tokens=3)).steps) == 3
    llm.close()


def test_what_is_wrong_is_told_when_it_is_asked(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Not only by the first token that a stream is asked for."""
    llm = slow_pair(tiny_tokenizer)
    asking: list[Callable[[], object]] = [lambda: llm.stream(""), lambda: llm.astream("")]
    for ask in asking:
        with pytest.raises(CollmError, match="the prompt is empty"):
            ask()
    llm.close()


def test_memory_that_cannot_be_had_costs_the_text_that_asks_for_it(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, plain = pair(tiny_tokenizer), pair(tiny_tokenizer, cache=False)
    resize = KVPool.resize

    def scarce(self: KVPool, keep: Sequence[int], num_slots: int, num_positions: int) -> None:
        if num_positions > 64:
            raise torch.OutOfMemoryError("no more memory")
        resize(self, keep, num_slots, num_positions)

    monkeypatch.setattr(KVPool, "resize", scarce)
    short, long, other = llm.generate_batch(["How many", "books " * 90, "7 * 6 ="], PARAMS)
    assert long.finish_reason == "error" and "no more memory" in str(long.error)
    for found, prompt in ((short, "How many"), (other, "7 * 6 =")):
        assert found.error is None and found.token_ids == plain.generate(prompt, PARAMS).token_ids
    monkeypatch.undo()
    assert llm.generate("books " * 90, PARAMS).token_ids == plain.generate("books " * 90, PARAMS).token_ids
    llm.close()


# -- samples of one prompt


def test_repeats_of_one_prompt_are_other_samples(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    llm = slow_pair(tiny_tokenizer)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    prompts = ["hello"] * 4
    settings = [params, params, replace(params, sample=1), params]
    found = llm.generate_batch(prompts, settings)
    expected = [llm.generate("hello", replace(params, sample=n)).token_ids for n in (0, 2, 1, 3)]
    assert [each.token_ids for each in found] == expected and len(set(expected)) == 4
    llm.close()


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 3)), max_size=12))
def test_no_two_texts_of_a_call_are_one_sample(asked: list[tuple[int, int, int]]) -> None:
    texts = [(prompt, SamplingParams(seed=seed, sample=sample)) for prompt, seed, sample in asked]
    found = [(prompt, params) for (prompt, _), params in zip(texts, numbered(texts), strict=True)]
    assert len(set(found)) == len(found)
    for n, each in enumerate(texts):
        if each not in texts[:n]:
            assert found[n] == each, "the first keeps the number it was given"


def test_an_event_loop_is_woken_once_for_what_a_pass_brings(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Texts that are read together: all of each, in order, as it is written alone; and a deadline ends all of them."""
    llm = slow_pair(tiny_tokenizer)
    asked = [replace(PARAMS, max_tokens=24, seed=n) for n in range(8)]
    prompts = [f"Paris {n}" for n in range(8)]
    wakes = 0

    async def read() -> dict[int, list[int]]:
        nonlocal wakes
        loop, found = asyncio.get_running_loop(), dict[int, list[int]]()
        wake = loop.call_soon_threadsafe

        def counted(*args: Any, **more: Any) -> Any:
            nonlocal wakes
            wakes += 1
            return wake(*args, **more)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        async for number, chunk in llm.astream_each(prompts, asked):
            if chunk.step is not None:
                found.setdefault(number, []).append(chunk.step.token_id)
            time.sleep(0.001)  # a loop that has other things to do
        return found

    found = asyncio.run(read())
    alone = [llm.generate(prompt, params).token_ids for prompt, params in zip(prompts, asked, strict=True)]
    assert [tuple(found[n]) for n in range(8)] == list(map(tuple, alone))
    assert wakes < 8 * 24 / 2

    async def too_late() -> None:
        deadline = asyncio.get_running_loop().time() + 0.05
        async for _ in llm.astream_each(["hello", "you"], [LONG] * 2, deadline=deadline):
            pass

    with pytest.raises(TimeoutError):
        asyncio.run(too_late())
    until = time.monotonic() + 10
    while llm.engine.load.running:
        assert time.monotonic() < until
        time.sleep(0.01)
