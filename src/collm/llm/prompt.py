"""What can be asked: a conversation, or a text to be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collm.errors import CollmError
from collm.types import Message


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokenised already: for each model, base first, the ids after which it writes.

    For callers that put prompts together themselves, such as an answer whose beginning is given.
    """

    token_ids: tuple[tuple[int, ...], ...]


Prompt = Sequence[Message] | str | TokenPrompt
"""A conversation, shown through each model's chat template, or a plain text to be continued."""
ROLES = ("system", "user", "assistant", "tool")


def require_prompt(prompt: object) -> None:
    """Refuse what is neither, in words that say what is expected.

    Raises:
        CollmError: naming what was given.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise CollmError("the prompt is empty")
        return
    if isinstance(prompt, TokenPrompt):
        if not all(prompt.token_ids):
            raise CollmError("the prompt is empty: a model writes after at least one token")
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise CollmError(f"a prompt is a text or a list of messages, not {_named(prompt)}")
    for number, message in enumerate(prompt, start=1):
        if isinstance(message, str | Sequence):
            raise CollmError("this is a list of prompts, not of messages: give it to generate_batch")
        if not isinstance(message, dict):
            raise CollmError(f'message {number} is {_named(message)}, not {{"role": "user", "content": "..."}}')
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise CollmError(f"message {number} has the role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise CollmError(f"message {number} has {_named(content)} as content; only text can be read")


def _named(value: object) -> str:
    return repr(value) if value is None or value in ([], (), {}) else f"a value of type {type(value).__name__}"
