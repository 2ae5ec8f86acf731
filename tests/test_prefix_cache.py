"""Where texts sit in the KV pool: what is computed, what is copied, and how much is stored."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import watching
from flows import alone
from test_local import ask, at_end, close, reasons, rewrite, stored_tensors, tiny
from transformers import PreTrainedTokenizerFast

from collm.engine import Finished, Twin, run
from collm.models import kv_pool, prefix_cache
from collm.models.local import LocalModel
from collm.models.prefix_cache import PrefixCache
from collm.sampling_params import SamplingParams
from collm.types import ForwardPass
from collm.values import Fault, Query
from collm.views import Text, View

Ids = tuple[int, ...]


class Watched:
    """A cached model, its plain twin, and the tokens that each call computed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: str = "llama", **settings: int) -> None:
        self.told: list[ForwardPass] = []
        network = tiny(kind)
        self.model = LocalModel(network, tokenizer, name="m", on_pass=self.told.append, **settings)
        self.plain = LocalModel(network, tokenizer, cache=False)

    def computed(self, *texts: Text | Ids, num_last: int = 1) -> int:
        """Tokens that went through the model for these texts; their answers are checked. Ids are those of a new text,
        all of it prompt."""
        views = [(text if isinstance(text, Text) else Text([text])).views[0] for text in texts]
        queries, before = [at_end(view, num_last) for view in views], len(self.told)
        for found, expected in zip(self.model.predict(queries), self.plain.predict(queries), strict=True):
            assert len(found) == len(expected) == num_last
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        return sum(done.tokens for done in self.told[before:])

    def end(self, *texts: Text) -> None:
        for text in texts:
            self.model.release(text.views[0])


@pytest.fixture
def watched(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Watched]:
    return lambda kind="llama", **settings: Watched(tiny_tokenizer, kind, **settings)


def written(text: Text, *token_ids: int) -> Text:
    """The text with these tokens at its end."""
    for token_id in token_ids:
        text.append(token_id)
    return text


PROMPT = tuple(range(3, 43))
A, B, C = (*PROMPT, 100, 101, 102), (*PROMPT, 110, 111), (*PROMPT, 120)


# -- Views


def test_a_view_tells_what_is_still_valid() -> None:
    text = Text([(1, 2), (9,)])
    view = text.views[0]
    assert (len(view), view.prompt_length, view.rewinds, view.valid_since(0)) == (2, 2, 0, 2)
    written(text, 3, 4, 5)
    assert list(view.token_ids) == [1, 2, 3, 4, 5] and text.views[1].token_ids == [9, 3, 4, 5]
    before = view.rewinds
    text.rewind(2)
    written(text, 6, 7, 8)
    assert (view.valid_since(before), view.valid_since(view.rewinds)) == (4, 7)
    between = view.rewinds
    text.rewind(4)  # further back than it had grown to since, but not as far as before
    written(text, 1)
    assert (view.valid_since(before), view.valid_since(between), len(view)) == (4, 6, 7)
    text.rewind(5)  # nothing is taken back
    assert view.rewinds == between + 1
    text.rewind(0)
    assert (text.length, view.valid_since(before), text.views[1].token_ids) == (0, 2, [9])


def test_of_a_text_that_was_rewound_what_is_valid_is_kept(watched: Callable[..., Watched]) -> None:
    """Rewound and written on, however often, between two passes: tokens behind the shortest length are computed."""
    it, rng = watched(num_slots=2), random.Random(1)
    text = Text([PROMPT[:5]])
    other = Text([PROMPT])
    it.computed(other)
    held = 0
    for _ in range(25):
        shortest = len(text.views[0])
        for _ in range(rng.randrange(4)):
            text.rewind(rng.randrange(text.length + 1))
            shortest = min(shortest, len(text.views[0]))
            written(text, *(rng.randrange(320) for _ in range(rng.randrange(12))))
        valid, length = min(held, shortest), len(text.views[0])
        assert it.model.missing(Query(0, text.views[0], length)) == max(1, length - valid)
        assert it.computed(text) == max(1, length - valid)
        held = length
    assert it.computed(written(other, 7)) == 1


def test_a_draft_is_taken_back_in_its_own_slot(watched: Callable[..., Watched]) -> None:
    it = watched(num_slots=2)
    a, b = Text([A]), Text([B])
    assert it.computed(a, b) == 45
    # What had been drafted before is replaced; the other text stays where it is.
    for drafts, computed in (((7, 8, 9), 3), ((7, 5, 6, 4), 4), ((1,), 1)):
        rewrite(a, (*A, *drafts))
        assert it.computed(a, num_last=len(drafts)) == computed
    assert it.computed(written(b, 9)) == 1


def test_what_was_asked_before_the_end_keeps_what_stands_behind(watched: Callable[..., Watched]) -> None:
    """A query about an earlier place of a text takes nothing back."""
    it = watched()
    text = Text([A])
    assert it.computed(text) == 43
    before = len(it.told)
    query = Query(0, text.views[0], 30, 2, law=True)
    [found], [expected] = it.model.predict([query]), it.plain.predict([query])
    assert all(close(x, y) for x, y in zip(found, expected, strict=True))
    assert sum(done.tokens for done in it.told[before:]) == 2
    assert it.computed(written(text, 7)) == 1


# -- What texts share


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_a_shared_prefix_is_computed_once(kind: str, watched: Callable[..., Watched]) -> None:
    """In one call, from a text that goes on in the same call, and from one that was finished long ago."""
    it = watched(kind)
    a, b, c = Text([A]), Text([B]), Text([C])
    assert it.computed(a, b, c) == 43 + 2 + 1
    assert it.computed(written(a, 7), (*PROMPT, 130, 131, 132, 133)) == 1 + 4
    assert it.computed((*PROMPT, 140)) == 1
    # Nobody lost what it had.
    assert it.computed(written(a, 8), written(b, 7), written(c, 7)) == 3
    it.end(a, b, c)
    assert it.computed((*PROMPT, 150)) == 1


def test_the_same_prompt_again_costs_one_token(watched: Callable[..., Watched]) -> None:
    it = watched()
    texts = [Text([PROMPT]) for _ in range(3)]
    assert it.computed(*texts) == 40 + 1 + 1
    assert it.computed(*(written(text, n) for n, text in enumerate(texts))) == 3
    assert it.computed(PROMPT, num_last=3) == 3  # hidden states are not kept: those asked for are computed


def test_texts_wait_only_for_what_they_share(watched: Callable[..., Watched]) -> None:
    """A tree: the second text shares 20 tokens with the first, the third 40 with the second; the last nothing."""
    it = watched()
    first, other = tuple(range(3, 53)), tuple(range(200, 230))
    second = (*first[:20], *range(100, 140))
    third = (*second[:40], *range(150, 160))
    assert it.computed(first, second, third, other) == 50 + 40 + 10 + 30
    assert [done.rows for done in it.told] == [2, 1, 1]
    short = watched()
    assert short.computed(first, (*first[:10], 99)) == 61  # too little to wait for
    assert len(short.told) == 1


@pytest.mark.parametrize("paged", [False, True])
def test_what_a_draft_shared_is_not_copied_once_it_is_taken_back(
    paged: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """An assistant is first asked behind a draft with which another text's prompt goes on, too."""
    network, settings = tiny("llama"), {"machinery": watching.watched()} if paged else {}
    model = LocalModel(network, tiny_tokenizer, num_slots=4, max_cache_tokens=2000, **settings)
    draft = tuple(range(100, 130))
    other, text = Text([(*PROMPT, *draft, *range(200, 240))]).views[0], written(Text([PROMPT]), *draft)
    view = text.views[0]
    # The other one is read in pieces, so that all of what is common is not there yet.
    model.predict([Query(0, other, len(PROMPT), 0), at_end(view, 5)])
    rewrite(text, (*PROMPT, *draft[:5], *range(140, 170)))
    model.predict([at_end(other)])
    [found] = model.predict([at_end(view)])
    [expected] = LocalModel(network, tiny_tokenizer, cache=False).predict([at_end(view)])
    assert close(found[0], expected[0])


def test_samples_of_one_prompt_share_its_pass(watched: Callable[..., Watched]) -> None:
    """Through the engine, whose texts all come at once: the prompt, then one token a text and pass."""
    it = watched()
    params = SamplingParams(max_tokens=4, temperature=1.0)
    writings = [alone(0, [PROMPT], replace(params, sample=n), [frozenset()]) for n in range(3)]
    texts = [text for _, text, _ in writings]
    assert sum(isinstance(event, Finished) for _, event in run(writings, [it.model])) == 3
    assert sum(done.tokens for done in it.told) == 40 + 2 + 3 * 3
    assert [text.length for text in texts] == [4, 4, 4]
    assert len({tuple(text.views[0].token_ids) for text in texts}) == 3


def test_interleaved_texts_cost_what_they_cost_alone(watched: Callable[..., Watched]) -> None:
    """Two streams of one conversation, asked by turns: neither takes the other's slot, however alike they are."""
    it = watched(num_slots=2)
    texts = [Text([PROMPT]), Text([PROMPT])]
    assert [it.computed(text) for text in texts] == [40, 1]
    for n in range(10):
        assert [it.computed(written(text, n, 50 + n)) for text in texts] == [2, 2]
    for text, last in zip(texts, (200, 201), strict=True):  # from here on they differ
        assert it.computed(written(text, last)) == 1
    assert [it.computed(written(text, 7)) for text in texts] == [1, 1]
    apart = [watched(), watched()]
    for each, text in zip(apart, texts, strict=True):
        assert each.computed(tuple(text.views[0].token_ids)) == 40 + 20 + 2


# -- Whose slot is taken


def test_a_text_that_goes_on_takes_over_the_slot(watched: Callable[..., Watched]) -> None:
    """The next turn of a chat: its new tokens are computed, in the slot of the turn before, and nobody else's."""
    it = watched(num_slots=2)
    running, turn = Text([B]), Text([A])
    it.computed(running, turn)
    it.computed(written(turn, *range(60, 80)), running)
    it.end(turn)
    following = Text([(*A, *range(60, 80), 1, 2, 3)])
    assert it.computed(following) == 3
    assert it.computed(written(running, 7)) == 1
    assert it.computed(written(following, 8)) == 1


def test_a_text_that_only_begins_alike_copies(watched: Callable[..., Watched]) -> None:
    """So that what the first one left stays for its own next turn."""
    it = watched(num_slots=4)
    turn, others = Text([(*PROMPT, *range(50, 110))]), [Text([(200 + n,)]) for n in range(3)]
    it.computed(turn, *others[:2])
    it.end(turn)
    assert it.computed((*PROMPT, 130, 131)) == 2
    assert it.computed((*PROMPT, *range(50, 110), 7)) == 1


def test_a_text_that_still_runs_is_not_taken_over(watched: Callable[..., Watched]) -> None:
    it = watched(num_slots=3)
    first = Text([A])
    it.computed(first)
    assert it.computed((*A, 7, 8)) == 2  # begins as the first does: it copies
    assert it.computed(written(first, 9)) == 1


def test_of_ended_texts_the_one_used_longest_ago_makes_room(watched: Callable[..., Watched]) -> None:
    it = watched(num_slots=3)
    starts = [tuple(range(start, start + 30)) for start in (10, 60, 110)]
    texts = [Text([ids]) for ids in starts]
    it.computed(*texts)
    for n in (1, 2, 0):
        it.computed(written(texts[n], 7))
    it.end(*texts)
    assert it.computed(tuple(range(200, 230))) == 30  # in the place of the second
    assert it.computed((*starts[2], 7, 8)) == 1 == it.computed((*starts[0], 7, 8))
    assert it.computed((*starts[1], 7, 8)) == 32


def test_a_running_text_keeps_its_slot_while_all_fit(watched: Callable[..., Watched]) -> None:
    """Others come and go beside it, long and short, more of them than there are slots."""
    it, rng = watched(max_cache_tokens=240, num_slots=4), random.Random(3)
    running = [Text([tuple(range(3, 23))]), Text([tuple(range(100, 120))])]
    it.computed(*running)
    for n in range(30):
        assert it.model.fits([60, 60, 60, 60])
        brief = [Text([[rng.randrange(320) for _ in range(rng.randrange(1, 59))]]) for _ in range(rng.randrange(3))]
        known = sum(len(text.views[0]) for text in brief)
        assert it.computed(*(written(text, n) for text in running), *brief) <= 2 + known
        before = len(it.told)
        assert it.computed(*(written(text, 50 + n % 3) for text in running) if n < 10 else running) == 2
        assert len(it.told) == before + 1
        it.end(*brief)
    assert [len(text.views[0]) for text in running] == [20 + 30 + 10] * 2


# -- How much is stored


def test_long_prompts_go_through_in_pieces(watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "PASS_TOKENS", 16)
    it = watched("gemma3_text")
    short = Text([(50, 51, 52)])
    assert it.computed(short) == 3
    assert it.computed(PROMPT, written(short, 53), num_last=2) == 42
    # The short row goes with the first piece and is not padded by it.
    assert [(done.rows, done.tokens) for done in it.told[1:]] == [(2, 16), (1, 16), (1, 10)]
    assert it.computed(tuple(range(200, 240)), tuple(range(100, 140)), num_last=25) == 80
    assert all(done.tokens <= 16 for done in it.told)


def test_a_prompt_that_is_read_by_and_by_is_computed_once(watched: Callable[..., Watched]) -> None:
    """Queries without an answer read the beginning; the last one has the rest to do."""
    it = watched()
    view = View(PROMPT)
    for length in (10, 25, 39):
        assert it.model.predict([Query(0, view, length, 0)]) == [[]]
        assert it.model.missing(at_end(view)) == 40 - length
    query = at_end(view, 3)
    [found], [expected] = it.model.predict([query]), it.plain.predict([query])
    assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert [done.tokens for done in it.told] == [10, 15, 14, 3]


def test_memory_is_bounded(watched: Callable[..., Watched]) -> None:
    it, rng = watched(max_cache_tokens=200, num_slots=4), random.Random(0)

    def begin(length: int) -> Text:
        return written(Text([(rng.randrange(320),)]), *(rng.randrange(320) for _ in range(length - 1)))

    texts = [begin(rng.randrange(1, 60)) for _ in range(6)]
    for _ in range(30):
        chosen = rng.sample(range(6), rng.randrange(1, 6))
        for i in chosen:
            if rng.random() < 0.05:
                it.end(texts[i])
                texts[i] = begin(rng.randrange(1, 60))
            if len(texts[i].views[0]) < 199:
                texts[i].append(rng.randrange(320))
            else:
                texts[i].rewind(4)
            if len(texts[i].views[0]) < 150:
                written(texts[i], *(rng.randrange(320) for _ in range(rng.choice([0, 0, 20]))))
        it.computed(*(texts[i] for i in chosen))
        assert max(tensor.shape[0] * tensor.shape[2] for tensor in stored_tensors(it.model)) <= 200
        # Two layers, keys and values, two heads of 8 numbers, 4 bytes each.
        assert 0 < it.model.cache_bytes <= 200 * 2 * 2 * 2 * 8 * 4
    assert max(len(text.views[0]) for text in texts) > 80
    it.model.forget()
    assert it.model.cache_bytes == 0
    assert it.computed(texts[0]) == len(texts[0].views[0])


def test_a_text_too_long_for_the_memory_fails_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, name="m", max_cache_tokens=20)
    found = model.predict([ask(tuple(range(21))), ask(tuple(range(20)))])
    assert reasons(found) == [["m: 21 tokens do not fit into max_cache_tokens=20; raise it to at least 21"], [""]]
    with pytest.raises(ValueError, match="max_cache_tokens must be at least 1"):
        LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=0)


@pytest.mark.parametrize("ended", [True, False])
def test_what_fits_is_held(ended: bool, watched: Callable[..., Watched]) -> None:
    """A driver that admits by `fits` never makes the model compute a token twice."""
    it = watched(max_cache_tokens=200, num_slots=4)
    fits = it.model.fits
    assert fits([]) and fits([200]) and fits([50] * 4) and fits([66, 10, 20])
    assert not fits([201]) and not fits([51] * 4) and not fits([67, 10, 20]) and not fits([1] * 5)
    assert it.plain.fits([10**9] * 99)
    # Left behind by an earlier request: one long text. Then four that grow to the last position there is.
    left = Text([tuple(range(190))])
    assert it.computed(left) == 190
    if ended:
        it.end(left)
    texts = [Text([tuple(range(start, start + 10))]) for start in (200, 220, 240, 260)]
    assert it.computed(*texts) == 40
    for token in range(40):
        for text in texts:
            text.append(token)
        assert it.computed(*texts[:2]) == 2 and it.computed(*texts[2:]) == 2


def test_running_out_of_memory_leaves_an_empty_cache(
    watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = watched()
    text = Text([A])
    it.computed(text)
    real, calls = kv_pool.KVPool.resize, iter([True, False])

    def resize(pool: kv_pool.KVPool, *args: object) -> None:
        if next(calls, False):
            pool._stored[0] = None  # as far as it got
            raise MemoryError
        real(pool, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(kv_pool.KVPool, "resize", resize)
    with pytest.raises(MemoryError):
        it.model.predict([ask(tuple(range(100)))])
    assert it.computed(text) == 43


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("begins_alike", [False, True])
def test_what_was_no_number_is_not_read_by_the_next_text(
    paged: bool, begins_alike: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The reader of a prompt goes away before anything is asked behind it; another text gets its slot, or a copy."""
    network, settings = tiny("llama"), {"machinery": watching.watched()} if paged else {}
    with torch.no_grad():
        network.get_input_embeddings().weight[300] = math.nan
    model = LocalModel(network, tiny_tokenizer, num_slots=2, max_cache_tokens=2000, **settings)
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    short = A if begins_alike else A[1:]
    views = [Text([ids]).views[0] for ids in ((*PROMPT, 300, *range(200, 260)), range(60, 180), short)]
    # It is not there to be asked behind either.
    assert reasons(model.predict([Query(0, views[0], 90, 0)])) == [
        [
            "base: the predictions after position 89 are not numbers (NaN); its weights are damaged or overflow in "
            "this dtype: try another dtype"
        ]
    ]
    model.release(views[0])
    for asked in (views[1:2], views[2:], views[1:]):
        texts = [at_end(view) for view in asked]
        for [found], [expected] in zip(model.predict(texts), plain.predict(texts), strict=True):
            assert close(found, expected)


@pytest.mark.parametrize("paged", [False, True])
def test_behind_what_is_no_number_none_follows(paged: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A text that goes through in pieces, and is asked everywhere: the pieces behind are not read behind nothing."""
    network = tiny("llama", max_position_embeddings=2048)
    settings = {"machinery": watching.watched(block=256)} if paged else {}
    with torch.no_grad():
        network.get_input_embeddings().weight[300] = math.nan
    model = LocalModel(network, tiny_tokenizer, num_slots=2, max_cache_tokens=5000, **settings)
    other, view = (Text([ids]).views[0] for ids in (range(60, 160), (*PROMPT, 300, *([7, 8, 9] * 400))))
    replies, [answer] = model.predict([Query(0, view, len(view), len(view)), at_end(other)])
    assert len(replies) == len(view) > prefix_cache.PASS_TOKENS
    assert all(isinstance(reply, Fault) for reply in replies[40:])
    [[expected]] = LocalModel(network, tiny_tokenizer, cache=False).predict([at_end(other)])
    assert close(answer, expected)


def test_two_engines_with_room_for_one_text_both_get_on(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each reads its long prompt in pieces, and the other's takes its place in between."""
    network = tiny("llama", max_position_embeddings=2048)
    model = LocalModel(network, tiny_tokenizer, num_slots=1)
    prompts = [[3 + (7 + 3 * n + 13 * i) % 300 for i in range(prefix_cache.PASS_TOKENS + 76)] for n in range(2)]
    params, eos = SamplingParams(max_tokens=3), [frozenset[int]()]
    writings = [alone(0, [prompt], params, eos) for prompt in prompts]
    twins = [Twin([model]), Twin([model])]
    for twin, writing in zip(twins, writings, strict=True):
        twin.submit(*writing)
    rounds = 0
    while any(twin.num_unfinished for twin in twins):
        for twin in twins:
            twin.step()
        rounds += 1
        assert rounds < 20, "neither gets on"
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    for prompt, (_, text, _) in zip(prompts, writings, strict=True):
        expected = alone(0, [prompt], params, eos)
        assert len(list(run([expected], [plain]))) == 4
        assert text.views[0].token_ids == expected[1].views[0].token_ids


def test_common_prefix() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice([1, 2]) for _ in range(rng.randrange(6))] for _ in range(2))
        limit = rng.randrange(7)
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert prefix_cache._common(a, b, limit) == min(expected, limit)


def test_answers_survive_scattered_and_ragged_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Lengths far enough apart that the rows of one pass are attended to in several calls."""
    network = tiny("llama", max_position_embeddings=1024)
    model, plain = LocalModel(network, tiny_tokenizer), LocalModel(network, tiny_tokenizer, cache=False)
    rng = random.Random(0)
    texts = [Text([[rng.randrange(320) for _ in range(n)]]) for n in (400, 10, 20, 500, 30)]
    model.predict([at_end(text.views[0]) for text in texts])
    queries = [at_end(written(texts[i], *range(k)).views[0]) for i, k in ((0, 1), (1, 1), (2, 1), (4, 1), (3, 5))]
    for [a], [b] in zip(model.predict(queries), plain.predict(queries), strict=True):
        assert close(a, b)


def test_memory_may_be_bounded_by_a_share(
    tiny_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    from collm.models.memory import bytes_per_token, free_bytes

    network = tiny("llama")
    with caplog.at_level("INFO", "collm.models.memory"):
        model = LocalModel(network, tiny_tokenizer, name="m", max_cache_tokens=0.001)
    [told] = caplog.messages
    gigabytes = (model.max_cache_tokens or 0) * bytes_per_token(network) / 1e9
    assert told == f"cpu: m keeps up to {model.max_cache_tokens} tokens of keys and values ({gigabytes:.1f} GB)"
    assert model.fits([64])
    assert not model.fits([2 * int(free_bytes(network.device) * 0.001 / bytes_per_token(network))])
    ask = Query.of(range(3, 67))
    model.predict([ask])
    assert model.cache_bytes == 64 * bytes_per_token(network)
    for wrong in (0, -1, 1.0, 1.5, 0.0):
        with pytest.raises(ValueError, match="max_cache_tokens must be"):
            LocalModel(network, tiny_tokenizer, max_cache_tokens=wrong)


def test_ended_texts_of_a_model_that_is_never_asked_are_not_kept(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer)
    assert isinstance(model._cache, PrefixCache)
    for _ in range(500):
        model.release(View([1, 2, 3]))
    assert len(model._cache._ended) <= 64


def test_a_text_that_ended_before_its_pass_leaves_no_slot_behind(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer)
    assert isinstance(model._cache, PrefixCache)
    query = Query.of((3, 4, 5))
    model.release(query.view)
    model.predict([query])
    assert [slot.ended for slot in model._cache.slots if slot.view is query.view] == [True]
