"""The law of chunks: counted out, drawn from, and what decoding by it leaves as it was."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from chunk_law import KINDS, ChunkLaw, Toy, five_bytes, texts, toy_tokenizer, with_cuts

from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunked import chunked
from collm.decoding.policies import Sampled
from collm.engine.twin import run
from collm.sampling_params import SamplingParams
from collm.types import Step

NUM_BYTES = 3
__all__ = ["five_bytes"]
PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))


def test_a_tokenizer_with_byte_fallback_has_bytes_for_what_it_has_not_seen() -> None:
    codec = toy_tokenizer("byte fallback", 2, 18)
    assert codec.encode("1\n") == [codec.tokenizer.convert_tokens_to_ids(name) for name in ("<0x31>", "<0x0A>")]
    assert [v for v, piece in enumerate(codec.pieces) if piece == b"a"] == [
        codec.tokenizer.convert_tokens_to_ids(name) for name in ("<0x61>", "a")
    ]
    assert any(piece and len(piece) > 1 for piece in codec.pieces)


def toys(one: str, two: str, damp: float) -> list[Toy]:
    cuts, codecs = with_cuts([toy_tokenizer(one, 1, 14), toy_tokenizer(two, 2, 18)])
    return [Toy(codec, cuts, z, NUM_BYTES, damp, base=z == 0) for z, codec in enumerate(codecs)]


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_the_law_of_chunks_sums_to_one(one: str, two: str) -> None:
    """Every text of up to three bytes in every tokenisation. Over those of a tokenizer a little is lost; without
    closing factors it is no law."""
    every = texts(NUM_BYTES)
    for damp in (1.0, 0.05):
        pair = toys(one, two, damp)
        assert math.fsum(map(ChunkLaw(pair).text, every)) == pytest.approx(1.0, abs=1e-6)
        if damp < 1:
            assert 0.8 < math.fsum(map(ChunkLaw(pair, canonical=True).text, every)) < 1
            assert abs(math.fsum(map(ChunkLaw(pair, closing=False).text, every)) - 1) > 1e-4
    # One writer throughout has its ordinary likelihood: the closing factors cancel.
    toy = toys(one, two, 0.0)[1]
    alone = ChunkLaw([toy], canonical=True)
    seen = 0
    for data in every:
        ids = toy.encode(data)
        ordinary = math.prod(toy.law(ids[:i]).get(v, 0.0) for i, v in enumerate((*ids, toy.eos)))
        prefixes = [toy.read(data[:cut]) for cut in toy.cuts.offsets(data)]
        if ordinary and all(prefix == ids[: len(prefix)] for prefix in prefixes):
            assert alone.text(data) == pytest.approx(ordinary, rel=1e-9)
            seen += 1
    assert seen > 10


def drawn(pair: list[Toy], sample: int) -> tuple[list[Step], ChunkText]:
    text = ChunkText([[], []], [toy.codec for toy in pair], pair[0].cuts)
    params = SamplingParams(temperature=1.0, seed=5, sample=sample, max_tokens=50, deferral="sampled")
    flow = chunked(text, params, Sampled(), pair[0].eos)
    steps = [event for _, event in run([(flow, text, 50)], pair) if isinstance(event, Step)]
    return steps, text


@pytest.mark.parametrize(
    ("one", "two"),
    [("gpt2", "llama3"), ("llama3", "none"), ("gpt2", "sentencepiece"), ("gpt2", "byte fallback")],
)
def test_drawn_texts_follow_the_law(one: str, two: str) -> None:
    """Distance to the law that was counted out, no larger than chance makes it; each step tells its probability."""
    pair = toys(one, two, 0.05)
    law, every, count = ChunkLaw(pair), texts(NUM_BYTES), 800
    seen = Counter[bytes]()
    for sample in range(count):
        steps, text = drawn(pair, sample)
        data = b"".join(step.data or b"" for step in steps)
        seen[data] += 1
        assert [step.data for step in steps[:-1]] == pair[0].cuts.chunks(data) and steps[-1].data == b""
        if sample < 100:
            left = b""
            for step in steps:
                assert step.data is not None
                # Of several tokenisations one was written: never more probable than all of them.
                assert math.exp(step.log_prob) <= law.chunk(step.author, left, step.data) + 1e-6
                left += step.data
    p = np.array([law.text(data) for data in every])
    f = np.array([seen[data] for data in every]) / count
    noise = np.sqrt(2 / math.pi * p * (1 - p) / count).sum() / 2
    assert sum(seen.values()) == sum(seen[data] for data in every)
    assert abs(f - p).sum() / 2 < 1.25 * noise
