"""Where texts sit in the KV pool: what is computed, what is copied, and how much is stored."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from test_local import close, reasons, stored_tensors, tiny
from transformers import PreTrainedTokenizerFast

from collm.models import prefix_cache
from collm.models.local import LocalModel
from collm.models.slots import REWIND, SlotTable, common_prefix
from collm.types import ForwardPass, Query

Ids = tuple[int, ...]


class Watched:
    """A cached model, its plain twin, and the tokens that each call computed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: str = "llama", **settings: int) -> None:
        self.told: list[ForwardPass] = []
        network = tiny(kind)
        self.model = LocalModel(network, tokenizer, name="m", on_pass=self.told.append, **settings)
        self.plain = LocalModel(network, tokenizer, cache=False)

    def computed(self, *texts: Ids, num_last: int = 1) -> int:
        """Tokens that went through the model for these texts; their answers are checked."""
        queries, before = [Query(0, ids, num_last) for ids in texts], len(self.told)
        for found, expected in zip(self.model.predict(queries), self.plain.predict(queries), strict=True):
            assert len(found) == len(expected) == num_last
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))
        return sum(done.tokens for done in self.told[before:])


@pytest.fixture
def watched(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Watched]:
    return lambda kind="llama", **settings: Watched(tiny_tokenizer, kind, **settings)


PROMPT = tuple(range(3, 43))
A, B, C = (*PROMPT, 100, 101, 102), (*PROMPT, 110, 111), (*PROMPT, 120)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_a_shared_prefix_is_computed_once(kind: str, watched: Callable[..., Watched]) -> None:
    """In one call, from a text that goes on in the same call, and from one that was finished long ago."""
    it = watched(kind)
    assert it.computed(A, B, C) == 43 + 2 + 1
    assert it.computed((*A, 7), (*PROMPT, 130, 131, 132, 133)) == 1 + 4
    assert it.computed((*PROMPT, 140)) == 1
    # Nobody lost what it had.
    assert it.computed((*A, 7, 8), (*B, 7), (*C, 7)) == 3


def test_the_same_prompt_again_costs_one_token(watched: Callable[..., Watched]) -> None:
    it = watched()
    assert it.computed(PROMPT, PROMPT, PROMPT) == 40 + 1 + 1
    assert it.computed((*PROMPT, 5), (*PROMPT, 6), (*PROMPT, 7)) == 3
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


def test_a_draft_is_taken_back_in_its_own_slot(watched: Callable[..., Watched]) -> None:
    it = watched(num_slots=2)
    assert it.computed(A, B) == 45
    # What had been drafted before is replaced; the other text stays where it is.
    for drafts, computed in (((7, 8, 9), 3), ((7, 5, 6, 4), 4), ((1,), 1)):
        assert it.computed((*A, *drafts), num_last=len(drafts)) == computed
    assert it.computed((*B, 9)) == 1


def test_long_prompts_go_through_in_pieces(watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "PASS_TOKENS", 16)
    it = watched("gemma3_text")
    assert it.computed((50, 51, 52)) == 3
    assert it.computed(PROMPT, (50, 51, 52, 53), num_last=2) == 42
    # The short row goes with the first piece and is not padded by it.
    assert [(done.rows, done.tokens) for done in it.told[1:]] == [(2, 16), (1, 16), (1, 10)]
    assert it.computed(tuple(range(200, 240)), tuple(range(100, 140)), num_last=25) == 80
    assert all(done.tokens <= 16 for done in it.told)


def test_memory_is_bounded(watched: Callable[..., Watched]) -> None:
    it, rng = watched(max_cache_tokens=200, num_slots=4), random.Random(0)
    texts = [tuple(rng.randrange(320) for _ in range(rng.randrange(1, 60))) for _ in range(6)]
    for _ in range(30):
        chosen = rng.sample(range(6), rng.randrange(1, 6))
        for i in chosen:
            texts[i] = (*texts[i], rng.randrange(320)) if len(texts[i]) < 199 else texts[i][:5]
            texts[i] += tuple(rng.randrange(320) for _ in range(rng.choice([0, 0, 20]))) if len(texts[i]) < 150 else ()
        it.computed(*(texts[i] for i in chosen))
        assert max(tensor.shape[0] * tensor.shape[2] for tensor in stored_tensors(it.model)) <= 200
        # Two layers, keys and values, two heads of 8 numbers, 4 bytes each.
        assert 0 < it.model.cache_bytes <= 200 * 2 * 2 * 2 * 8 * 4
    assert max(map(len, texts)) > 80
    it.model.forget()
    assert it.model.cache_bytes == 0
    assert it.computed(texts[0]) == len(texts[0])


def test_a_text_too_long_for_the_memory_fails_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, name="m", max_cache_tokens=20)
    found = model.predict([Query(0, tuple(range(21))), Query(0, tuple(range(20)))])
    assert reasons(found) == [["m: 21 tokens do not fit into max_cache_tokens=20; raise it to at least 21"], [""]]
    with pytest.raises(ValueError, match="max_cache_tokens must be at least 1"):
        LocalModel(tiny("llama"), tiny_tokenizer, max_cache_tokens=0)


def test_what_fits_is_held(watched: Callable[..., Watched]) -> None:
    """A driver that admits by `fits` never makes the model compute a token twice."""
    it = watched(max_cache_tokens=200, num_slots=4)
    fits = it.model.fits
    assert fits([]) and fits([200]) and fits([50] * 4) and fits([66, 10, 20])
    assert not fits([201]) and not fits([51] * 4) and not fits([67, 10, 20]) and not fits([1] * 5)
    assert it.plain.fits([10**9] * 99)
    # Left behind by an earlier request: one long text. Then four that grow to the last position there is.
    assert it.computed(tuple(range(190))) == 190
    texts = [tuple(range(start, start + 10)) for start in (200, 220, 240, 260)]
    assert it.computed(*texts) == 40
    for token in range(40):
        texts = [(*text, token) for text in texts]
        assert it.computed(*texts[:2]) == 2 and it.computed(*texts[2:]) == 2


def test_running_out_of_memory_leaves_an_empty_cache(
    watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    it = watched()
    it.computed(A)
    real, calls = prefix_cache.KVPool.resize, iter([True, False])

    def resize(pool: prefix_cache.KVPool, *args: object) -> None:
        if next(calls, False):
            pool._stored[0] = None  # as far as it got
            raise MemoryError
        real(pool, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(prefix_cache.KVPool, "resize", resize)
    with pytest.raises(MemoryError):
        it.model.predict([Query(0, tuple(range(100)))])
    assert it.computed(A) == 43


def table_of(*texts: Ids, root: int) -> SlotTable:
    table = SlotTable()
    table.resize([], len(texts), 500)
    for slot, ids in zip(table.slots, texts, strict=True):
        slot.held, slot.root = ids, root
    return table


def test_slots_prefer_the_text_that_is_extended() -> None:
    table = table_of((1, 2), (1, 2, 3), (9,), root=1)
    assert table.match([(1, 2, 3, 4)]) == {0: 1}
    assert table.match([(1, 2, 4), (1, 2, 3, 5)]) == {0: 0, 1: 1}
    assert table.match([(5, 5, 5)]) == {}
    assert table.match([(9, 1), (9, 2)]) == {0: 2}  # one text for each slot
    table.touch([0, 2])
    assert table.open(2, taken=()) == 1  # used longest ago
    assert table.open(2, taken={1}) == 0


def test_a_text_is_told_by_its_prompt_and_loses_little() -> None:
    long = tuple(range(200))
    table = table_of(long, root=100)
    assert table.match([(*long[:190], 7)]) == {0: 0}
    assert table.match([(*long[: 200 - REWIND - 1], 7)]) == {}  # another sample of the same prompt
    table = table_of(long[:110], root=100)
    assert table.match([(*long[:99], 7)]) == {}  # another prompt
    assert table.match([(*long[:100], 7)]) == {0: 0}


def test_common_prefix() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = (tuple(rng.choice([1, 2]) for _ in range(rng.randrange(6))) for _ in range(2))
        expected = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert common_prefix(a, b) == expected


def test_answers_survive_scattered_and_ragged_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Lengths far enough apart that the rows of one pass are attended to in several calls."""
    network = tiny("llama", max_position_embeddings=1024)
    model, plain = LocalModel(network, tiny_tokenizer), LocalModel(network, tiny_tokenizer, cache=False)
    rng = random.Random(0)
    texts = [tuple(rng.randrange(320) for _ in range(n)) for n in (400, 10, 20, 500, 30)]
    model.predict([Query(0, ids) for ids in texts])
    queries = [Query(0, (*texts[i], *range(k)), 1) for i, k in ((0, 1), (1, 1), (2, 1), (4, 1), (3, 5))]
    for [a], [b] in zip(model.predict(queries), plain.predict(queries), strict=True):
        assert close(a, b)
