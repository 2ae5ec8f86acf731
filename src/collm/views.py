"""A text in the making, as every model sees it.

A flow owns its text and alone writes it: tokens are appended, and drafts taken back. Models read it through a *view*
of their own. A cache keys what it holds by the view and asks it what of that is still valid, so no token ids are
copied or compared for a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class View:
    """One model's token ids of a text: its own prompt, then the completion.

    Where the models share a tokenizer, the completions of all views of a text are equal. Nothing but `Text` may assume
    so.
    """

    __slots__ = ("_shortest", "prompt_length", "rewinds", "shift", "token_ids")

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids = list(prompt)
        """`[T]`, the growing list itself: read it, never write or keep a copy of it."""
        self.prompt_length = len(self.token_ids)
        self.rewinds = 0
        """How often tokens have been taken back so far."""
        self.shift = 0
        """What is added to a token's place in the completion to find its random numbers: how many tokens were replaced
        by others for good, so that no number is drawn twice (`decoding.chunk_text`)."""
        # Number and length of each rewind that no later one went behind: both rise, so there are at most as many as
        # the text has tokens.
        self._shortest: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    def valid_since(self, rewinds: int) -> int:
        """The shortest length since there had been so many rewinds, the present one included.

        Of what a cache held then, so many tokens at most are still those of this text.
        """
        if rewinds == self.rewinds:
            return len(self.token_ids)
        return self._shortest[bisect_left(self._shortest, (rewinds, 0))][1]

    def rewind(self, length: int) -> None:
        """Take back all tokens behind the first `length`."""
        assert self.prompt_length <= length <= len(self.token_ids), (self.prompt_length, length, len(self.token_ids))
        if length < len(self.token_ids):
            del self.token_ids[length:]
            while self._shortest and self._shortest[-1][1] >= length:
                self._shortest.pop()
            self._shortest.append((self.rewinds, length))
            self.rewinds += 1


class Text:
    """The views of all models, base first, and the one completion that they share.

    Args:
        alone: number of the only model that reads it.
    """

    __slots__ = ("alone", "length", "views")

    def __init__(self, prompts: Sequence[Sequence[int]], alone: int | None = None) -> None:
        self.views = tuple(View(prompt) for prompt in prompts)
        self.alone = alone
        self.length = 0
        """Tokens of the completion."""

    def longest(self, max_tokens: int) -> tuple[int, ...]:
        """Tokens that each model may have to hold of it, if so many more are written: the last one is never read."""
        return tuple(len(view) + max_tokens - 1 if self.alone in (None, n) else 0 for n, view in enumerate(self.views))

    def append(self, token_id: int) -> None:
        for view in self.views:
            view.token_ids.append(token_id)
        self.length += 1

    def rewind(self, length: int) -> None:
        """Take back all tokens of the completion behind the first `length`."""
        for view in self.views:
            view.rewind(view.prompt_length + length)
        self.length = min(self.length, length)
