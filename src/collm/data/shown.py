"""A conversation in the form a chat template wants, and what is said against one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from collm.errors import CollmError
from collm.types import Message

SENTINEL = "zqsentinelqz"
"""A text that no template contains, to see what a template makes of a text."""
ABSENT = object()
"""Stands for a key that a message has not got."""


class TemplateError(CollmError):
    """What a template says against a conversation, or what it would drop from it."""


@dataclass(frozen=True)
class Shown:
    """A conversation in the form a template wants, ready to be rendered.

    `added`: how many messages at the beginning are not the conversation's own, but the system prompt's.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    added: int = 0

    def name(self, number: int) -> str:
        """How errors name a message, counted from 0 here and from 1 for people."""
        return named(self.messages[number], number - self.added)


def named(message: Message, number: int) -> str:
    return "the system prompt" if number < 0 else f"message {number + 1} ({message['role']})"


def call_of(as_text: bool, blank: Any) -> Message:
    """A turn that calls a function."""
    arguments: Any = {"zqkey": "b"}
    function = {"name": SENTINEL, "arguments": json.dumps(arguments) if as_text else arguments}
    turn: Message = {
        "role": "assistant",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }
    return turn if blank is ABSENT else {**turn, "content": blank}


def text_of(message: Message) -> str:
    """The text of a message in a template's form."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def with_arguments(call: Mapping[str, Any], as_text: bool, which: str) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise TemplateError(
                f"{which}: the arguments of {call['function']['name']} are no JSON, which this chat template needs"
            ) from error
    return {**call, "function": {**call["function"], "arguments": arguments}}


def said(error: Exception) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return text if type(error).__module__.startswith("jinja2") and text else f"{type(error).__name__}: {text}"


@contextmanager
def telling(where: str) -> Iterator[None]:
    """What a template has against a conversation is told with its place."""
    try:
        yield
    except TemplateError as error:
        raise CollmError(f"{where}: {error}") from None
