"""What the arithmetic language model reads: the tokens sums are made of, and rows of them with and without clutter."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

import torch
from equations import solution
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.errors import CollmError

PIECES = ("\n", "####", " ", ".", "-", *"0123456789", *(f" {sign}" for sign in "+-*/="))
PIECE = re.compile(r" [-+*/=]|####|[-\n .0-9]")
OTHER = 0
"""Of the sub-vocabulary: any token that is no piece. All share one row of the embedding, and one of the head."""
PROBE = "12 + 7.5 = 19.5\n-3 * -40 = 120\n6 - 8 = -2\n9 / 2 = 4.5\n#### 4.5"
NOT_LEARNT, HARDLY_LEARNT = 0.0, 0.1
"""Weights of clutter and of operands, which cannot be known and whose noise would drown the lesson."""


class SubVocabulary:
    """The tokens that sums are made of, numbered from 1; 0 is every other token of the tokenizer.

    Raises:
        CollmError: the tokenizer does not write digits singly, or has no <|im_start|> and <|im_end|>.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        probe = list(tokenizer.encode(PROBE, add_special_tokens=False))
        vocabulary = tokenizer.get_vocab()
        ids = {piece: tokenizer.encode(piece, add_special_tokens=False) for piece in PIECES}
        single = {piece: found[0] for piece, found in ids.items() if len(found) == 1}
        if len(single) < len(PIECES) or probe != [single[piece] for piece in PIECE.findall(PROBE)]:
            raise CollmError("sums are generated for tokenizers that write each digit by itself, as SmolLM2's does")
        if not {"<|im_start|>", "<|im_end|>"} <= set(vocabulary):
            raise CollmError("the tokenizer has no <|im_start|> and <|im_end|>, around which chats are generated")
        self.token_ids = [*single.values(), vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]]
        self.start, self.end = len(self.token_ids) - 1, len(self.token_ids)
        self.numbers = {piece: number for number, piece in enumerate(single, start=1)}
        self.full_size = len(tokenizer)

    def __len__(self) -> int:
        return 1 + len(self.token_ids)

    def encode(self, text: str) -> list[int]:
        return [self.numbers[piece] for piece in PIECE.findall(text)]

    def of_full(self) -> Tensor:
        """[V] number in the sub-vocabulary of every token of the full one."""
        found = torch.full((self.full_size,), OTHER)
        found[self.token_ids] = torch.arange(1, len(self))
        return found

    def log_probs(self, logits: Tensor) -> Tensor:
        """[..., S] logits to log-probabilities of the classes, such that placing changes none of the pieces':
        the other tokens are many, and each of them has the logit of `OTHER`."""
        many = torch.zeros(len(self))
        many[OTHER] = math.log(self.full_size - len(self.token_ids))
        return (logits.float() + many).log_softmax(-1)


Piece = tuple[int, float]
"""A token of the sub-vocabulary, and how much predicting it counts."""


def clutter(rng: random.Random, words: SubVocabulary, numbers: Sequence[str] = ()) -> list[int]:
    """Text as the model sees it: words that are all alike, with stops and numbers between them, some of `numbers`."""
    found: list[int] = []
    for _ in range(rng.randrange(2, 60)):
        kind = rng.random()
        if kind < 0.1:
            other = str(rng.randrange(10 ** rng.choice((1, 2, 2, 3))))
            found += words.encode(f" {rng.choice(numbers) if numbers and rng.random() < 0.6 else other}")
        else:
            found.append(words.numbers["."] if kind < 0.17 else words.numbers["\n"] if kind < 0.18 else OTHER)
    return found


def chat(rng: random.Random, words: SubVocabulary, numbers: Sequence[str] = ()) -> list[int]:
    """A question as a chat template puts it, up to where the answer begins."""
    header, stop = [words.start, OTHER, words.numbers["\n"]], [words.end, words.numbers["\n"]]
    system = header + stop if rng.random() < 0.5 else []
    return system + header + clutter(rng, words, numbers) + stop + header


def document(rng: random.Random, words: SubVocabulary, cluttered: bool) -> list[Piece]:
    """One worked problem, with or without a chat, or other text, before it."""
    lines = list(solution(rng))
    found: list[Piece] = []
    for before, after in lines:
        found += [(token, HARDLY_LEARNT) for token in words.encode(before)]
        found += [(token, 1.0) for token in words.encode(after)]
    found += [(words.end, 1.0), (words.numbers["\n"], NOT_LEARNT)]
    if not cluttered or rng.random() < 0.2:
        return found
    numbers = re.findall(r"\d[\d.]*", lines[0][0])
    context = chat(rng, words, numbers) if rng.random() < 0.7 else clutter(rng, words, numbers)
    return [(token, NOT_LEARNT) for token in context] + found


def rows(rng: random.Random, words: SubVocabulary, count: int, length: int, cluttered: bool) -> tuple[Tensor, Tensor]:
    """[count, length] tokens and how much predicting each counts: documents one after another, the last one cut."""
    found = []
    for _ in range(count):
        row: list[Piece] = [(words.start, NOT_LEARNT)] if rng.random() < 0.5 else []
        while len(row) < length:
            row += document(rng, words, cluttered)
        found.append(row[:length])
    pairs = torch.tensor(found, dtype=torch.float64)
    return pairs[..., 0].long(), pairs[..., 1].float()
