"""A text in the making, as every model sees it.

A flow owns its text and alone writes it: tokens are appended, and drafts taken back. Models read it through a *view*
of their own. A cache keys what it holds by the view and asks it what of that is still valid, so no token ids are
copied or compared for a token.
"""

from __future__ import annotations

from collections.abc import Sequence


class View:
    """One model's token ids of a text: its own prompt, then the completion.

    Today all models share a tokenizer, so the completions of all views of a text are equal. Nothing but `Text` may
    assume so.
    """

    __slots__ = ("_shortest", "prompt_length", "token_ids")

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids = list(prompt)
        """`[T]`, the growing list itself: read it, never write or keep a copy of it."""
        self.prompt_length = len(self.token_ids)
        self._shortest: list[int] = []

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def rewinds(self) -> int:
        """How often tokens have been taken back so far."""
        return len(self._shortest)

    def valid_since(self, rewinds: int) -> int:
        """The shortest length since there had been so many rewinds, the present one included.

        Of what a cache held then, so many tokens at most are still those of this text.
        """
        return min(self._shortest[rewinds:], default=len(self.token_ids))

    def rewind(self, length: int) -> None:
        """Take back all tokens behind the first `length`."""
        assert self.prompt_length <= length <= len(self.token_ids), (self.prompt_length, length, len(self.token_ids))
        if length < len(self.token_ids):
            del self.token_ids[length:]
            self._shortest.append(length)


class Text:
    """The views of all models, base first, and the one completion that they share."""

    __slots__ = ("length", "views")

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.views = tuple(View(prompt) for prompt in prompts)
        self.length = 0
        """Tokens of the completion."""

    def append(self, token_id: int) -> None:
        for view in self.views:
            view.token_ids.append(token_id)
        self.length += 1

    def rewind(self, length: int) -> None:
        """Take back all tokens of the completion behind the first `length`."""
        for view in self.views:
            view.rewind(view.prompt_length + length)
        self.length = min(self.length, length)
