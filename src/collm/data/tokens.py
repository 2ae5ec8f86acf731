"""Texts to tokens, in pieces that may stand behind one another."""

from __future__ import annotations

from functools import cached_property

from transformers import PreTrainedTokenizerBase

from collm.errors import CollmError

TokenIds = tuple[int, ...]

REMEMBERED = 16
LINE_END = "\n"
"""What a text may stand behind without melting into it."""


class Encoder:
    """Texts to token ids, without the special tokens that a tokenizer would add.

    A row is cut up by looking at the same few texts again and again, so the last ones are remembered: a tokenizer's
    call costs a small model as much as a token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, TokenIds] = {"": ()}

    def __call__(self, text: str) -> TokenIds:
        ids = self._known.get(text)
        if ids is None:
            # verbose=False: no warning about lengths, which are the models' affair.
            ids = tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if len(self._known) > REMEMBERED:
                self._known = {"": ()}
            self._known[text] = ids
        return ids


class Tokens:
    """A tokenizer as prompts and completions need it.

    Args:
        add_bos: whether plain prompts begin with the BOS token; None: as the tokenizer does.

    Raises:
        CollmError: the tokenizer lacks a token that is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> None:
        if tokenizer.eos_token_id is None:
            raise CollmError("the tokenizer has no EOS token, so that no text could ever end; set tokenizer.eos_token")
        if add_bos and tokenizer.bos_token_id is None:
            raise CollmError("add_bos is set, but the tokenizer has no BOS token")
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        self.encode = Encoder(tokenizer)

    @property
    def eos(self) -> str:
        return str(self._tokenizer.eos_token)

    def token_id(self, token: str) -> int:
        number = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(number, int)
        return number

    def behind(self, before: str, text: str) -> TokenIds:
        """Tokens of `text` that may stand behind the tokens of `before`.

        Tokenised together where that leaves `before` as it is (SentencePiece would else put a space at the joint),
        and on its own where a token would straddle the joint, which a model writing after a prompt cannot do either.
        """
        if not text:
            return ()
        together = self._together(before, text)
        if together is None and self.opens_with_space:
            together = self._together(LINE_END, text)
        return self.encode(text) if together is None else together

    def _together(self, before: str, text: str) -> TokenIds | None:
        head, both = self.encode(before), self.encode(before + text)
        return both[len(head) :] if both[: len(head)] == head else None

    @cached_property
    def opens_with_space(self) -> bool:
        """Does a text on its own get a space that it has not got, as with Llama 2? ("Answer: " and "bar" would be
        learnt as "Answer:  bar".)"""
        own, spaced, bare = self.encode("a"), self._together(LINE_END, " a"), self._together(LINE_END, "a")
        return bool(bare) and spaced == own != bare

    def after_turn(self, text: str) -> TokenIds:
        return self.behind(self.eos, text)

    @cached_property
    def adds_bos(self) -> bool:
        if self._add_bos is not None:
            return self._add_bos
        bos = self._tokenizer.bos_token_id
        return bos is not None and list(self._tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]

    def plain_prompt(self, text: str) -> TokenIds:
        bos = (int(self._tokenizer.bos_token_id),) if self.adds_bos else ()
        return self.never_empty(bos + self.encode(text))

    def never_empty(self, token_ids: TokenIds) -> TokenIds:
        """A model predicts after at least one token: an empty prompt is BOS, or EOS for want of it."""
        if token_ids:
            return token_ids
        bos = self._tokenizer.bos_token_id
        return (int(bos if bos is not None else self._tokenizer.eos_token_id),)
