"""Blocks and graphs behind a `LocalModel`, captured by a fake: it answers as the plain twin, whatever fails."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chunk_toys import byte_level
from test_local import tiny, traffic
from tiny import make_model
from transformers import PreTrainedTokenizerFast

from collm.cuts import START
from collm.errors import CollmError
from collm.models.codec import ByteCodec
from collm.models.head import DeferralHead
from collm.models.local import LocalModel
from collm.models.paged.cache import PagedCache
from collm.models.paged.capture import FakeCapture
from collm.models.paged.machinery import Machinery
from collm.models.paged.ops import TorchOps
from collm.models.paged.stepping import BUCKETS
from collm.models.paged.telling import TorchTelling
from collm.models.pairing import cuts_between
from collm.types import ForwardPass
from collm.values import Answer, Draw, Fault, Query, Reply
from collm.views import Text


def machinery(fails: Callable[[], None] | None = None) -> Machinery:
    return Machinery(TorchOps(), TorchTelling(), FakeCapture(fails=fails), block=8)


def capture(model: LocalModel) -> FakeCapture:
    assert model._stepper is not None
    found = model._stepper._capture
    assert isinstance(found, FakeCapture)
    return found


def assert_same(found: Reply, expected: Reply) -> None:
    assert isinstance(found, Answer) and isinstance(expected, Answer)
    assert (found.token_id, found.top_token_id) == (expected.token_id, expected.top_token_id)
    numbers = [(a.log_prob, a.top_log_prob, a.entropy, *(a.log_gate or ())) for a in (found, expected)]
    torch.testing.assert_close(*map(torch.tensor, numbers), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", "cohere2 gemma2 glm4 llama mistral mixtral phi3 qwen2 qwen3 smollm3".split())
def test_graphs_answer_as_the_plain_twin(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, rng = tiny(kind), random.Random(1)
    head = DeferralHead(32, 2)
    torch.nn.init.normal_(head.weight, std=0.1)
    graphs = LocalModel(model, tiny_tokenizer, head, num_slots=5, max_cache_tokens=640, machinery=machinery())
    plain = LocalModel(model, tiny_tokenizer, head, cache=False)
    assert isinstance(graphs._cache, PagedCache)
    for queries in traffic(graphs, rng, rounds=8):
        for found, expected in zip(graphs.predict(queries), plain.predict(queries), strict=True):
            assert len(found) == len(expected)
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
    assert capture(graphs).replayed > 5


def growing(length: int = 20) -> tuple[Text, Query]:
    text = Text([list(range(3, 3 + length))])
    return text, Query(0, text.views[0], length)


def test_a_pass_is_one_upload_one_launch_one_wait(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    assert model._stepper is not None
    assert model.pass_curve == () and model.warm_up() > 0 and model._stepper.buckets == BUCKETS
    assert [tokens for tokens, _ in model.pass_curve] == list(BUCKETS)
    capture(model).replayed = capture(model).waits = 0
    texts = [growing(n)[0] for n in (5, 9, 20)]
    model.predict([Query(0, text.views[0], len(text.views[0])) for text in texts])
    recorded, before = capture(model).recorded, (capture(model).replayed, capture(model).waits)
    for token_id in range(10):
        for text in texts:
            text.append(token_id)
        model.predict([Query(0, text.views[0], len(text.views[0])) for text in texts])
    assert (capture(model).replayed - before[0], capture(model).waits - before[1]) == (10, 10)
    counts = model._stepper.counts
    assert counts.launches == counts.uploads == counts.downloads == counts.waits == 11
    assert counts.passes == {48: 1, 4: 10} and capture(model).recorded == recorded


def test_what_graphs_do_not_tell_is_told_without(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    text = Text([list(range(3, 23))])
    before = capture(model).replayed
    for what in ({"law": True}, {"num_top": 3}, {"given": [7, 8]}):
        query = Query(0, text.views[0], 20, 2, **what)  # type: ignore[arg-type]
        [found], [expected] = model.predict([query]), plain.predict([query])
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
            assert isinstance(a, Answer) and isinstance(b, Answer)
            assert a.given_log_prob == pytest.approx(b.given_log_prob, abs=1e-4)
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert (a.law is None) == (b.law is None)
    assert capture(model).replayed == before


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_asked_behind_bytes_is_told_by_graphs(temperature: float) -> None:
    """Masks inside the graph: what may open, its doubt, the closing factor, and the choice, as laws on the host have
    them; rows of a text that shares no chunks beside them."""
    tokenizers = [byte_level("gpt2", 400), byte_level("llama3", 460, seed=1)]
    cuts = cuts_between(tokenizers, ("base", "other"))
    assert cuts is not None
    network, head = make_model(vocab_size=len(tokenizers[0]) + 3, initializer_range=0.35), DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight, std=0.3)
    codec = ByteCodec(tokenizers[0], cuts)
    graphs = LocalModel(network, tokenizers[0], head, max_cache_tokens=4000, machinery=machinery())
    plain = LocalModel(network, tokenizers[0], head, cache=False)
    texts = [growing(n)[0] for n in (5, 9, 20)]
    draws = [Draw(seed, 0, temperature, *cut_off) for seed, cut_off in enumerate([(), (0.9,), (1.0, 7)])]
    graphs.warm_up()
    for model in (graphs, plain):
        model.share_chunks(cuts, codec.first_bytes)
    opened = asked = 0
    for step in range(12):
        before = capture(graphs).replayed
        last = [START, ord("n"), ord(" ")][step % 3]
        queries = [
            Query(0, text.views[0], len(text.views[0]), 2, draw, last_bytes=[-1, last], opens=bool(step % 2))
            if n < 2
            else Query(0, text.views[0], len(text.views[0]), draw=draw)
            for n, (text, draw) in enumerate(zip(texts, draws, strict=True))
        ]
        for text, found, expected in zip(texts, graphs.predict(queries), plain.predict(queries), strict=True):
            for a, b in zip(found, expected, strict=True):
                assert_same(a, b)
                assert isinstance(a, Answer) and isinstance(b, Answer)
                assert a.log_close == pytest.approx(b.log_close, abs=1e-4)
                opened += a.log_close < -0.1
                asked += 1
            assert isinstance(found[-1], Answer)
            text.append(found[-1].token_id)
        assert capture(graphs).replayed == before + 1, "no pass left the graphs"
    assert opened > 5 and asked == 60


def test_long_prompts_are_read_without_graphs(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama", max_position_embeddings=2048)
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    query = Query.of([n % 300 for n in range(1500)])
    before = capture(model).replayed
    assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])
    # 1,024 tokens, then 476: neither is a decoding pass.
    assert capture(model).replayed == before


def test_memory_makes_texts_wait_and_ended_ones_go(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer, num_slots=4, max_cache_tokens=160, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    assert model.fits([150]) and model.fits([40, 40, 40]) and not model.fits([100, 60]) and not model.fits([161])
    for queries in traffic(model, random.Random(5), rounds=30):
        for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
    assert model.cache_bytes == (160 + 8) * 2 * 2 * 2 * 8 * 4
    model.forget()
    assert model.cache_bytes == 0
    query = Query.of(list(range(5, 30)))
    assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])


def test_a_text_that_fills_the_storage_is_not_read_again(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=2, max_cache_tokens=80, machinery=machinery())
    text = Text([list(range(3, 63))])
    passes: list[ForwardPass] = []
    model.on_pass = passes.append
    for token_id in range(20):
        model.predict([Query(0, text.views[0], len(text.views[0]))])
        text.append(token_id)
    assert [each.tokens for each in passes] == [60] + [1] * 19
    text.append(5)
    [[refused]] = model.predict([Query(0, text.views[0], 81)])
    assert isinstance(refused, Fault) and "raise it to at least 81" in refused.reason


def test_networks_of_a_device_divide_its_memory(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.models.paged.cache.free_bytes", lambda device: 1 << 20)
    small, large = (tiny("llama", num_hidden_layers=n, max_position_embeddings=4096) for n in (2, 6))
    base, assistant = (LocalModel(each, tiny_tokenizer, machinery=machinery()) for each in (small, large))
    assert isinstance(base._cache, PagedCache) and isinstance(assistant._cache, PagedCache)
    # Three quarters of what is free, for as many tokens of one as of the other.
    assert base._cache.max_tokens == assistant._cache.max_tokens == int(0.75 * 2**20 / (8 * 2 * 2 * 8 * 4 * 8)) * 8
    exact = LocalModel(small, tiny_tokenizer, max_cache_tokens=100, machinery=machinery())
    assert isinstance(exact._cache, PagedCache) and exact._cache.max_tokens == 96


def test_without_memory_for_graphs_passes_run_without(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network, calls = tiny("llama"), [0]

    def fails() -> None:
        calls[0] += 1
        if calls[0] > 2:  # the trial at load, and the first bucket
            raise torch.OutOfMemoryError("out of memory")

    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(fails))
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    text, query = growing()
    model.predict([query])
    text.append(5)
    with pytest.warns(UserWarning, match="base: no memory for the graph of passes over 1 tokens"):
        [found] = model.predict([Query(0, text.views[0], 21)])
    assert_same(found[0], plain.predict([Query(0, text.views[0], 21)])[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        text.append(6)
        model.predict([Query(0, text.views[0], 22)])
    assert model._stepper is not None and model._stepper.buckets == (24,)


def test_what_cannot_be_captured_runs_without(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    network = tiny("mixtral")
    with pytest.warns(UserWarning, match=r"base: passes of a mixtral model cannot be captured .*not permitted"):
        model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(fails))
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    with pytest.warns(UserWarning, match="cannot be captured"):
        for queries in traffic(model, random.Random(2), rounds=4):
            for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
                for pair in zip(found, expected, strict=True):
                    assert_same(*pair)
    assert capture(model).replayed == 0


def test_a_lost_device_is_told(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    lost = [False]

    class Lost(TorchOps):
        def store(self, *args: Any) -> None:
            if lost[0]:
                raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might ...")
            super().store(*args)

    own = Machinery(Lost(), TorchTelling(), FakeCapture(), block=8)
    model = LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=4000, machinery=own)
    lost[0] = True
    with pytest.raises(CollmError, match=r"base: cpu failed \(CUDA error: an illegal .* encountered\); start the proc"):
        model.predict([growing()[1]])


def test_a_text_that_is_no_number_costs_the_others_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    with torch.no_grad():
        network.get_input_embeddings().weight[300] = torch.nan
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    queries = [Query.of(list(range(3, 20))), Query.of([300, 4, 5]), Query.of(list(range(9, 12)))]
    for _ in range(2):
        found = [each[0] for each in model.predict(queries)]
        assert isinstance(found[1], Fault) and "not numbers" in found[1].reason
        for n in (0, 2):
            assert_same(found[n], plain.predict([queries[n]])[0][0])
