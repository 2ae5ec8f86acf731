"""A chat template: what it renders, and what it knows of messages, found by trying it.

Templates are programs. Whatever one raises is told as its refusal; what it would drop without a word is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from collm.data.messages import REASONING
from collm.data.shown import ABSENT, SENTINEL, Shown, TemplateError, call_of, named, said, text_of, with_arguments
from collm.data.tokens import Encoder
from collm.errors import CollmError
from collm.text import require_text
from collm.types import Message

OWN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now"})
"""Variables that template_kwargs may not set."""
_USER: Message = {"role": "user", "content": "a"}


class ChatTemplate:
    """One Jinja template with a tokenizer's special tokens.

    Args:
        today: what the template's `strftime_now` tells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str, today: date) -> None:
        self.source = source
        self.today = today
        self._tokenizer = tokenizer
        self._encode = Encoder(tokenizer)
        self._tokens = dict(tokenizer.special_tokens_map)

    @cached_property
    def _compiled(self) -> Any:
        try:
            return _compile_jinja_template(require_text(self.source, "the chat template"))
        except Exception as error:
            raise TemplateError(f"the chat template is no valid template: {said(error)}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not set itself."""
        environment = self._compiled.environment
        return frozenset(meta.find_undeclared_variables(environment.parse(self.source)))

    @property
    def tells_date(self) -> bool:
        return "strftime_now" in self.source

    def reads(self, name: str) -> bool:
        """Is it a variable of this template that may be set?"""
        written = name in self.variables or re.search(rf"\b{re.escape(name)}\b", self.source) is not None
        return written and name not in OWN and name not in self._tokens

    def require_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raises CollmError for variables that the template does not read, or that are not free to be set."""
        for name in kwargs:
            if name in OWN or name in self._tokens:
                raise TemplateError(f"template_kwargs cannot set {name!r}, which the template is given anyway")
            if not self.reads(name):
                raise TemplateError(f"the chat template does not read {name!r} (of template_kwargs): leave it out")

    def render(self, shown: Shown, upto: int | None = None, *, ask: bool) -> str:
        """The text of the first `upto` messages; `ask`: with the header of the assistant's next turn.

        Raises:
            TemplateError: whatever the template raises, in its words.
        """
        given = {
            **self._tokens,
            **shown.kwargs,
            "messages": list(shown.messages[:upto]),
            "tools": list(shown.tools) or None,
            "documents": None,
            "add_generation_prompt": ask,
            "strftime_now": self.today.strftime,
        }
        try:
            return require_text(str(self._compiled.render(**given)), "the chat template's text")
        except CollmError as error:
            raise TemplateError(str(error)) from error
        except Exception as error:
            raise TemplateError(f"the chat template refuses this conversation: {said(error)}") from error

    # -- what it knows

    @cached_property
    def _hides(self) -> frozenset[str]:
        """Roles that it says it leaves out on purpose, in a comment: `{# collm: hides user #}`."""
        said = re.findall(r"\{#-?\s*collm: hides ([\w, ]+?)\s*-?#\}", self.source)
        return frozenset(role.strip() for roles in said for role in roles.split(","))

    def shown(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
        system_prompt: str | None = None,
    ) -> Shown:
        """The conversation in the template's own form.

        Args:
            system_prompt: put before it, if it has none.

        Raises:
            TemplateError: it holds something that this template never shows.
        """
        self.require_kwargs(kwargs)
        if tools and not self._knows_tools:
            raise TemplateError("the chat template shows no tools: leave tools out, or give a template that knows them")
        added = int(system_prompt is not None and all(m["role"] not in ("system", "developer") for m in messages))
        own = [self._own_form({"role": "system", "content": system_prompt}, "")] * added
        calls: list[str | None] = []
        for number, message in enumerate(messages):
            which = named(message, number)
            if message["role"] == "tool":
                self._require_order(calls, message, which)
            else:
                calls = [call.get("id") for call in message.get("tool_calls", ())]
            if REASONING[0] in message and not self._knows(REASONING[0]):
                raise TemplateError(
                    f"{which} has {REASONING[0]}, which the chat template never shows: put it into the content as the "
                    "model writes it, or leave it out"
                )
            # A tool's name belongs to its call.
            if "name" in message and message["role"] != "tool" and not self._knows("name"):
                raise TemplateError(f"{which} has a name, which the chat template never shows: leave it out")
            own.append(self._own_form(message, which))
        return Shown(tuple(own), tuple(tools), kwargs, added)

    def _require_order(self, calls: list[str | None], message: Message, which: str) -> None:
        """Whose result is it? Where the template shows no ids, the order of the results must tell; takes off the first
        of the calls that have no result yet."""
        told, due = message.get("tool_call_id"), calls.pop(0) if calls else None
        if told is None or due is None or told == due or self._knows_ids:
            return
        raise TemplateError(
            f"{which} is the result of call {told!r}, where that of {due!r} is due, and the chat template shows no "
            "ids: put the results in the order of their calls"
        )

    @cached_property
    def _knows_ids(self) -> bool:
        """Does it show which call a tool's result belongs to?"""
        if self._call_form is None:
            return False
        turn, ids = call_of(*self._call_form), ("zqcall001", "zqcall002")
        [call] = turn["tool_calls"]
        named = [{**call, "id": id, "function": {**call["function"], "name": f"f{id}"}} for id in ids]
        one, other = (
            self._try(
                [_USER, {**turn, "tool_calls": named}]
                + [self.with_content({"role": "tool", "tool_call_id": id}, "b") for id in order]
            )
            for order in (ids, ids[::-1])
        )
        return one != other

    def _own_form(self, message: Message, which: str) -> Message:
        own = dict(message)
        if REASONING[0] in own:
            own["thinking"] = own[REASONING[0]]  # what gpt-oss's template calls it
        if "tool_calls" in own:
            if self._call_form is None:
                raise TemplateError(f"{which} calls tools, which the chat template never shows")
            as_text, blank = self._call_form
            own["tool_calls"] = [with_arguments(call, as_text, which) for call in own["tool_calls"]]
            if not own["content"]:
                own = {**own, "content": blank}
                if blank is ABSENT:
                    del own["content"]
        if isinstance(own.get("content"), str) and self._as_parts:
            own["content"] = [{"type": "text", "text": own["content"]}]
        return own

    def with_content(self, message: Message, content: str) -> Message:
        """The message, in the template's form, with another text."""
        return {**message, "content": [{"type": "text", "text": content}] if self._as_parts else content}

    @cached_property
    def _as_parts(self) -> bool:
        """Does it want content as a list of parts, showing nothing of a text?"""
        if SENTINEL in self._try(self._dialogue(SENTINEL)):
            return False
        if SENTINEL in self._try(self._dialogue([{"type": "text", "text": SENTINEL}])):
            return True
        text = self._try(self._dialogue(SENTINEL))
        if not text:
            return False  # It refuses this dialogue, and will say so of others.
        changed = SENTINEL in text.casefold()
        raise TemplateError(
            "the chat template changes the text of messages (it writes them in capitals, say): what is learnt would "
            "not be what the rows say; give another chat_template"
            if changed
            else "the chat template shows nothing of a message's text; give another chat_template"
        )

    @cached_property
    def ends(self) -> frozenset[str]:
        """Texts of the tokens that end an assistant's turn and its calling of tools."""
        try:
            answer = self._try([_USER, self.with_content({"role": "assistant"}, SENTINEL)])
        except TemplateError:
            return frozenset()  # told where the template is used
        call = "" if self._call_form is None else self._try([_USER, call_of(*self._call_form)])
        found = (self.end_in(answer.rpartition(SENTINEL)[2]), self.end_in(call.rpartition(SENTINEL)[2], last=True))
        return frozenset(end[1] for end in found if end is not None)

    def end_in(self, text: str, *, last: bool = False) -> tuple[int, str] | None:
        """Place and text of the first (or last) special or added token in `text`."""
        special = (str(self._tokenizer.convert_ids_to_tokens(i)) for i in self._encode(text) if i in self._special)
        found = [token for token in special if token in text]
        if not found:
            return None
        return (text.rindex(found[-1]), found[-1]) if last else (text.index(found[0]), found[0])

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset({*self._tokenizer.all_special_ids, *self._tokenizer.get_added_vocab().values()})

    @staticmethod
    def _dialogue(content: Any) -> list[Message]:
        return [_USER, {"role": "assistant", "content": content}]

    def _try(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """What it renders; nothing where it refuses."""
        try:
            return self.render(Shown(tuple(messages), tuple(tools)), ask=False)
        except TemplateError:
            return ""

    def _knows(self, key: str) -> bool:
        user, answer = _USER, self.with_content({"role": "assistant"}, "b")
        if key == "name":
            return SENTINEL in self._try([{**user, "name": SENTINEL}]) or SENTINEL in self._try(
                [user, {**answer, "name": SENTINEL}]
            )
        return SENTINEL in self._try([user, {**answer, key: SENTINEL, "thinking": SENTINEL}])

    @cached_property
    def _knows_tools(self) -> bool:
        tool = {
            "type": "function",
            "function": {
                "name": SENTINEL,
                "description": "b",
                "parameters": {"type": "object", "properties": {"c": {"type": "string", "description": "d"}}},
            },
        }
        return "tools" in self.variables and SENTINEL in self._try([_USER], [tool])

    @cached_property
    def _call_form(self) -> tuple[bool, Any] | None:
        """How it takes tool calls: are arguments a text (not an object), and what stands for no content? None: not."""
        for as_text in (False, True):
            for blank in (ABSENT, None, ""):
                text = self._try([_USER, call_of(as_text, blank)])
                # An object that is printed as Python prints it, or a text that is quoted once more, is the wrong form.
                if SENTINEL in text and '"zqkey"' in text:
                    return as_text, blank
        return None

    def require_all(self, shown: Shown) -> None:
        """Refuse a conversation of which the template would leave out a message.

        (Of what the assistant said before, templates leave out thoughts by design, so its messages are not looked at.)

        Raises:
            TemplateError: naming the first message of which nothing is shown, or what the template says against it.
        """
        try:
            number = self._hidden(shown)
        except TemplateError as error:
            raise TemplateError(f"{self._place(shown, str(error))}{error}") from error
        if number is not None:
            raise TemplateError(
                f"the chat template shows nothing of {shown.name(number)}: leave it out, or give a template that does"
            )

    def _place(self, shown: Shown, error: str) -> str:
        """Which message a refusal is about: the one with which it begins."""
        for number in range(1, len(shown.messages)):
            try:
                self.render(shown, number, ask=False)
            except TemplateError as earlier:
                if str(earlier) == error:
                    return f"{shown.name(number - 1)}: "
        return f"{shown.name(len(shown.messages) - 1)}: "

    def _hidden(self, shown: Shown) -> int | None:
        told = {
            i: f"zq{i}sentinelqz"
            for i, message in enumerate(shown.messages)
            if message["role"] not in ("assistant", *self._hides) and text_of(message).strip()
        }
        marked = [self.with_content(m, told[i]) if i in told else m for i, m in enumerate(shown.messages)]
        try:
            text = self.render(replace(shown, messages=tuple(marked)), ask=False)
        except TemplateError:
            # It reads what messages say; so look for what they say.
            text = self.render(shown, ask=False)
            told = {i: text_of(shown.messages[i]).strip() for i in told}
        return next((i for i, mark in told.items() if mark not in text), None)
