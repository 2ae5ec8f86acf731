"""Toy systems whose law of chunks can be counted out: BPE tokenizers over five bytes (with `five_bytes`), random laws
of the next token, all texts of a few bytes in all their tokenisations."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

import pytest
import torch
from chunk_toys import train_bpe, wrapped
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from collm.cuts import START, Cuts
from collm.decoding.choosing import Draws
from collm.models.codec import ByteCodec
from collm.models.openings import Openings, chosen_at_cuts
from collm.values import Answer, LanguageModel, Query, Replies, Reply

ALPHABET = "ab 1\n"
KINDS = ("gpt2", "llama3", "digits from the right", "none", "sentencepiece", "byte fallback")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
UNSEEN = str.maketrans("", "", "1\n")
"""What a tokenizer with byte fallback has not seen."""
Ids = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def five_bytes() -> Iterator[None]:
    """What is asked of common tokenizers, and tried with them, in the five bytes that toys know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.codec.PROBE", "a b\n1")
        patch.setattr("collm.cuts.FOLLOWERS", b"a1 \nb")
        yield


def texts(num_bytes: int) -> list[bytes]:
    every = itertools.chain.from_iterable(itertools.product(ALPHABET, repeat=k) for k in range(num_bytes + 1))
    return ["".join(text).encode() for text in every]


def toy_tokenizer(kind: str, seed: int, size: int) -> ByteCodec:
    rng = random.Random(seed)
    words = ["".join(rng.choices("ab", k=rng.randint(1, 3))) for _ in range(6)] + ["1", "11", "111", "\n", "\n\n", "  "]
    corpus = ["".join(rng.choice(words) + rng.choice(["", " ", " ", "\n"]) for _ in range(8)) for _ in range(200)]
    if kind == "sentencepiece":
        tokenizer = sentencepiece(corpus, size)
    elif kind == "byte fallback":
        tokenizer = with_fallback(sentencepiece([text.translate(UNSEEN) for text in corpus], size - len(ALPHABET)))
    else:
        tokenizer = train_bpe(kind, size + 3, corpus, list("ab1ĠĊ"))
    return ByteCodec(wrapped(tokenizer))


def sentencepiece(corpus: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=size + 3, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def with_fallback(trained: Tokenizer) -> Tokenizer:
    """With tokens of single bytes: the only ones for what it has not seen, and second ones for the letters."""
    state = json.loads(trained.to_str())["model"]
    learnt = [token for token in state["vocab"] if token not in SPECIAL]
    names = [*SPECIAL, *(f"<0x{ord(letter):02X}>" for letter in ALPHABET), *learnt]
    vocab = {name: n for n, name in enumerate(names)}
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def with_cuts(codecs: Sequence[ByteCodec]) -> tuple[Cuts, list[ByteCodec]]:
    cuts = Cuts.of(codec.pieces for codec in codecs)
    return cuts, [ByteCodec(codec.tokenizer, cuts) for codec in codecs]


class Toy(LanguageModel):
    """A random law given the last two tokens, of texts of at most `num_bytes`; `damp` weakens what is not canonical.

    As the base its answers carry a gate, a function of the bytes so far.
    """

    def __init__(self, codec: ByteCodec, cuts: Cuts, seed: int, num_bytes: int, damp: float, base: bool) -> None:
        self.codec, self.cuts, self.seed, self.num_bytes, self.damp, self.base = (
            codec, cuts, seed, num_bytes, damp, base,
        )  # fmt: skip
        [self.eos] = codec.ends
        self.size = len(codec.pieces)
        self.openings = Openings.of(cuts, codec.first_bytes, self.size)
        self.law = lru_cache(maxsize=None)(self._law)
        self.encode = cache(lambda data: tuple(codec.encode(data.decode())))
        self.encode_open = cache(lambda data: codec.canonical(data) if data else ())

    @property
    def name(self) -> str:
        return f"toy {self.seed}"

    @property
    def instant(self) -> bool:
        return True

    def read(self, data: bytes) -> Ids:
        """How it reads a text up to a cut."""
        return tuple(v for chunk in self.cuts.chunks(data) for v in self.codec.chunk_ids(chunk))

    def data(self, ids: Ids) -> bytes:
        return self.codec.data(ids)

    def _law(self, ids: Ids) -> dict[int, float]:
        length = len(self.data(ids))
        rng = random.Random(f"{self.seed} {ids[-2:]}")
        weights = {v: rng.random() ** 2 + 0.02 for v in range(self.size)}
        for v, piece in enumerate(self.codec.pieces):
            if v != self.eos and (piece is None or length + len(piece) > self.num_bytes):
                weights[v] = 0.0
            elif v != self.eos and self.encode_open(self.data((*ids, v))) != (*ids, v):
                weights[v] *= self.damp
        total = sum(weights.values())
        return {v: w / total for v, w in weights.items() if w}

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [[self._reply(query)] for query in queries]

    def _reply(self, query: Query) -> Reply:
        ids = tuple(query.view.token_ids[query.view.prompt_length : query.length])
        log_probs = torch.full((1, self.size), -torch.inf)
        for v, p in self.law(ids).items():
            log_probs[0, v] = math.log(p)
        position = query.length - query.view.prompt_length + query.view.shift
        draws = Draws.of([(query.draw, position)])
        cuts = torch.tensor([[query.last_bytes[0], int(query.opens)]])
        columns = chosen_at_cuts(log_probs, torch.tensor(draws.words, dtype=torch.int64), draws, cuts, self.openings)
        top, top_log_prob, entropy, chosen, log_prob, close = (float(column) for column in columns)
        gate = tuple(map(math.log, gate_at(self.data(ids)))) if self.base else None
        return Answer(int(chosen), log_prob, int(top), top_log_prob, entropy, gate, log_close=close)


def gate_at(left: bytes) -> list[float]:
    g = random.Random(f"gate {left!r}").random()
    return [g, 1 - g]


class ChunkLaw:
    """The law of texts under toys, by recursion over all tokenisations.

    Args:
        closing: with closing factors.
        canonical: only tokenisations that a tokenizer would make.
    """

    def __init__(self, toys: Sequence[Toy], closing: bool = True, canonical: bool = False) -> None:
        self.toys, self.closing, self.canonical = toys, closing, canonical
        self.cuts = toys[0].cuts
        self.chunk = lru_cache(maxsize=None)(self._chunk)

    def opens(self, toy: Toy, left: bytes, v: int) -> bool:
        return self.cuts.opens(left[-1] if left else START, toy.codec.first_bytes[v])

    def close(self, toy: Toy, ids: Ids) -> float:
        left = toy.data(ids)
        return sum(p for v, p in toy.law(ids).items() if self.opens(toy, left, v))

    def _chunk(self, z: int, left: bytes, chunk: bytes) -> float:
        """q_z(chunk | left); the empty chunk is the end of the text."""
        toy = self.toys[z]
        start = toy.read(left)
        norm = (self.close(toy, start) or 1.0) if self.closing else 1.0
        if not chunk:
            return toy.law(start).get(toy.eos, 0.0) / norm
        whole = (*start, *(toy.encode_open(chunk) or ()))

        def paths(ids: Ids, rest: bytes) -> float:
            if not rest:
                return self.close(toy, ids) if self.closing else 1.0
            total, done = 0.0, left + chunk[: len(chunk) - len(rest)]
            for v, p in toy.law(ids).items():
                piece = toy.codec.pieces[v]
                if v == toy.eos or not piece or not rest.startswith(piece):
                    continue
                if self.opens(toy, done, v) != (ids == start):
                    continue
                if not self.canonical or (*ids, v) == whole[: len(ids) + 1]:
                    total += p * paths((*ids, v), rest[len(piece) :])
            return total

        return paths(start, chunk) / norm

    def text(self, data: bytes) -> float:
        offsets = self.cuts.offsets(data)
        spans: Iterator[tuple[int, int]] = itertools.chain(itertools.pairwise(offsets), [(len(data), len(data))])
        return math.prod(
            sum(
                g * self.chunk(z, data[:a], data[a:b])
                for z, g in enumerate(gate_at(data[:a]) if len(self.toys) == 2 else [1.0])
            )
            for a, b in spans
        )
