"""Whatever people write, in any script: models take turns inside no character and no token."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import torch
from chunk_toys import MORE, byte_level, sentencepiece_like
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from collm.cuts import START, Cuts
from collm.decoding.choosing import Draws
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunked import chunked
from collm.decoding.policies import Random
from collm.engine.twin import run
from collm.models.codec import ByteCodec, vocabulary
from collm.models.openings import Openings, chosen_at_cuts
from collm.models.pairing import cuts_between
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import Answer, LanguageModel, Query, Replies, Reply

NAMES = ("base", "one", "two")


def codecs() -> list[ByteCodec]:
    own = [byte_level("gpt2", 400), byte_level("llama3", 460, seed=1), sentencepiece_like()]
    cuts = cuts_between(own, NAMES)
    assert cuts is not None
    return [ByteCodec(tokenizer, cuts, name=name) for tokenizer, name in zip(own, NAMES, strict=True)]


CODECS = codecs()


def script(first: int, last: int) -> st.SearchStrategy[str]:
    letters = st.characters(min_codepoint=first, max_codepoint=last, categories=["L", "M", "N", "P"])
    return st.text(letters, min_size=1, max_size=8)


SCRIPTS = st.one_of(
    script(0x00C0, 0x024F),  # Latin with marks
    st.text(st.sampled_from("aeou\u0301\u0308\u0327"), min_size=1, max_size=8),  # marks of their own
    script(0x0370, 0x03FF),  # Greek
    script(0x0400, 0x04FF),  # Cyrillic
    script(0x0590, 0x06FF),  # Hebrew, Arabic
    script(0x0900, 0x097F),  # Devanagari
    script(0x0E00, 0x0E7F),  # Thai
    script(0x3040, 0x30FF),  # kana
    script(0x4E00, 0x9FFF),  # Chinese
    script(0xAC00, 0xD7A3),  # Hangul
)
EMOJI = st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🏳️‍🌈", "👋🏽", "👨🏿‍🚀", "🇩🇪🇫🇷", "1️⃣", "❤️‍🔥", "🫠"]), min_size=1, max_size=3
).map("".join)
NUMBERS = st.one_of(
    st.integers(0, 10**30).map(str),
    st.decimals(-(10**9), 10**9, allow_nan=False, places=4).map(str),
    st.integers(0, 10**15).map("{:,}".format),
    st.integers(0, 2**64).map(hex),
    st.lists(st.integers(0, 999), min_size=2, max_size=5).map(lambda parts: ".".join(map(str, parts))),
)
CODE = st.lists(
    st.sampled_from(
        ["def f(x):\n", "\n", "    ", "\t", "    return", " x[0]", "->", "{'a': 1}", "//", "\r\n", "==", "```", '"""']
    ),
    min_size=1, max_size=8,
).map("".join)  # fmt: skip
ANY = st.text(st.characters(codec="utf-8"), max_size=12)
WRITTEN = (
    st.lists(st.one_of(SCRIPTS, EMOJI, NUMBERS, CODE, ANY, st.sampled_from([" ", "  ", "\n\n", *MORE])), max_size=6)
    .map("".join)
    # Of these three tokenizers: the mark of a space is one, and "<" begins literal special tokens.
    .map(lambda text: text.replace("▁", "_").replace("<", "("))
)


@settings(max_examples=150, deadline=None)
@given(WRITTEN)
def test_cuts_lie_within_no_character_and_no_token(text: str) -> None:
    """Of every tokenizer; and what a model makes of the chunks is what it makes of the text."""
    whole = text.encode()
    for codec in CODECS:
        assert codec.cuts is not None
        chunks = codec.cuts.chunks(whole)
        for chunk in chunks:
            chunk.decode()
        ids = codec.encode(text)
        ends = {0, *codec.lengths(ids)}
        assert ends.issuperset(codec.cuts.offsets(whole))
        assert codec.data([v for chunk in chunks for v in codec.chunk_ids(chunk)]) == whole


class Reciter(LanguageModel):
    """Is certain of one text, in the tokens of its own tokenizer."""

    def __init__(self, number: int, codec: ByteCodec, text: str) -> None:
        assert codec.cuts is not None
        self.number, self.codec, self.size = number, codec, len(codec.pieces)
        self.openings = Openings.of(codec.cuts, codec.first_bytes, self.size)
        ids = codec.encode(text)
        self.next = dict(zip([0, *codec.lengths(ids)], [*ids, min(codec.ends)], strict=True))

    @property
    def name(self) -> str:
        return self.codec.name

    @property
    def instant(self) -> bool:
        return True

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [[self._reply(query)] for query in queries]

    def _reply(self, query: Query) -> Reply:
        view = query.view
        log_probs = torch.full((1, self.size), -torch.inf)
        log_probs[0, self.next[len(self.codec.data(view.token_ids[view.prompt_length : query.length]))]] = 0.0
        draws = Draws.of([(query.draw, query.length - view.prompt_length + view.shift)])
        cuts = torch.tensor([[query.last_bytes[0], int(query.opens)]])
        columns = chosen_at_cuts(log_probs, torch.tensor(draws.words, dtype=torch.int64), draws, cuts, self.openings)
        top, top_log_prob, entropy, chosen, log_prob, close = (float(column) for column in columns)
        gate = (-math.log(3),) * 3 if self.number == BASE else None
        return Answer(int(chosen), log_prob, int(top), top_log_prob, entropy, gate, log_close=close)


@settings(max_examples=100, deadline=None)
@given(WRITTEN.filter(bool), st.integers(0, 2**16))
def test_whoever_writes_hands_over_inside_no_character_and_no_token(text: str, seed: int) -> None:
    """Three models that recite one text, each in its own tokens, take turns at random: it comes out whole."""
    models = [Reciter(z, codec, text) for z, codec in enumerate(CODECS)]
    assert CODECS[BASE].cuts is not None
    length = 4 * len(text) + 1  # as many tokens as it can have
    params = SamplingParams(max_tokens=length, seed=seed)
    written = ChunkText([[], [], []], CODECS, CODECS[BASE].cuts)
    flow = chunked(written, params, Random(0.7, 2), min(CODECS[BASE].ends))
    steps = [event for _, event in run([(flow, written, length)], models) if isinstance(event, Step)]
    assert b"".join(step.data or b"" for step in steps).decode() == text
    turns = [sum(len(step.data or b"") for step in steps[:n]) for n in range(len(steps))]
    for turn in turns:
        text.encode()[:turn].decode()
    for z, codec in enumerate(CODECS):
        ids = written.read(z).token_ids
        assert codec.data(ids).decode() == text
        assert {0, *codec.lengths(ids)}.issuperset(turns)
    assert steps[-1].data == b""


def test_an_assistant_writes_as_many_tokens_of_the_base_as_are_asked_for() -> None:
    """Not as many of its own: of words whose letters are its tokens, and of characters whose bytes are, but a part of
    the text would be left."""
    own = [byte_level("none", 460, more=["世界你好，你好世界。世界！" * 3]), byte_level("gpt2", 259)]
    cuts = cuts_between(own, NAMES[:2])
    assert cuts is not None
    pair = [ByteCodec(tokenizer, cuts, name=name) for tokenizer, name in zip(own, NAMES, strict=False)]
    finer = 0
    for text in ("The capital of France, 世界你好，你好世界。", MORE[0], MORE[1]):
        models = [Reciter(z, codec, text) for z, codec in enumerate(pair)]
        gold = [codec.encode(text) for codec in pair]
        chunks = [len(pair[1].chunk_ids(chunk)) - len(pair[0].chunk_ids(chunk)) for chunk in cuts.chunks(text.encode())]
        finer += max(chunks)
        for length in range(1, len(gold[0]) + 1):
            written = ChunkText([[], []], pair, cuts)
            flow = chunked(written, SamplingParams(max_tokens=length), Random(1.0, 1), min(pair[0].ends))
            steps = [event for _, event in run([(flow, written, length)], models) if isinstance(event, Step)]
            assert sum(len(step.token_ids) for step in steps) == length
            data = b"".join(step.data or b"" for step in steps)
            assert text.encode().startswith(data) and {step.author for step in steps} == {1}
            assert all(sum(step.token_lengths) == len(step.data or b"") for step in steps)
    assert finer > 10


def test_a_character_of_several_tokens_is_written_to_its_end() -> None:
    """No token holds its first byte and another character's: nothing else may open there, but the character goes on."""
    cuts = CODECS[BASE].cuts
    assert cuts is not None
    assert not any(cuts.free[byte] for byte in range(0x80, 256)) and cuts.free[START]
    written = ChunkText([[], [], []], CODECS, cuts)
    models = [Reciter(z, codec, "é世x") for z, codec in enumerate(CODECS)]
    params = SamplingParams(max_tokens=20)
    flow = chunked(written, params, Random(0.0, 2), min(CODECS[BASE].ends))
    steps = [event for _, event in run([(flow, written, 20)], models) if isinstance(event, Step)]
    assert [(step.data or b"").decode() for step in steps] == ["é", "世", "x", ""]
    assert [len(step.token_ids) for step in steps] == [2, 2, 1, 1]


def test_tokens_that_no_text_holds_forbid_no_cuts() -> None:
    """One `[PAD151668]` would part no two digits any more, in any model of the system. Added text does so."""
    plain = byte_level("llama3", 460, seed=1)
    table = Cuts.of([vocabulary(plain)])
    for token in (
        "[PAD]",
        "[PAD151668]",
        "<unused17>",
        "[unused5]",
        "<|reserved_special_token_23|>",
        "<pad>",
        "<|extra_7|>",
    ):
        filled = byte_level("llama3", 460, seed=1)
        assert filled.add_tokens([token]) == 1
        pieces = vocabulary(filled)
        assert pieces[filled.convert_tokens_to_ids(token)] is None, token
        assert Cuts.of([pieces]).fingerprint == table.fingerprint, token
        # Those that a tokenizer's file lists among its ordinary ones, too: a GGUF file does.
        state = json.loads(plain.backend_tokenizer.to_str())
        number = len(vocabulary(plain))
        state["model"]["vocab"][token] = number
        listed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>")
        assert vocabulary(listed)[number] is None, token
        assert Cuts.of([vocabulary(listed)]).fingerprint == table.fingerprint, token
    spoken = byte_level("llama3", 460, seed=1)
    assert spoken.add_tokens(["x151668"]) == 1
    crossed = table.allowed & ~Cuts.of([vocabulary(spoken)]).allowed
    pairs = {(ord(a), ord(b)) for a, b in itertools.pairwise("x151668")}
    assert {(int(a), int(b)) for a, b in np.argwhere(crossed)} == {pair for pair in pairs if table.allowed[pair]}
    assert crossed.any()
