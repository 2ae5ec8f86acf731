"""What can be asked: a conversation, or a text to be continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collm.data.formatting import Formatter, require_read
from collm.data.messages import Conversation, read_messages
from collm.errors import CollmError
from collm.text import require_text
from collm.types import Message

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt that is tokenised already: for each model, base first, the ids after which it writes.

    For callers that put prompts together themselves, such as an answer whose beginning is given.
    """

    token_ids: tuple[TokenIds, ...]


Prompt = Sequence[Message] | str | TokenPrompt
"""A conversation, shown through each model's chat template, or a plain text to be continued.

Messages are those of the OpenAI API; a `collm.data.messages.Conversation` of them offers tools, too.
"""


def require_prompt(prompt: object, formatters: Sequence[Formatter] = ()) -> None:
    """Refuse what is neither, in words that say what is expected.

    Args:
        formatters: of all models; variables for templates that none of them reads are refused.

    Raises:
        CollmError: naming what was given.
    """
    if isinstance(prompt, str):
        if not require_text(prompt, "the prompt"):
            raise CollmError("the prompt is empty")
        return
    if isinstance(prompt, TokenPrompt):
        if not all(prompt.token_ids):
            raise CollmError("the prompt is empty: a model writes after at least one token")
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise CollmError(f"a prompt is a text or a list of messages, not {_named(prompt)}")
    if any(isinstance(message, str | Sequence) for message in prompt):
        raise CollmError("this is a list of prompts, not of messages: give it to generate_batch")
    if isinstance(prompt, Conversation):
        require_read(formatters, prompt.template_kwargs)
    else:
        read_messages(prompt, "the prompt")


def prompt_ids(
    prompt: Prompt,
    formatters: Sequence[Formatter],
    names: Sequence[str],
    context_lengths: Sequence[int | None],
    called: str = "the prompt",
) -> tuple[TokenIds, ...]:
    """The prompt as each model sees it, base first.

    Raises:
        CollmError: it is no prompt, not given for all models, or longer than the context of one.
    """
    require_prompt(prompt, formatters)
    if not isinstance(prompt, TokenPrompt):
        ids = tuple(formatter.prompt(prompt) for formatter in formatters)
    elif len(prompt.token_ids) == len(formatters):
        ids = prompt.token_ids
    else:
        raise CollmError(f"{called} is given for {len(prompt.token_ids)} of {len(formatters)} models")
    for name, own, context in zip(names, ids, context_lengths, strict=True):
        if context is not None and len(own) > context:
            raise CollmError(
                f"{called} has {len(own)} tokens, more than the context of {context} tokens of {name}; shorten it"
            )
    return ids


def _named(value: object) -> str:
    return repr(value) if value is None or value in ([], (), {}) else f"a value of type {type(value).__name__}"
