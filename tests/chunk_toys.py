"""Tiny models with different tokenizers, for tests of chunks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from tiny import CORPUS, wrapped
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(pattern: str) -> Any:
    pieces = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(pieces)


PRETOKENIZERS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": _split(LLAMA3),
    "digits from the right": _split(r"\d{1,2}(?=(?:\d{2})*(?!\d))|[^\d\s]+|\s+"),
    "none": _split(r"[\s\S]+"),
}
"""What pretokenizers differ in: how far they look ahead, digits, one that cuts nothing up."""
MORE = (
    "def mean(values):\n    return sum(values) / len(values)\n\n\nx = [1, 22, 333]\n",
    "Größe: 12,5 km — naïve café, привет мир, 你好，世界! 👋🏽\n\n\tTabs and  spaces.\n",
    "https://example.org/a?b=c&d=%20 version 1.22.333\r\n",
)


def train_bpe(pretokenizer: str, vocab_size: int, corpus: list[str], alphabet: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRETOKENIZERS[pretokenizer]
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_level(
    pretokenizer: str = "gpt2", vocab_size: int = 420, seed: int = 0, more: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A byte-level BPE over common text, and more of it; another seed learns other merges."""
    corpus = [*CORPUS, *MORE, *more] * 3
    random.Random(seed).shuffle(corpus)
    corpus = corpus[seed:]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return wrapped(train_bpe(pretokenizer, vocab_size, corpus, alphabet))


def sentencepiece_like(vocab_size: int = 480, *, fallback: bool = True) -> PreTrainedTokenizerFast:
    """As Gemma's: spaces become a mark, no pretokenizer, byte fallback (or `<unk>`) for what is not in the alphabet."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    size = vocab_size - 256 - 4
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([*CORPUS] * 3, trainer)
    state = json.loads(trained.to_str())["model"]
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    names += [f"<0x{b:02X}>" for b in range(256)] * fallback
    vocab = {name: n for n, name in enumerate([*names, *state["vocab"]])}
    merges = [tuple(merge) for merge in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=fallback, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = wrapped(tokenizer)
    fast.unk_token = "<unk>"
    return fast
