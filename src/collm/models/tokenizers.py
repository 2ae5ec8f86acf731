"""Do two models share a tokenizer? Padded vocabularies and other special tokens are no difference; all else is."""

from __future__ import annotations

import hashlib
import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from collm.errors import CollmError

PROBES = (
    "The quick brown fox jumps over the lazy dog, doesn't it?",
    " leading space,  two spaces\tand a tab\n\nnew paragraph\r\n",
    "12 + 30 = 42; 56 * 9 = 504; 1,234.56 - 0.007 = 3.14e-10 #### 1000000",
    "def f(x):\n    return x ** 2  # code\n",
    "Ünïcödé naïve Straße, ça va? Привет мир, 你好世界, こんにちは, مرحبا, 👋🏽",
    "camelCaseAndSNAKE_CASE https://example.org/a?b=c&d=%20",
)
"""Splitting of digits, spaces, letters of many scripts: what pre-tokenizers and normalisers differ in."""

PADDING = re.compile(r"\[PAD\d*\]|<pad>|<\|?(reserved|unused|extra|dummy)\w*\|?>|\[unused\d+\]", re.IGNORECASE)
"""Names under which converters fill a vocabulary up to a round size."""

MARK = re.compile(r"▁?<([A-Z_]+|\|\w+\|)>")
"""Tokens for markup of one's own: `▁<PRE>`, `<|tool|>`."""


class QuickDecoder:
    """A tokenizer's `decode` for the few tokens at the end of a text that grows: without what transformers does around
    it, and what has been decoded just before is remembered. From any thread.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        kind = type(tokenizer)
        plain = isinstance(tokenizer, PreTrainedTokenizerFast) and (
            (kind.decode, kind._decode) == (PreTrainedTokenizerFast.decode, PreTrainedTokenizerFast._decode)
        )
        backend: Any = tokenizer._tokenizer if plain else None
        # What is skipped; where nothing is, both ways to decode are one.
        added = tokenizer.added_tokens_decoder.items()
        self._special = frozenset(n for n, token in added if token.special) if plain else None

        @lru_cache(1 << 14)
        def decoded(token_ids: tuple[int, ...], skip: bool) -> str:
            if backend is not None:
                return str(backend.decode(token_ids, skip_special_tokens=skip))
            text = tokenizer.decode(list(token_ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            return text

        self._decoded = decoded

    def decode(
        self, token_ids: list[int], skip_special_tokens: bool = False, *, clean_up_tokenization_spaces: bool = False
    ) -> str:
        assert not clean_up_tokenization_spaces
        ids = tuple(token_ids)
        skip = skip_special_tokens and (self._special is None or not self._special.isdisjoint(ids))
        return self._decoded(ids, skip)


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The ordinary tokens: what text is made of, whatever was added to the tokenizer later."""
    special = set(tokenizer.get_added_vocab()) | set(tokenizer.all_special_tokens)
    return {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if token not in special and not PADDING.fullmatch(token)
    }


def require_words(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer that knows special tokens alone: transformers makes such a one where the file of the
    vocabulary is missing and its settings are there.

    Raises:
        CollmError: naming what it was loaded from.
    """
    if not _vocabulary(tokenizer):
        raise CollmError(
            f"{source}: its tokenizer has no vocabulary; the file of it (tokenizer.json, most often) is missing or "
            "empty: fetch it, or save the tokenizer there again"
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the ordinary vocabulary and of the token ids of some texts that tell tokenizers apart."""
    vocabulary = sorted(_vocabulary(tokenizer).items(), key=lambda item: (item[1], item[0]))
    behaviour = [_encode(tokenizer, probe) for probe in PROBES]
    return hashlib.sha256(json.dumps([vocabulary, behaviour]).encode()).hexdigest()[:16]


def shared_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Size of the law over next tokens: a model's logits beyond it are padding that no text ever holds."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def require_same_tokenizer(
    base: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("the base", "the assistant"),
) -> None:
    """Refuse a pair of models that would not mean the same text by the same token ids.

    Raises:
        CollmError: with the first difference, and what to do.
    """
    found = difference(base, other, names)
    if found is not None:
        raise CollmError(
            f"{names[1]} has another tokenizer than {names[0]} ({found}); here, models that write together must share "
            f"one: take an assistant of {names[0]}'s model family, or both models from one that share a tokenizer "
            "(other special tokens and a padded vocabulary are fine)"
        )


def difference(
    base: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("the base", "the assistant"),
) -> str | None:
    """What tells two tokenizers apart, first of all; None if they mean the same text by the same token ids, but for
    some marks behind the tokens they share."""
    ours, theirs = _vocabulary(base), _vocabulary(other)
    if ours != theirs:
        found = _other_token(ours, theirs, names)
        if found is not None:
            return found
    for probe in PROBES:
        if _encode(base, probe) != _encode(other, probe):
            return f"the same vocabulary, but {probe[:40]!r} is split in another way"
    return None


def _other_token(ours: dict[str, int], theirs: dict[str, int], names: tuple[str, str]) -> str | None:
    """The first token that stands for another number, or for none, in one of the vocabularies."""
    last = max((number for token, number in ours.items() if theirs.get(token) == number), default=-1)
    for token, number in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token) != number and (token in theirs or not _is_mark(token, number, last)):
            found = f"{theirs[token]} in {names[1]}'s" if token in theirs else f"not in {names[1]}'s vocabulary"
            return f"token {token!r} is {number} in {names[0]}'s vocabulary and {found}"
    for token, number in sorted(theirs.items(), key=lambda item: item[1]):
        if token not in ours and not _is_mark(token, number, last):
            return f"token {token!r} ({number}) is not in {names[0]}'s vocabulary"
    return None


def _is_mark(token: str, number: int, last: int) -> bool:
    """One that no ordinary text holds, behind all tokens that are shared. CodeLlama's infilling marks are such; whether
    they are declared special differs between copies of its tokenizer."""
    return number > last and MARK.fullmatch(token) is not None
