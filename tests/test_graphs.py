"""Blocks and graphs behind a `LocalModel`, captured by a fake: it answers as the plain twin, whatever fails."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
from chunk_toys import byte_level
from test_crop_cache import network as crop_network
from test_local import POOLED, tiny, traffic
from tiny import make_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from watching import OutputBytes, WatchedCapture, watched

from collm.cuts import START
from collm.decoding.collaborative import collaborative, single
from collm.decoding.experience import Experience
from collm.decoding.pace import AdaptivePace, FixedPace
from collm.decoding.policies import ByEntropy
from collm.decoding.speculative import speculative
from collm.engine import Finished, run
from collm.models import caching
from collm.models.attention import Row
from collm.models.codec import ByteCodec
from collm.models.crop_cache import CropCache
from collm.models.head import DeferralHead
from collm.models.laws import MOST_PROBABLE, Asked
from collm.models.local import LocalModel
from collm.models.paged.cache import PagedCache
from collm.models.paged.capture import FakeCapture
from collm.models.paged.dense import TorchDense
from collm.models.paged.graphs import BUCKETS
from collm.models.paged.machinery import Machinery
from collm.models.paged.plan import DRAW, HEAD, LINES
from collm.models.paged.telling import Told
from collm.models.paged.writing import LONGEST
from collm.models.pairing import cuts_between
from collm.models.selftest import paged_serves
from collm.sampling_params import OnAssistantError, SamplingParams
from collm.types import BASE, ForwardPass
from collm.values import GREEDY, Answer, Draw, Fault, Foreseen, KeepOn, Query, Replies, Reply, WriteOn
from collm.views import Text, View


def machinery(fails: Callable[[], None] | None = None) -> Machinery:
    return watched(fails)


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


AT_LENGTH = frozenset("cohere2 gemma2 glm4 llama mistral mixtral phi3 qwen2 qwen3 smollm3".split())


@pytest.mark.parametrize("kind", POOLED)
def test_graphs_answer_as_the_plain_twin(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing that is recorded asks the host (`watching`)."""
    model, rng = tiny(kind), random.Random(1)
    head = DeferralHead(32, 2)
    torch.nn.init.normal_(head.weight, std=0.1)
    graphs = LocalModel(model, tiny_tokenizer, head, num_slots=5, max_cache_tokens=640, machinery=machinery())
    plain = LocalModel(model, tiny_tokenizer, head, cache=False)
    assert isinstance(graphs._cache, PagedCache)
    for queries in traffic(graphs, rng, rounds=8 if kind in AT_LENGTH else 3):
        for found, expected in zip(graphs.predict(queries), plain.predict(queries), strict=True):
            assert len(found) == len(expected)
            for pair in zip(found, expected, strict=True):
                assert_same(*pair)
    assert capture(graphs).replayed >= 3


def growing(length: int = 20) -> tuple[Text, Query]:
    text = Text([list(range(3, 3 + length))])
    return text, Query(0, text.views[0], length)


def test_a_pass_is_one_upload_one_launch_one_wait(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    assert model._stepper is not None
    assert model.pass_curve == () and model.warm_up() > 0 and model._stepper.buckets == BUCKETS
    assert [tokens for tokens, _ in model.pass_curve] == sorted({1, *BUCKETS, *(size + 1 for size in BUCKETS[:-1])})
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


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3_moe"])
def test_a_recorded_pass_has_the_same_operators_whatever_its_size(
    kind: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Observed, operator by operator: one upload, one download, a kernel for each layer, and nothing that asks the host
    (`watching` fails at that)."""
    head = DeferralHead(32, 1)
    model = LocalModel(tiny(kind), tiny_tokenizer, head, max_cache_tokens=4000, machinery=watched())
    own = model._stepper._capture  # type: ignore[union-attr]
    assert isinstance(own, WatchedCapture)
    own.watches.clear()
    model.warm_up()
    assert len(own.watches) == len(BUCKETS)
    first = own.watches[0].operators
    assert (first["enter"], first["store"], first["attend"], first["tell"]) == (1, 2, 2, 1)
    assert first["copy_"] == 2
    for watch in own.watches:
        assert (watch.uploads, watch.downloads) == (1, 1)
        assert watch.operators == first


@pytest.mark.parametrize("dense", [None, TorchDense()])
def test_a_pass_is_a_launch_and_nothing_else(dense: TorchDense | None, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Observed: whatever is asked of a pass by the callers of graphs, torch is called for nothing besides its replay,
    and what the counts say is what was seen."""
    own = replace(watched(), dense=dense)
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=4, max_cache_tokens=4000, machinery=own)
    model.warm_up()
    seen = capture(model)
    assert isinstance(seen, WatchedCapture) and model._stepper is not None
    texts = [growing(n)[0] for n in (5, 9, 17)]
    drawn = Draw(7, 0, 1.0, 0.9)

    def asked(leave: WriteOn | None = None) -> list[Query]:
        return [Query(0, text.views[0], len(text.views[0]), draw=drawn, write_on=leave) for text in texts]

    model.predict(asked())
    for text in texts:
        text.append(7)
    counts, waits = model._stepper.counts, seen.waits
    before = counts.launches, counts.uploads, counts.downloads, counts.waits
    with seen.besides() as watch:
        model.write_on(asked(WriteOn(20)), Counted())
        for text in texts:
            text.append(8)
        model.predict(asked())
    assert watch.operators == {"replay": 22}
    after = counts.launches, counts.uploads, counts.downloads, counts.waits
    assert [b - a for a, b in zip(before, after, strict=True)] == [22] * 4 and seen.waits - waits == 22


def test_what_a_graph_reads_lives_as_long_as_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A graph holds addresses alone: memory given back would go to somebody else, whom each pass would overwrite."""
    model = LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=400, machinery=machinery())
    model.predict([Query.of([1, 2, 3, 4, 5])])
    bucket = model._stepper.graph(8)
    assert bucket is not None and bucket.plan.numbers.tolist() == bucket.into.tolist() and 5 in bucket.into


class Counted:
    """A `KeepOn` that allows so many passes, and remembers what it was asked."""

    def __init__(self, more: int = 10**6) -> None:
        self.more, self.asked = more, list[tuple[int, int]]()

    def __call__(self, going: int, stopped: int) -> bool:
        self.asked.append((going, stopped))
        return going > 0 and len(self.asked) <= self.more


def on_its_own(model: LocalModel, view: View, leave: WriteOn, draw: Draw, count: int) -> list[Reply]:
    """What it would answer token by token."""
    ids, found = list(view.token_ids), list[Reply]()
    for _ in range(count):
        text = View(ids[: view.prompt_length])
        text.token_ids += ids[view.prompt_length :]
        [[reply]] = model.predict([Query(0, text, len(ids), draw=draw)])
        found.append(reply)
        assert isinstance(reply, Answer)
        ids.append(reply.token_id)
    return found


def test_texts_write_on_as_if_each_token_were_asked_for(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Over the ends of blocks, some longer than others, some of them drawn; one launch a pass, and what the text takes
    over of it is not read again."""
    network, rng = tiny("llama"), random.Random(3)
    head = DeferralHead(32, 1)
    model = LocalModel(network, tiny_tokenizer, head, num_slots=4, max_cache_tokens=1200, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, head, cache=False)
    assert model.writes_on and not plain.writes_on
    texts = [Text([[rng.randrange(3, 300) for _ in range(n)]]) for n in (5, 14, 23)]
    draws = [Draw(), Draw(7, 0, 1.0, 0.9), Draw(8, 0, 1.0)]
    leaves = [WriteOn(30), WriteOn(11), WriteOn(2)]
    passes: list[ForwardPass] = []

    def queries() -> list[Query]:
        return [
            Query(0, text.views[0], len(text.views[0]), draw=draw, write_on=leave)
            for text, draw, leave in zip(texts, draws, leaves, strict=True)
        ]

    first = model.write_on(queries(), Counted())
    assert [len(found) for found in first] == [1, 1, 1], "prompts are read first"
    for text, [reply] in zip(texts, first, strict=True):
        assert isinstance(reply, Answer)
        text.append(reply.token_id)
    model.on_pass = passes.append
    before, keep_on = capture(model).replayed, Counted()
    found = model.write_on(queries(), keep_on)
    assert [len(replies) for replies in found] == [31, 12, 3]
    assert capture(model).replayed - before == len(passes) == 31
    assert [each.tokens for each in passes] == [3] * 3 + [2] * 9 + [1] * 19
    assert keep_on.asked[-1] == (0, 3)
    for text, replies, leave, draw in zip(texts, found, leaves, draws, strict=True):
        expected = on_its_own(plain, text.views[0], leave, draw, len(replies))
        for pair in zip(replies, expected, strict=True):
            assert_same(*pair)
    # The first text takes all of it over, the second half and then something else, the third nothing.
    for text, replies, count in zip(texts, found, (30, 6, 0), strict=True):
        for reply in replies[:count]:
            assert isinstance(reply, Answer)
            text.append(reply.token_id)
    texts[1].append(299)
    texts[2].append(298)
    assert [model.missing(query) for query in queries()] == [1, 2 - 1, 1]
    passes.clear()
    after = model.predict([query._replace(write_on=None) for query in queries()])
    assert [each.tokens for each in passes] == [3]
    for query, [reply] in zip(queries(), after, strict=True):
        assert_same(reply, plain.predict([query])[0][0])


def test_what_was_written_on_and_taken_back_is_read_anew(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network, rng = tiny("llama"), random.Random(4)
    model = LocalModel(network, tiny_tokenizer, num_slots=3, max_cache_tokens=600, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    texts = [Text([[rng.randrange(3, 300) for _ in range(rng.randrange(3, 20))]]) for _ in range(3)]
    for _ in range(40):
        queries = [
            Query(0, text.views[0], len(text.views[0]), write_on=WriteOn(rng.randrange(1, 12)))
            for text in rng.sample(texts, rng.randrange(1, 4))
        ]
        for query, replies in zip(queries, model.write_on(queries, Counted(rng.randrange(8))), strict=True):
            [text] = [text for text in texts if text.views[0] is query.view]
            for n, reply in enumerate(replies):
                assert_same(reply, plain.predict([Query(0, query.view, len(query.view))])[0][0])
                assert isinstance(reply, Answer)
                text.append(reply.token_id)
                if rng.random() < 0.1:
                    text.rewind(rng.randrange(text.length))
                    break
                if rng.random() < 0.1:
                    text.append(rng.randrange(300))
                    break
                assert n < len(replies)
        for text in texts:
            if len(text.views[0]) > 150:
                text.rewind(2)


def test_what_is_shared_stays_behind_a_place_that_is_read_once_more(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A text that is asked about a place behind which more of it is shared took a block of its own where that place
    began one, and with it lost what stood behind: the next answers were another text's."""
    network, tokens = tiny("llama"), [random.Random(1).randrange(3, 300) for _ in range(60)]
    model = LocalModel(network, tiny_tokenizer, num_slots=3, max_cache_tokens=600, machinery=machinery())
    plain, cache = LocalModel(network, tiny_tokenizer, cache=False), model.graphs[1]
    assert cache is not None and cache.paged.block == 8
    first, second = Text([tokens]), Text([tokens])
    model.predict([Query(0, first.views[0], 60)])
    for length in (57, 60):
        query = Query(0, second.views[0], length)
        assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])
    second.append(9)
    for text in (second, first):
        query = Query(0, text.views[0], len(text.views[0]))
        assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])


def stopping(model: LocalModel, leave: WriteOn, keep_on: KeepOn) -> list[Reply]:
    text = Text([list(range(3, 12))])
    model.predict([Query(0, text.views[0], 8)])
    [found] = model.write_on([Query(0, text.views[0], 9, write_on=leave)], keep_on)
    return found


def test_where_texts_stop_to_write_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    head = DeferralHead(32, 1)
    model = LocalModel(network, tiny_tokenizer, head, num_slots=2, max_cache_tokens=400, machinery=machinery())
    whole = stopping(model, WriteOn(200), Counted())
    assert len(whole) == 1 + LONGEST
    assert len(stopping(model, WriteOn(200), Counted(7))) == 8
    doubts = [reply.entropy for reply in whole if isinstance(reply, Answer)]
    # Between two of them: the same token's doubt is another within rounding where its text was copied.
    until = ByEntropy(sum(sorted(doubts)[-5:-3]) / 2, 1)
    deferred = [n for n, doubt in enumerate(doubts) if doubt > until.nats]
    assert len(deferred) == 4
    for passing in (0, 1, 3):
        # The answer where it would defer is the last one.
        assert len(stopping(model, WriteOn(200, until, passing), Counted())) == deferred[passing] + 1
    assert len(stopping(model, WriteOn(200, until, 4), Counted())) == 1 + LONGEST
    last = whole[6]
    assert isinstance(last, Answer)
    assert network.generation_config is not None
    network.generation_config.eos_token_id = last.token_id
    ends = LocalModel(network, tiny_tokenizer, head, num_slots=2, max_cache_tokens=400, machinery=machinery())
    first = next(n for n, reply in enumerate(whole) if isinstance(reply, Answer) and reply.token_id == last.token_id)
    assert stopping(ends, WriteOn(200), Counted())[first:] == [whole[first]]


def test_a_text_that_writes_on_into_what_is_no_number_ends_alone(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer, num_slots=2, max_cache_tokens=400, machinery=machinery())
    texts = [Text([list(range(3, 9))]), Text([list(range(40, 60))])]
    model.predict([Query(0, text.views[0], len(text.views[0]) - 1) for text in texts])
    assert model._stepper is not None
    told, count = model._stepper.told, [0]

    def spoilt() -> Told:
        found = told()
        count[0] += 1
        if count[0] == 4:
            found.rows[0, 3:5] = 1, 10**6  # no token that could be read
        return found

    monkeypatch.setattr(model._stepper, "told", spoilt)
    queries = [Query(0, text.views[0], len(text.views[0]), write_on=WriteOn(9)) for text in texts]
    broken, whole = model.write_on(queries, Counted())
    assert len(whole) == 10 and all(isinstance(reply, Answer) for reply in whole)
    assert len(broken) == 4 and isinstance(broken[-1], Fault)
    assert "after position 8 are not numbers" in broken[-1].reason
    assert [model.missing(query) for query in queries] == [6, 1], "the broken one is read anew"


def test_a_way_to_run_a_network_is_tried_once(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, tried = tiny("llama"), list[str | None]()

    def counted(*what: Any) -> str | None:
        tried.append(paged_serves(*what))
        return tried[-1]

    monkeypatch.setattr(caching, "paged_serves", counted)
    for _ in range(2):
        model = LocalModel(network, tiny_tokenizer, num_slots=2, max_cache_tokens=400, machinery=machinery())
        assert model.writes_on
    assert tried == [None]
    # With a gate the passes tell more; of another network nothing is known.
    LocalModel(network, tiny_tokenizer, DeferralHead(32, 1), max_cache_tokens=400, machinery=machinery())
    LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=400, machinery=machinery())
    assert tried == [None] * 3


def test_a_pass_that_was_begun_is_taken_by_those_who_ask_for_it(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    model, plain = (
        LocalModel(network, tiny_tokenizer, num_slots=4, max_cache_tokens=800, cache=cache, machinery=machinery())
        for cache in (True, False)
    )
    model.warm_up()
    counts = model._stepper.counts  # type: ignore[union-attr]
    texts = [Text([list(range(3 + n, 40))]) for n in range(3)]

    def queries(which: Sequence[int], draw: Draw) -> list[Query]:
        views = [texts[n].views[0] for n in which]
        return [Query(0, view, len(view), 1, draw) for view in views]

    def begun(which: Sequence[int], draw: Draw, back: int = 0) -> tuple[int, ...]:
        """Passes that were begun, that were taken, and all of them, where each text, a token further, was foreseen, and
        some asked for."""
        for text in texts:
            text.append(9)
        coming = [Foreseen(text.views[0], len(text.views[0]) - 1 - back, 9, draw) for text in texts]
        before = counts.foreseen, counts.taken, counts.launches
        model.foresee(coming)
        asked = queries(which, draw)
        for found, expected in zip(model.predict(asked), plain.predict(asked), strict=True):
            for a, b in zip(found, expected, strict=True):
                assert_same(a, b)
        after = counts.foreseen, counts.taken, counts.launches
        return tuple(b - a for a, b in zip(before, after, strict=True))

    model.predict(queries(range(3), GREEDY))
    drawn = Draw(seed=3, temperature=1.0)
    for draw in (GREEDY, drawn):
        for which in ([0, 1, 2], [2, 0], [1]):
            assert begun(which, draw) == (1, 1, 1)
            model.predict(queries(range(3), draw))  # those that were left out have been read by nobody
    # Another token than the one that was foreseen, or another place: a pass in vain, and nothing else.
    texts[0].append(9)
    model.foresee([Foreseen(texts[0].views[0], len(texts[0].views[0]) - 1, 8, GREEDY)])
    asked = queries([0], GREEDY)
    assert_same(model.predict(asked)[0][0], plain.predict(asked)[0][0])
    assert begun([0, 1, 2], GREEDY, back=2) == (1, 0, 2)
    # Nor is it taken once anything else has been asked, by another text in the same place either.
    model.foresee([Foreseen(texts[0].views[0], len(texts[0].views[0]), 11, GREEDY)])
    other = Text([[30, 31, 32, 33]])
    model.predict([Query(0, other.views[0], 4)])
    taken = counts.taken
    texts[0].append(11)
    asked = queries([0], GREEDY)
    assert_same(model.predict(asked)[0][0], plain.predict(asked)[0][0])
    assert counts.taken == taken
    # Nor is anybody waited for: another thread may use the model.
    began, busy, over = counts.foreseen, threading.Event(), threading.Event()

    def hold() -> None:
        with model._network.lock:
            busy.set()
            over.wait(10)

    other_thread = threading.Thread(target=hold)
    other_thread.start()
    busy.wait(10)
    model.foresee([Foreseen(texts[0].views[0], len(texts[0].views[0]), 11, GREEDY)])
    over.set()
    other_thread.join()
    assert counts.foreseen == began
    # What cannot go on so is left alone: a text that is not known, a token that there is not, a context that is full.
    before = counts.foreseen
    stranger = Text([[5, 6]]).views[0]
    known = texts[0].views[0]
    for each in (Foreseen(stranger, 2, 9, GREEDY), Foreseen(known, len(known) + 5, 9, GREEDY)):
        model.foresee([each])
    model.foresee([Foreseen(known, len(known), 10**6, GREEDY)])
    model.foresee([Foreseen(known, len(known), -1, GREEDY)])
    assert counts.foreseen == before
    asked = queries([0, 1, 2], drawn)
    for found, expected in zip(model.predict(asked), plain.predict(asked), strict=True):
        assert_same(found[0], expected[0])


@torch.inference_mode()
def test_the_numbers_of_a_pass_of_the_same_rows_are_changed_to_what_would_be_written(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=6, max_cache_tokens=2000, machinery=machinery())
    model.warm_up()
    stepper, cache = model.graphs
    assert stepper is not None and cache is not None
    rng, pool, written = random.Random(4), cache.paged, [0]
    fill = pool.fill

    def counted(*args: Any) -> int:
        written[0] += 1
        return fill(*args)

    monkeypatch.setattr(pool, "fill", counted)
    drawn = Draw(seed=2**40 + 7, temperature=0.7, top_p=0.9), Draw(seed=3, sample=1, temperature=1.0, top_k=5)
    changed = 0
    for _ in range(150):
        slots = tuple(sorted(rng.sample(range(6), 4)))
        draws: tuple[Draw, ...] = (GREEDY, drawn[0], GREEDY, drawn[1])
        starts = [rng.randrange(60) for _ in slots]
        stepper.start_steps(slots, starts, [1, 2, 3, 4], draws, [9, 9, 9, 9])
        stepper.told()
        if rng.random() < 0.5:
            # Each stays where it is in its block, all but for its own tokens.
            starts = [start // 8 * 8 + rng.randrange(8) for start in starts]
        else:
            starts = [start + rng.randrange(3) for start in starts]
        match rng.randrange(6):
            case 0:  # the same positions lie elsewhere
                pool.clear(slots[1])
                pool.blocks.write(slots[0], 60, 64)
            case 1:  # another text in the same place
                draws = (GREEDY, replace(drawn[0], seed=5), drawn[1], GREEDY)
            case 2:
                slots = tuple(sorted(rng.sample(range(6), 4)))
            case 3:
                stepper.step([Row(slots[0], 3, 2)], [7, 8], [0, 1], MOST_PROBABLE)
        token_ids, positions = [rng.randrange(9) for _ in slots], [rng.randrange(50) for _ in slots]
        before = written[0]
        stepper.start_steps(slots, starts, token_ids, draws, positions)
        stepper.told()
        changed += written[0] == before
        bucket = stepper.graph(4)
        assert bucket is not None
        found = bucket.into.copy()
        rows = [Row(slot, start, 1) for slot, start in zip(slots, starts, strict=True)]
        stepper.step(rows, token_ids, range(4), Asked.drawn(draws, positions))
        for numbers in (found, bucket.into):  # where nothing is drawn, nobody reads a position
            lines = numbers[HEAD:].reshape(LINES, -1)
            lines[DRAW + 3, [draw.temperature == 0 for draw in draws]] = 0
        assert (found == bucket.into).all()
    assert 30 < changed < 120, changed


@pytest.mark.parametrize("how", ["single", "plain", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_writes_the_same_text_in_fewer_calls(
    how: str, temperature: float, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    networks = tiny("llama", num_hidden_layers=1), tiny("llama")
    heads = [DeferralHead(32, 1), None]
    eos, experience = [frozenset({2})] * 2, Experience()
    policy = ByEntropy(3.5, 1)

    def written(models: list[LocalModel]) -> dict[int, list[int]]:
        writings, found = [], dict[int, list[int]]()
        for seed in range(5):
            text = Text([[seed + 3, 7, 11, 20 * seed]] * 2)
            params = SamplingParams(max_tokens=40, temperature=temperature, top_p=0.9, seed=seed)
            if how == "single":
                flow = single(BASE, text, params, eos)
            elif how == "plain":
                flow = collaborative(text, params, policy, eos)
            else:
                flow = speculative(text, params, policy, eos, AdaptivePace(experience))
            writings.append((flow, text, 40))
        for number, event in run(writings, models, 4, experience=experience):
            if isinstance(event, Finished):
                assert event.error is None
            else:
                found.setdefault(number, []).append(event.token_id)
        return found

    plain = [
        LocalModel(network, tiny_tokenizer, head, cache=False) for network, head in zip(networks, heads, strict=True)
    ]
    graphs = [
        LocalModel(network, tiny_tokenizer, head, num_slots=4, max_cache_tokens=800, machinery=machinery())
        for network, head in zip(networks, heads, strict=True)
    ]
    passes, calls = [0], [0]
    for model in graphs:
        model.warm_up()
        model.on_pass = lambda done: passes.__setitem__(0, passes[0] + 1)
    base_calls = graphs[0].write_on

    def counted(queries: Sequence[Query], *how: Any) -> Replies:
        calls[0] += 1
        return base_calls(queries, *how)

    graphs[0].write_on = counted  # type: ignore[method-assign]
    found = written(graphs)
    assert 0 < calls[0] < 0.8 * passes[0]
    base = graphs[0]._stepper
    assert base is not None and base.counts.taken <= base.counts.foreseen
    assert base.counts.taken > 10 if how != "single" else not base.counts.foreseen
    # What is begun and not asked for is of texts that ended.
    assert base.counts.foreseen - base.counts.taken <= 5
    experience = Experience()
    assert found == written(plain)


@pytest.mark.parametrize("top_k", [2**31, 2**63])
def test_a_top_k_beyond_what_a_pass_can_be_told(top_k: int, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """It says "all tokens", as 0 does."""
    network, how = tiny("llama"), SamplingParams(temperature=1.5, seed=3, top_k=top_k).draw
    text = Text([[5, 9, 3]])
    asked = [Query(0, text.views[0], 3, draw=how)]
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=400, machinery=machinery())
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    [[expected]] = plain.predict([asked[0]._replace(draw=replace(how, top_k=0))])
    for each in (model, plain):
        [[found]] = each.predict(asked)
        assert_same(found, expected)


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
    query = Query.of([n % 300 for n in range(1800)])
    before = capture(model).replayed
    assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])
    # 1,024 tokens, then 776: neither is a decoding pass.
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
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("collm.models.paged.cache._alive", WeakSet())
    free = [1 << 20]
    monkeypatch.setattr("collm.models.paged.cache.free_bytes", lambda device: free[0])
    small, large = (tiny("llama", num_hidden_layers=n, max_position_embeddings=4096) for n in (2, 6))
    base, assistant = (LocalModel(each, tiny_tokenizer, machinery=machinery()) for each in (small, large))
    assert isinstance(base._cache, PagedCache) and isinstance(assistant._cache, PagedCache)
    # Three quarters of what is free, for as many tokens of one as of the other.
    assert base._cache.max_tokens == assistant._cache.max_tokens == int(0.75 * 2**20 / (8 * 2 * 2 * 8 * 4 * 8)) * 8
    # What has been promised and is not taken yet is nobody else's: one block more each is for padding.
    free[0] += sum((model._cache.num_blocks + 1) * model._cache.paged.block_bytes for model in (base, assistant))
    with caplog.at_level("INFO", "collm.models.memory"):
        shares = [
            LocalModel(each, tiny_tokenizer, max_cache_tokens=0.5, machinery=machinery()) for each in (small, large)
        ]
        assert [each.max_cache_tokens for each in shares] == [2**19 // (8 * 2 * 2 * 8 * 4 * 8) * 8] * 2
    assert caplog.messages == ["cpu: base keeps up to 512 tokens of keys and values (0.0 GB)"] * 2
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
    with pytest.warns(UserWarning, match="base: no memory for graphs of passes over 1 tokens"):
        [found] = model.predict([Query(0, text.views[0], 21)])
    assert_same(found[0], plain.predict([Query(0, text.views[0], 21)])[0][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        text.append(6)
        model.predict([Query(0, text.views[0], 22)])
    assert model._stepper is not None and model._stepper.buckets == (24,)


def test_lacking_memory_is_told_once_and_not_of_a_trial(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("out of memory")

    network = tiny("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a trial lacks, the lasting graphs may have
        model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(fails))
    with pytest.warns(UserWarning, match=f"base: no memory for graphs of passes over {BUCKETS[0]}, ") as found:
        model.warm_up()
    assert len(found) == 1
    with warnings.catch_warnings(), caplog.at_level("INFO", "collm.models.paged.graphs"):
        warnings.simplefilter("error")
        model.forget()  # then they are captured anew
        model.predict([Query.of([5, 6, 7])])
        model.predict([Query.of([5, 6, 7, 8, 9])])
    assert "no memory for graphs of passes over 4 tokens" in caplog.text
    assert "no memory for graphs of passes over 8 tokens" in caplog.text


def test_graphs_take_no_more_memory_than_they_may(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of what the storage leaves: larger graphs are left out, which is said once, and what the others take."""
    needed: list[int] = []

    def takes(work: Callable[[], None]) -> int:
        with OutputBytes() as seen:
            work()
        needed.append(seen.largest)
        return seen.largest

    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=watched(takes=takes))
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    needed.clear()
    # A pass's largest result are its logits, 330 floats a token (with what is made of them).
    monkeypatch.setattr("collm.models.paged.graphs.left_bytes", lambda device: 2 * 100 * 330 * 4)
    told = r"base: no memory for graphs of passes over 128, 192, 256, 320, 384, 512 tokens; .* max_cache_tokens"
    with caplog.at_level("INFO", "collm.models.paged.graphs"), pytest.warns(UserWarning, match=told) as found:
        model.warm_up()
    assert len(found) == 1 and needed == [size * 330 * 4 for size in reversed(BUCKETS)]
    stepper = model._stepper
    assert stepper is not None and stepper.buckets == tuple(size for size in BUCKETS if size <= 96)
    assert stepper.graph_bytes == 96 * 330 * 4
    assert "cpu: graphs of base for passes of up to 96 tokens take 0.00 GB of at most 0.0" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        query = Query.of([n % 300 for n in range(150)])
        assert_same(model.predict([query])[0][0], plain.predict([query])[0][0])
        model.predict([Query.of([5, 6, 7])])
    assert stepper.counts.passes == {4: 1}


def test_what_cannot_be_captured_runs_without(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    network = tiny("mixtral")
    told = r"base: passes of a mixtral model cannot be captured .*not permitted"
    with pytest.warns(UserWarning, match=told) as warned:
        model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery(fails))
    assert len(warned) == 1
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        model.warm_up()
        LocalModel(network, tiny_tokenizer, max_cache_tokens=400, machinery=machinery(fails)).warm_up()
        for queries in traffic(model, random.Random(2), rounds=4):
            for found, expected in zip(model.predict(queries), plain.predict(queries), strict=True):
                for pair in zip(found, expected, strict=True):
                    assert_same(*pair)
    assert capture(model).replayed == 0


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


@pytest.mark.parametrize("how", ["graphs", "pool", "crop", "plain"])
@pytest.mark.parametrize("wrong", [300, 330])
def test_a_token_that_is_wrong_spoils_nothing_before_it(
    how: str, wrong: int, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """A draft may hold what is no number, or a token that is not known: first, in the middle, last. What comes before
    it is answered as if it were not there, and what is asked of other texts as ever."""
    network = crop_network("stablelm") if how == "crop" else tiny("llama")
    with torch.no_grad():
        network.get_input_embeddings().weight[300] = torch.nan
    own = machinery() if how == "graphs" else None
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, cache=how != "plain", machinery=own)
    assert isinstance(model._cache, CropCache) == (how == "crop")
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    other = Text([list(range(40, 60))])
    for at in range(5):
        text = Text([list(range(3, 20))])
        draft = [token if n != at else wrong for n, token in enumerate(range(21, 26))]
        model.predict([Query(0, each.views[0], len(each.views[0])) for each in (text, other)])  # as texts that go on
        for token_id in draft:
            text.append(token_id)
        given = [9, 8, 7, 6, 5, 4]
        for asked in (Query(0, text.views[0], 22, 6), Query(0, text.views[0], 22, 6, given=given)):
            found, of_other = model.predict([asked, Query(0, other.views[0], 20)])
            assert [type(each) for each in found] == [Answer] * (at + 1) + [Fault] * (5 - at)
            for n, reply in enumerate(found[: at + 1]):
                expected = plain.predict([Query(0, text.views[0], 17 + n, given=given[n : n + 1])])[0][0]
                assert_same(reply, expected)
                if asked.given is not None:
                    assert isinstance(reply, Answer) and isinstance(expected, Answer)
                    assert reply.given_log_prob == pytest.approx(expected.given_log_prob, abs=1e-3)
            assert_same(of_other[0], plain.predict([Query(0, other.views[0], 20)])[0][0])
        # And the text goes on, once it is taken back.
        text.rewind(0)
        text.append(30)
        asked = Query(0, text.views[0], 18)
        assert_same(model.predict([asked])[0][0], plain.predict([asked])[0][0])


@pytest.mark.parametrize("graphs", [True, False])
def test_a_draft_that_is_no_number_changes_no_text(graphs: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Texts end where they end token by token, with the same error, whatever had been drafted behind."""
    networks = tiny("llama", num_hidden_layers=1), tiny("llama")
    with torch.no_grad():
        for network, start in zip(networks, (100, 200), strict=True):
            network.get_input_embeddings().weight[start : start + 40] = torch.nan
    eos = [frozenset({2})] * 2
    models = [
        LocalModel(
            network, tiny_tokenizer, head, name=name, num_slots=4, max_cache_tokens=800,
            machinery=machinery() if graphs else None,
        )
        for network, head, name in zip(networks, (DeferralHead(32, 1), None), ("base", "assistant"), strict=True)
    ]  # fmt: skip

    def written(drafts: bool) -> list[tuple[list[tuple[int, int, bool]], str | None]]:
        writings = []
        for seed in range(12):
            text = Text([[seed + 3, 7, 11, 20 + seed]] * 2)
            on_error: OnAssistantError = "base" if seed % 2 else "fail"
            params = SamplingParams(max_tokens=40, temperature=1.0, seed=seed, on_assistant_error=on_error)
            policy = ByEntropy(3.5, 1)
            pace = FixedPace(1 + seed % 4, seed % 3)
            flow = speculative(text, params, policy, eos, pace) if drafts else collaborative(text, params, policy, eos)
            writings.append((flow, text, 40))
        steps: list[list[tuple[int, int, bool]]] = [[] for _ in writings]
        errors: list[str | None] = [None] * len(writings)
        for number, event in run(writings, models, 4):
            if isinstance(event, Finished):
                errors[number] = event.error
            else:
                steps[number].append((event.token_id, event.author, event.abstained))
        return list(zip(steps, errors, strict=True))

    found = written(True)
    assert found == written(False)
    assert any(error for _, error in found) and any(abstained for steps, _ in found for _, _, abstained in steps)


def overflowing() -> PreTrainedModel:
    """A network with one neuron that only token 300 excites: to some millions, which float16 has not."""
    network: Any = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        embedding, layer = network.get_input_embeddings().weight, network.model.layers[0]
        embedding[:, 0] = 0.0
        embedding[300] = 0.0
        embedding[300, 0] = 100.0
        layer.self_attn.o_proj.weight[0] = 0.0
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight[0] = 0.0
            projection.weight[0, 0] = 300.0
    found: PreTrainedModel = network
    return found


def test_a_text_that_overflows_float16_costs_the_others_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """In float32 all of them are answered; in float16 all but the one, whose error names the remedy."""
    texts = [list(range(3, 20)), [300, 4, 5], [9, 300], list(range(9, 12))]
    queries = [Query.of(ids) for ids in texts]
    single = LocalModel(overflowing(), tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    assert all(isinstance(each[0], Answer) for each in single.predict(queries))
    network = overflowing().half()
    model = LocalModel(network, tiny_tokenizer, max_cache_tokens=4000, machinery=machinery())
    assert model.writes_on
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    for _ in range(2):
        for n, (found, expected) in enumerate(zip(model.predict(queries), plain.predict(queries), strict=True)):
            for [reply] in (found, expected):
                if n in (1, 2):
                    assert isinstance(reply, Fault)
                    assert "not numbers (NaN)" in reply.reason and "try another dtype" in reply.reason
                else:
                    assert isinstance(reply, Answer)
                    assert reply.top_log_prob == pytest.approx(single.predict([queries[n]])[0][0].top_log_prob, abs=0.1)
    assert capture(model).replayed > 2
