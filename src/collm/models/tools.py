"""Tools as language models: they are certain of a token where they have something to say, and abstain elsewhere."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from collm.models.arithmetic import continuation
from collm.models.tokenizers import shared_vocab_size
from collm.values import Answer, LanguageModel, Query, Replies, Reply

MAX_TAIL = 256
"""Tokens looked back for the start of the line."""


class Tool(LanguageModel):
    """A writer that has something to say in a few places and abstains everywhere else.

    `write` is all there is to implement:

        class Clock(Tool):
            def write(self, token_ids: Sequence[int]) -> int | None:
                _, asked, told = self.line(token_ids).rpartition("The time is")
                now = time.strftime(" %H:%M")
                goes_on = asked and told != now and now.startswith(told)
                return self.first_token(now[len(told) :]) if goes_on else None

    Args:
        tokenizer: the tokenizer of the base, in whose tokens it writes.
        name: as the gate, calibration and results call it.
    """

    ends_in: bytes = bytes(range(256))
    """What an answer of it may end with, one byte each: anything, unless a subclass knows better. Between models with
    different tokenizers each has to stand alone in all of them (`collm.models.pairing.require_free_tools`). Bytes from
    0x80 on never do, for a character may go on behind them: a tool that keeps this default is always refused there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer = tokenizer
        self._name = name
        self._vocab_size = shared_vocab_size(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}
        # Decoding behind an anchor keeps the leading space that SentencePiece tokenizers drop at the start of a text.
        self._anchor = tokenizer.encode("=", add_special_tokens=False)
        self._anchor_text = self._decode(self._anchor)
        self.first_token = lru_cache(maxsize=4096)(self._first_token)
        self._law = lru_cache(maxsize=64)(self._one_hot)

    @property
    def name(self) -> str:
        return self._name

    @property
    def instant(self) -> bool:
        return True

    @abstractmethod
    def write(self, token_ids: Sequence[int]) -> int | None:
        """The next token behind these, of which it is certain; None to abstain."""

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [
            [
                self._reply(query, i, end)
                for i, end in enumerate(range(query.length - query.num_last + 1, query.length + 1))
            ]
            for query in queries
        ]

    def _reply(self, query: Query, i: int, end: int) -> Reply:
        tail = query.view.token_ids[max(0, end - MAX_TAIL) : end]
        token_id = self.write(tail)
        if token_id is None:
            return None
        given = None if query.given is None else 0.0 if query.given[i] == token_id else -math.inf
        best = ((token_id, 0.0),) if query.num_top else ()
        return Answer(token_id, 0.0, token_id, 0.0, 0.0, None, given, best, self._law(token_id) if query.law else None)

    def line(self, token_ids: Sequence[int]) -> str:
        """The text of the line that these tokens end in; a turn marker ends a line as a line break does."""
        pieces: list[str] = []
        start = end = len(token_ids)
        while start > max(0, end - MAX_TAIL):
            piece = self._piece(token_ids[start - 1])
            pieces.append(piece)
            start -= 1
            if "\n" in piece:
                break
        line = "".join(reversed(pieces))
        if "\ufffd" in line:  # a character spread over several tokens
            line = self._decode([token_id for token_id in token_ids[start:end] if token_id not in self._special])
        return line.rpartition("\n")[2]

    def _piece(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            special = token_id in self._special or token_id >= self._vocab_size
            piece = "\n" if special else self._decode([*self._anchor, token_id])[len(self._anchor_text) :]
            self._pieces[token_id] = piece
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _first_token(self, text: str) -> int | None:
        """The first token of `text` in mid-line; None if that is white space on its own, which is left to the base."""
        whole = self.tokenizer.encode("=" + text, add_special_tokens=False)
        if whole[: len(self._anchor)] == self._anchor:
            token_id = int(whole[len(self._anchor)])
        else:
            token_id = int(self.tokenizer.encode(text, add_special_tokens=False)[0])
        return token_id if self._piece(token_id).strip() else None

    def _one_hot(self, token_id: int) -> Tensor:
        law = torch.full((self._vocab_size,), -torch.inf)
        law[token_id] = 0.0
        return law


class Calculator(Tool):
    """Writes the result of the arithmetic before an "=" in the current line; abstains everywhere else.

    Exact fractions, rounded half-up to `decimals` places; `+ - * / x × ÷`, parentheses, decimals, negative numbers,
    `$`, `%` and thousands commas; the same in LaTeX (`\\( 12 \\times 35 =`, fractions, units in `\\text`). White space
    on its own is left to the base; once the number is complete it abstains: what comes after it is the base's affair.

    Args:
        decimals: decimal places kept.
    """

    ends_in = b"0123456789"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, decimals: int = 4, name: str = "calculator") -> None:
        super().__init__(tokenizer, name)
        self._decimals = decimals

    def write(self, token_ids: Sequence[int]) -> int | None:
        line = self.line(token_ids)
        rest = continuation(line, self._decimals) if "=" in line else None
        return None if rest is None else self.first_token(rest)


def make_tool(spec: str, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> Calculator:
    """The tool of a spec (`collm.models.specs.TOOLS`), writing in the tokens of this tokenizer."""
    assert spec == "calculator", spec
    return Calculator(tokenizer, name=name or spec)
