"""Tools as language models: they give a next-token law where they have something to say and abstain elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.models.arithmetic import continuation
from collm.models.tokenizers import shared_vocab_size
from collm.types import Answer, Prediction, Query

MAX_TAIL = 256
"""Tokens looked back for the start of the line."""


class Calculator:
    """Writes the result of the arithmetic before an "=" in the current line; abstains everywhere else.

    Its law has all its mass on one token. Exact fractions, rounded half-up to `decimals` places; `+ - * / x × ÷`,
    parentheses, decimals, negative numbers, `$`, `%` and thousands commas. White space on its own is left to the
    base; once the number is complete it abstains, so what comes after it is the base's affair.

    Args:
        tokenizer: the tokenizer of the base; the result is written in its tokens.
        decimals: decimal places kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decimals: int = 4, name: str = "calculator") -> None:
        self._tokenizer = tokenizer
        self._decimals = decimals
        self._name = name
        self._vocab_size = shared_vocab_size(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}
        # Decoding behind an anchor keeps the leading space that SentencePiece tokenizers drop at the start of a text.
        self._anchor = tokenizer.encode("=", add_special_tokens=False)
        self._anchor_text = self._decode(self._anchor)
        self._first_token = lru_cache(maxsize=4096)(self._tokenise_first)
        self._law = lru_cache(maxsize=64)(self._one_hot)

    @property
    def name(self) -> str:
        return self._name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset()

    def predict(self, queries: Sequence[Query]) -> list[list[Answer]]:
        return [self._answers(query) for query in queries]

    def _answers(self, query: Query) -> list[Answer]:
        ends = range(len(query.token_ids) - query.num_last + 1, len(query.token_ids) + 1)
        return [self._answer(query.token_ids, end) for end in ends]

    def _answer(self, token_ids: Sequence[int], end: int) -> Answer:
        line = self._line(token_ids, end)
        rest = continuation(line, self._decimals) if "=" in line else None
        token_id = None if rest is None else self._first_token(rest)
        return None if token_id is None else Prediction(self._law(token_id), token_id)

    def _line(self, token_ids: Sequence[int], end: int) -> str:
        """The text of the line that `token_ids[:end]` ends in."""
        pieces: list[str] = []
        start = end
        while start > max(0, end - MAX_TAIL):
            piece = self._piece(token_ids[start - 1])
            pieces.append(piece)
            start -= 1
            if "\n" in piece:
                break
        line = "".join(reversed(pieces))
        if "\ufffd" in line and "=" in line:  # a character spread over several tokens, perhaps an operator
            line = self._decode([token_id for token_id in token_ids[start:end] if token_id not in self._special])
        return line.rpartition("\n")[2]

    def _piece(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            special = token_id in self._special or token_id >= self._vocab_size
            # A turn marker ends a line as a line break does.
            piece = "\n" if special else self._decode([*self._anchor, token_id])[len(self._anchor_text) :]
            self._pieces[token_id] = piece
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _tokenise_first(self, text: str) -> int | None:
        """The first token of `text` in mid-line; None if that is white space on its own."""
        whole = self._tokenizer.encode("=" + text, add_special_tokens=False)
        if whole[: len(self._anchor)] == self._anchor:
            token_id = int(whole[len(self._anchor)])
        else:
            token_id = int(self._tokenizer.encode(text, add_special_tokens=False)[0])
        return token_id if self._piece(token_id).strip() else None

    def _one_hot(self, token_id: int) -> Tensor:
        law = torch.full((self._vocab_size,), -torch.inf)
        law[token_id] = 0.0
        return law


def make_tool(spec: str, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Calculator:
    """The tool of a spec (`collm.models.specs.TOOLS`), writing in the tokens of this tokenizer."""
    assert spec == "calculator", spec
    return Calculator(tokenizer, name=name or spec)
