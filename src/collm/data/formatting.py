"""From rows to token ids, through each model's own template, with the completions' tokens shared by all models.

The rule that training and decoding both follow: a prompt is tokenised, then the completion's tokens stand behind it,
up to and with the end-of-turn token. So a model that writes after `Formatter.prompt` sees what it saw in training.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.data.examples import Example
from collm.data.messages import Conversation, read_conversation, require_texts
from collm.data.shown import Shown, telling, text_of
from collm.data.templates import ChatTemplate
from collm.data.tokens import TokenIds, Tokens
from collm.data.turns import Turns, cut_up, turn_of
from collm.errors import CollmError
from collm.text import require_text
from collm.types import Message

logger = logging.getLogger(__name__)

_TURNS: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
)
_SPOKEN = (_TURNS, tuple({**m, "reasoning_content": "e"} if m["role"] == "assistant" else m for m in _TURNS))
"""Conversations of which variables of a template may show more or less."""


@dataclass(frozen=True)
class PromptFormat:
    """How one model is shown its prompts.

    `system_prompt` is put before conversations that have none (plain prompts are left as they are).
    `chat_template` replaces the tokenizer's own. `add_bos`: whether plain prompts begin with the BOS token; None = as
    the tokenizer does. (In conversations the template says so.)
    `template_kwargs`: variables of the chat template, such as `{"enable_thinking": False}`.
    `date`: the day that templates tell which ask for it, as 2026-07-26; None = the day on which the formatter is made,
    which it then keeps. (A template that reads `date_string` takes that from `template_kwargs`.)
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    add_bos: bool | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The keyword arguments that are set, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None and value != {}}


@dataclass(frozen=True)
class Encoded:
    """One example as one model sees it. `labelled[t]`: token t is a gold token to predict; never token 0.

    `rewritten`: earlier assistant turns that are not labelled, because the template rewrites them later on.
    """

    token_ids: TokenIds
    labelled: tuple[bool, ...]
    truncated_tokens: int = 0
    rewritten: int = 0

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.labelled)
        assert not any(self.labelled[:1])

    @property
    def num_labelled(self) -> int:
        return sum(self.labelled)

    @property
    def starts(self) -> tuple[bool, ...]:
        """Tokens at which somebody is chosen to write: all that are labelled, unless models share but chunks."""
        return self.labelled

    @property
    def num_starts(self) -> int:
        return sum(self.starts)

    def __len__(self) -> int:
        return len(self.token_ids)


class Formatter:
    """Rows to token ids for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: PromptFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        self._tokens = Tokens(tokenizer, self.format.add_bos)
        require_text(self.format.system_prompt or "", "the system prompt")
        require_texts(self.format.template_kwargs, "template_kwargs")
        self._today = _day(self.format.date)
        if self._templates:
            self._templates[0].require_kwargs(self.format.template_kwargs)
            if any(template.tells_date for template in self._templates):
                # Kept wherever the format is kept, so that another day's run renders the same.
                self.format = replace(self.format, date=self._today.isoformat())
        elif self.format.template_kwargs:
            raise CollmError("template_kwargs are set, but the tokenizer has no chat template; pass one")

    def completions(self, example: Example) -> list[TokenIds]:
        """Token ids of each assistant turn with the token that ends it: what all models share.

        Raises:
            CollmError: the example has nothing to learn from, or the template cannot be split into turns.
        """
        completions = self._turns(example).completions
        return list(completions[-1:] if example.last_turn else completions)

    def encode(
        self, example: Example, max_length: int | None = None, completions: Sequence[TokenIds] | None = None
    ) -> Encoded:
        """The whole example, cut from the right to `max_length` tokens.

        Args:
            completions: the turns' tokens from the *base's* formatter, where this one belongs to another model; of
                fewer turns than this template can show, they are the last ones.

        Raises:
            CollmError: there is nothing to learn from, or the template does not show what is to be learnt.
        """
        if max_length is not None and max_length < 2:
            raise CollmError(f"max_length must be at least 2 (a token, and one to predict), not {max_length}")
        turns = self._turns(example)
        shared = turns.completions[-1:] if example.last_turn else turns.completions
        shared = shared if completions is None else tuple(completions)
        unlearnt = len(turns.contexts) - len(shared)
        if unlearnt < 0:
            raise CollmError(
                f"{example.label}: the chat template of one model rewrites earlier turns, that of the base does not: "
                "only last turns can be learnt together: set last_turn: true in the recipe's data (--last-turn)"
            )
        token_ids: list[int] = []
        labelled: list[bool] = []
        for i, context in enumerate(turns.contexts):
            completion = turns.completions[i] if i < unlearnt else shared[i - unlearnt]
            token_ids += [*context, *completion]
            labelled += [False] * len(context) + [i >= unlearnt] * len(completion)
        end = len(token_ids) if max_length is None else max_length
        rewritten = 0 if example.last_turn else turns.rewritten
        return Encoded(tuple(token_ids[:end]), tuple(labelled[:end]), max(0, len(token_ids) - end), rewritten)

    def prompt(self, question: Sequence[Message] | str) -> TokenIds:
        """Token ids after which a model writes: a conversation through the chat template, a string as plain text.

        Args:
            question: a text, messages as in the OpenAI API, or a `Conversation`, which may offer tools.

        Raises:
            CollmError: the conversation ends with an assistant turn, holds what the template does not show, or the
                template refuses it.
        """
        if isinstance(question, str):
            return self._tokens.plain_prompt(require_text(question, "the prompt"))
        where = "the conversation"
        conversation = _read(question)
        if not conversation:
            raise CollmError("the conversation has no messages before the assistant's turn, so that nothing is asked")
        if conversation[-1]["role"] == "assistant":
            raise CollmError("the conversation ends with an assistant turn: there is nothing to answer; leave it out")
        whole = self.rendered(conversation)
        template, shown = self._shown(conversation, where)
        try:
            first = next((i for i, message in enumerate(shown.messages) if message["role"] == "assistant"), None)
            if first is None or not whole.startswith(turn_of(template, shown, first).text):
                return self._tokens.never_empty(self._tokens.encode(whole))  # the common cases, seen at once
            turns, done = cut_up(template, shown, self._tokens, where)
        except CollmError:
            # Something that was said before could not be learnt as it is; it can be gone on from.
            return self._tokens.never_empty(self._tokens.encode(whole))
        if turns.rewritten or not turns.completions or not whole.startswith(done):
            return self._tokens.never_empty(self._tokens.encode(whole))
        before = [t for pair in zip(turns.contexts, turns.completions, strict=True) for part in pair for t in part]
        return (*before, *self._tokens.after_turn(whole[len(done) :]))

    def continuation(self, question: Sequence[Message] | str, text: str) -> TokenIds:
        """Token ids of `text` as the beginning of an answer behind `prompt(question)`, as in training."""
        if isinstance(question, str):
            return self._tokens.behind(question, text)
        return self._tokens.behind(self.rendered(question), text)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of the conversation through the template, up to where the next answer begins.

        Raises:
            CollmError: the template refuses it, or shows nothing of a message.
        """
        template, shown = self._shown(_read(messages), "the conversation")
        with telling("the conversation"):
            template.require_all(shown)
            self._warn_of_ends(shown, "the conversation")
            return template.render(shown, ask=True)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a text: EOS, and where there is a chat template what ends an assistant's turn or
        its calling of tools there. They differ where a chat model's EOS in the tokenizer is its pretraining's."""
        return frozenset(map(self._tokens.token_id, self._ends))

    @cached_property
    def _ends(self) -> frozenset[str]:
        return frozenset({self._tokens.eos}).union(*(template.ends for template in self._templates))

    def reads(self, name: str) -> bool:
        """Does the chat template read this variable?"""
        return any(template.reads(name) for template in self._templates)

    @property
    def day(self) -> str | None:
        """The day that its prompts tell, as 2026-07-26; None where the template tells none."""
        return self.format.date if any(template.tells_date for template in self._templates) else None

    def told(self, kwargs: Mapping[str, Any], day: str | None = None) -> Formatter:
        """This formatter with those of the template's variables set that the template reads, and on another day."""
        own = {name: value for name, value in kwargs.items() if self.reads(name)}
        format = replace(self.format, template_kwargs={**self.format.template_kwargs, **own})
        return type(self)(self.tokenizer, format if day is None or self.day is None else replace(format, date=day))

    def fingerprint(self) -> str:
        """A hash of all that decides how prompts look, apart from the vocabulary."""
        tokenizer, format = self.tokenizer, self.format
        parts: list[Any] = [format.system_prompt, self._source, self._tokens.adds_bos]
        parts += [tokenizer.bos_token, tokenizer.eos_token]
        # What is not set leaves the hash as it was before it could be set.
        parts += [{k: v} for k in ("template_kwargs", "date") if (v := format.to_dict().get(k)) is not None]
        parts += ["no space at joints"] if self._tokens.opens_with_space else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def completions_fingerprint(self) -> str:
        """A hash of what decides the completions' tokens: unlike `fingerprint`, whatever the system prompt and BOS. Of
        `template_kwargs` only those count that change what is learnt (that keep the thoughts of earlier turns, say)."""
        parts: list[Any] = [self._source, self.tokenizer.eos_token]
        if self.format.template_kwargs and not self._speaks_as(replace(self.format, template_kwargs={})):
            parts.append({"template_kwargs": self.format.template_kwargs})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _speaks_as(self, format: PromptFormat) -> bool:
        """Are completions the same in another format? What one of both refuses is not learnt, and so says nothing."""
        both = (self, type(self)(self.tokenizer, format))
        for messages in _SPOKEN:
            try:
                told = [formatter.completions(Example("", messages=messages)) for formatter in both]
            except CollmError:
                continue
            if told[0] != told[1]:
                return False
        return True

    # -- conversations

    @cached_property
    def _templates(self) -> tuple[ChatTemplate, ...]:
        """The chat template, and where tools have another one, that; none: there is no template."""
        given: Any = self.format.chat_template or self.tokenizer.chat_template
        if not given:
            return ()
        sources = [given]
        if isinstance(given, dict):
            sources = [self.tokenizer.get_chat_template(), *([given["tool_use"]] if "tool_use" in given else [])]
        return tuple(ChatTemplate(self.tokenizer, source, self._today) for source in sources)

    @property
    def _source(self) -> str | None:
        return self._templates[0].source if self._templates else None

    def _shown(self, conversation: Conversation, where: str) -> tuple[ChatTemplate, Shown]:
        """The template for this conversation, and the conversation in its form.

        Raises:
            CollmError: there is none, or it would not show all of it.
        """
        if not self._templates:
            raise CollmError(
                f"{where}: the tokenizer has no chat template, which messages need; pass one (chat_template in the "
                "model's format), or give rows of prompt and completion"
            )
        template = self._templates[-1 if conversation.tools else 0]
        # What is given with a conversation is for all models, and each template takes what it reads (`require_read`).
        own = {name: value for name, value in conversation.template_kwargs.items() if template.reads(name)}
        kwargs = {**self.format.template_kwargs, **own}
        with telling(where):
            return template, template.shown(conversation, conversation.tools, kwargs, self.format.system_prompt)

    def _warn_of_ends(self, shown: Shown, where: str) -> None:
        """Say where somebody's words would be read as the end of a turn. (In what is learnt they are refused.)"""
        for number, message in enumerate(shown.messages):
            if message["role"] != "assistant" and (end := next((e for e in self._ends if e in text_of(message)), None)):
                logger.warning("%s: %s holds %r, which models read as an end", where, shown.name(number), end)

    def _turns(self, example: Example) -> Turns:
        label = example.label
        if example.messages is not None:
            template, shown = self._shown(Conversation(example.messages, example.tools), label)
            with telling(label):
                template.require_all(shown)
            self._warn_of_ends(shown, label)
            turns, _ = cut_up(template, shown, self._tokens, label)
            if not turns.completions:
                raise CollmError(f"{label}: there is no assistant turn, so nothing to learn from or to score")
        elif example.completion is None:
            raise CollmError(f"{label}: there is no completion, so nothing to learn from or to score")
        else:
            text = example.prompt or ""
            completion = (*self._tokens.behind(text, example.completion), self._tokens.token_id(self._tokens.eos))
            turns = Turns((self._tokens.plain_prompt(text),), (completion,))
        learnt = turns.completions[-1:] if example.last_turn else turns.completions
        inside = next((t for completion in learnt for t in completion[:-1] if t in self.end_ids), None)
        if inside is not None:
            raise CollmError(
                f"{label}: {self.tokenizer.convert_ids_to_tokens(inside)!r} stands within what is to be learnt, and "
                "ends a text: a model could never write what follows; leave it out (the end of a turn is added), or "
                "leave out the row"
            )
        return turns


def require_read(formatters: Sequence[Formatter], template_kwargs: Mapping[str, Any]) -> None:
    """Refuse variables that no model's template reads.

    Raises:
        CollmError: naming the first.
    """
    for name in template_kwargs:
        if not any(formatter.reads(name) for formatter in formatters):
            raise CollmError(f"no chat template reads {name!r} (of template_kwargs): leave it out")


def _day(written: str | None) -> date:
    try:
        return date.today() if written is None else date.fromisoformat(written)
    except (TypeError, ValueError):
        raise CollmError(f"date is a day as 2026-07-26, not {written!r}") from None


def _read(question: Sequence[Message]) -> Conversation:
    if isinstance(question, Conversation):
        return question
    return read_conversation(question)
