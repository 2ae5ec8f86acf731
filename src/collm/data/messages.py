"""Conversations as the OpenAI API has them, checked and in one form; what a template makes of them is its own affair.

Nothing is dropped: what cannot be kept is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from collm.errors import CollmError
from collm.text import require_text
from collm.types import Message

EXPECTED = (
    'expected {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]} '
    'or {"prompt": "...", "completion": "..."}'
)
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers and data sets keep what a model thought before it answered; the first is ours."""
IDENTIFIERS = ("tool_call_id",)
"""Keys that tie a tool's result to its call. Templates are given them, and may do without
where the order tells, too."""


class Conversation(list[Message]):
    """Messages that were read by `read_messages`, with the tools that are offered and what the template is told.

    `tools`: function schemas as in the OpenAI API. `template_kwargs`: further variables of the template for this
    conversation alone, on top of those of its `PromptFormat`.
    """

    def __init__(
        self,
        messages: Iterable[Message] = (),
        tools: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(messages)
        self.tools = tuple(tools)
        self.template_kwargs = dict(template_kwargs or {})


def read_conversation(
    messages: object,
    tools: object = None,
    template_kwargs: Mapping[str, Any] | None = None,
    where: str = "the conversation",
) -> Conversation:
    """Messages and tools of a request or a row, checked.

    Raises:
        CollmError: naming `where`, the message and what is wrong with it.
    """
    return Conversation(read_messages(messages, where), read_tools(tools, where), template_kwargs)


def read_messages(value: object, where: str) -> tuple[Message, ...]:
    """Messages in one form: `role`, `content` (a text; parts of text are joined by line breaks) and, where there are
    any, `reasoning_content`, `tool_calls`, `tool_call_id` and `name`.

    Raises:
        CollmError: naming `where`, the message and what is wrong with it.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise CollmError(f"{where}: messages is a non-empty list; {EXPECTED}")
    return tuple(_message(message, f"{where}: message {turn}") for turn, message in enumerate(value, start=1))


def _message(given: object, which: str) -> Message:
    if not isinstance(given, Mapping):
        raise CollmError(f"{which} has no text as its content, but is {_kind(given)}; {EXPECTED}")
    role = given.get("role")
    if role not in ROLES:
        raise CollmError(f"{which} has role {role!r}; a role is one of {', '.join(ROLES)}")
    # Arrow tables have every column in every row, and OpenAI's answers every key: what is null or empty says nothing.
    rest = {str(key): value for key, value in given.items() if key not in ("role", "content") and not _empty(value)}
    message: Message = {"role": role}
    calls = rest.pop("tool_calls", None)
    if calls is not None:
        if role != "assistant":
            raise CollmError(f"{which} has tool_calls, but the role {role!r}: only the assistant calls tools")
        message["tool_calls"] = _tool_calls(calls, which)
    content = given.get("content")
    if content is None and calls is not None:
        content = ""
    message = {"role": role, "content": _content(content, which), **message}
    thoughts = [rest.pop(key) for key in REASONING if key in rest]
    if thoughts:
        if role != "assistant":
            raise CollmError(f"{which} has {REASONING[0]}, but the role {role!r}: only the assistant thinks")
        if not all(isinstance(thought, str) and thought == thoughts[0] for thought in thoughts):
            raise CollmError(f"{which}: {REASONING[0]} is one text")
        message[REASONING[0]] = require_text(thoughts[0], f"{which}, {REASONING[0]}")
    for key in ("name", *IDENTIFIERS):
        if key in rest:
            if not isinstance(rest[key], str):
                raise CollmError(f"{which}: {key} is a text, not {_kind(rest[key])}")
            message[key] = require_text(rest.pop(key), f"{which}, {key}")
    if rest.pop("weight", 1) != 1:
        raise CollmError(f"{which} has a weight other than 1: every assistant turn is learnt; leave the row out")
    if rest:
        raise CollmError(
            f"{which} has {', '.join(map(repr, rest))}, which is not read: leave it out if it says nothing that a "
            "model should see"
        )
    return message


def _empty(value: object) -> bool:
    return value is None or value in ("", [], {}) or value is False


def _content(value: object, which: str) -> str:
    if isinstance(value, str):
        return require_text(value, which)
    if not isinstance(value, Sequence) or not value:
        raise CollmError(f"{which} has no text as its content, but {_kind(value)}; {EXPECTED}")
    texts = []
    for number, part in enumerate(value, start=1):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in (None, "text") or not isinstance(text, str):
            what = f"of type {kind!r}" if kind not in (None, "text") else "without a text"
            raise CollmError(f"{which}: part {number} of its content is {what}; only text can be read")
        texts.append(require_text(text, f"{which}, part {number}"))
    return "\n".join(texts)


def _tool_calls(value: object, which: str) -> list[dict[str, Any]]:
    """Calls as `{"id", "type", "function": {"name", "arguments"}}`; arguments stay a JSON text or an object."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise CollmError(f"{which}: tool_calls is a list, not {_kind(value)}")
    calls = []
    for number, call in enumerate(value, start=1):
        whose = f"{which}, tool call {number}"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise CollmError(
                f'{whose} names no function; expected {{"type": "function", "function": {{"name", "arguments"}}}}'
            )
        arguments = function.get("arguments")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, str | Mapping):
            raise CollmError(f"{whose}: arguments is a JSON object, or one as text, not {_kind(arguments)}")
        kind = call.get("type") or "function"
        if kind != "function":
            raise CollmError(f"{whose} is of type {kind!r}; only functions are called")
        own = {"type": kind, "function": {"name": function["name"], "arguments": _plain(arguments, whose)}}
        calls.append({"id": _plain(call["id"], whose), **own} if call.get("id") is not None else own)
        require_texts(calls[-1], whose)
    return calls


def read_tools(value: object, where: str) -> tuple[dict[str, Any], ...]:
    """Function schemas: a list, or a JSON text of one.

    Raises:
        CollmError: naming `where` and the tool.
    """
    given: Any = value
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise CollmError(f"{where}: tools is a list of function schemas, not the text {given[:40]!r}") from None
    if _empty(value):
        return ()
    if not isinstance(value, Sequence):
        raise CollmError(f"{where}: tools is a list of function schemas, not {_kind(value)}")
    tools = []
    for number, tool in enumerate(value, start=1):
        function: Any = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise CollmError(
                f'{where}: tool {number} names no function; expected {{"type": "function", "function": {{"name", '
                '"description", "parameters"}}'
            )
        whole: Any = {"type": "function", "function": function} if function is tool else tool
        tools.append(_plain(whole, f"{where}: tool {number}"))
        require_texts(tools[-1], f"{where}: tool {number}")
    return tuple(tools)


def _plain(value: Any, where: str) -> Any:
    """A copy in JSON's own types, which is all that a template may see."""
    try:
        return json.loads(json.dumps(value, default=dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise CollmError(f"{where} is not JSON ({error})") from None


def require_texts(value: Any, where: str) -> None:
    """`require_text` for every text in a JSON value."""
    for text in texts_in(value):
        require_text(text, where)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    # Not by recursion: what a parser could read may be nested deeper than Python's stack.
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, Sequence):
            todo += item


def _kind(value: object) -> str:
    return repr(value) if value is None or value in ([], (), {}) else f"a value of type {type(value).__name__}"
