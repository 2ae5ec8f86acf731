"""A conversation cut up at its assistant turns: what a template puts before each, its text, and its end."""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass, replace

from collm.data.messages import REASONING, texts_in
from collm.data.shown import SENTINEL, Shown, TemplateError, telling, text_of
from collm.data.templates import ChatTemplate
from collm.data.tokens import TokenIds, Tokens
from collm.types import Message

_EMPTY = re.compile(r"\s*(?:<([^<>/]+)>\s*</\1>|\[([^\[\]/]+)\]\s*\[/\2\])\s*")
"""Thoughts that nobody had, as templates put them before an answer without thoughts."""
_OPENED = re.compile(r"\s*(?:<([^<>/]+)>|\[([^\[\]/]+)\])\s*")


@dataclass(frozen=True)
class Turns:
    """A conversation cut up: `contexts[i]` is what stands before `completions[i]`. `rewritten`: assistant turns that
    are part of the first context, because the template rewrites them."""

    contexts: tuple[TokenIds, ...]
    completions: tuple[TokenIds, ...]
    rewritten: int = 0


@dataclass(frozen=True)
class Turn:
    """`before` is what a model is shown to write the turn; `lead` what the template puts before the turn's own text,
    without the row saying so; `body` is learnt, with `end` behind it (None: the template puts no such token)."""

    before: str
    lead: str
    body: str
    end: str | None

    @property
    def text(self) -> str:
        return self.before + self.lead + self.body + (self.end or "")


def cut_up(template: ChatTemplate, shown: Shown, tokens: Tokens, where: str) -> tuple[Turns, str]:
    """The assistant's turns as tokens, and the text up to the end of the last one.

    Raises:
        CollmError: the template does not show what a turn says.
    """
    turns: list[Turn] = []
    for i, message in enumerate(shown.messages):
        if message["role"] == "assistant":
            with telling(f"{where}, up to {shown.name(i)}"):
                turns.append(turn_of(template, shown, i))
    rewritten = 0
    if any(not later.before.startswith(earlier.text) for earlier, later in itertools.pairwise(turns)):
        # Only before the last turn does it show what decoding will see there.
        rewritten = len(turns) - 1
    contexts: list[TokenIds] = []
    completions: list[TokenIds] = []
    done = ""
    for turn in turns[rewritten:]:
        context = turn.before[len(done) :]
        before = tokens.after_turn(context) if contexts else tokens.never_empty(tokens.encode(context))
        contexts.append(before + tokens.behind(context, turn.lead))
        completion = tokens.behind(context + turn.lead, turn.body)
        completions.append((*completion, tokens.token_id(turn.end or tokens.eos)))
        done = turn.text
    return Turns(tuple(contexts), tuple(completions), rewritten), done


def turn_of(template: ChatTemplate, shown: Shown, number: int) -> Turn:
    """Message `number` (from 0), the assistant's.

    Templates may rewrite their own text once more messages follow, and may put something before an answer that a row
    does not have. An empty block of thoughts (Qwen3) is not learnt, but stands before what is; where the generation
    prompt opens thoughts (DeepSeek-R1), an answer without thoughts closes them first.

    Raises:
        TemplateError: the template does not show what the message says.
    """
    which = shown.name(number)
    message = shown.messages[number]
    try:
        before = template.render(shown, number, ask=True)
    except TemplateError as error:
        if number == 0:
            raise TemplateError(f"{error} (the conversation opens with the assistant)") from error
        raise
    whole = template.render(shown, number + 1, ask=False)
    if "tool_calls" in message:
        return _calling(template, message, before, whole, which)
    content = text_of(message)
    marked = (*shown.messages[:number], template.with_content(message, SENTINEL))
    head, found, tail = template.render(replace(shown, messages=marked), ask=False).rpartition(SENTINEL)
    if not found:
        raise TemplateError(f"the chat template shows nothing of the text of {which}")
    lead, thoughts = "", message.get(REASONING[0])
    own = None
    if whole.startswith(before):
        start = len(before)
        empty = head[len(before) :] if head.startswith(before) and whole.startswith(head) else ""
        if thoughts is None and _EMPTY.fullmatch(empty):
            start, lead = len(head), empty
    elif before.startswith(head):
        start = len(head)
        opened = _OPENED.fullmatch(before[start:])
        if opened:
            tag = before[start:].strip()
            if content.lstrip().startswith(tag):
                # The template leaves thoughts out where it tells of the past. The model is to write them.
                own = content.lstrip()[len(tag) :].lstrip("\n")
            else:
                lead = f"</{opened[1]}>\n\n" if opened[1] else f"[/{opened[2]}]\n\n"
    elif whole.startswith(head):
        start = len(head)
    else:
        raise _changed(which)
    stop = len(whole) - len(tail)
    if not whole.endswith(tail) or stop < start:
        raise _changed(which)
    end = template.end_in(tail)
    said = whole[start:stop] if own is None else own
    wanted = content if own is None else own
    if not _squeezed(said).endswith(_squeezed(wanted)) or _squeezed(thoughts or "") not in _squeezed(said):
        raise _changed(which)
    return Turn(before, lead, said + (tail if end is None else tail[: end[0]]), None if end is None else end[1])


def _calling(template: ChatTemplate, message: Message, before: str, whole: str, which: str) -> Turn:
    """A turn that calls tools: all up to the last special token is what a model writes to call them."""
    shared = len(before) if whole.startswith(before) else len(os.path.commonprefix([before, whole]))
    opened = _OPENED.fullmatch(before[shared:])
    lead = "" if not opened else f"</{opened[1]}>\n\n" if opened[1] else f"[/{opened[2]}]\n\n"
    rest = whole[shared:]
    end = template.end_in(rest, last=True)
    body = rest if end is None else rest[: end[0]]
    if end is not None and any(end[1] in text for text in texts_in({**message, "role": ""})):
        raise TemplateError(f"{end[1]!r}, which ends the turn, stands within {which}: leave the row out")
    names = [call["function"]["name"] for call in message["tool_calls"]]
    texts = [text_of(message), message.get(REASONING[0], ""), *names]
    if not all(_squeezed(text) in _squeezed(body) for text in texts):
        raise _changed(which)
    return Turn(before, lead, body, None if end is None else end[1])


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _changed(which: str) -> TemplateError:
    return TemplateError(
        f"the chat template does not show {which} as it is written, so that something else would be learnt: give "
        "another chat_template, or leave the row out"
    )
