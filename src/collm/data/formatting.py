"""From rows to token ids, through each model's own template, with the completions' tokens shared by all models.

The rule that training and decoding both follow: a prompt is tokenised, then the completion's tokens stand behind it,
up to and with the end-of-turn token. So a model that writes after `Formatter.prompt` sees what it saw in training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from collm.data.examples import Example
from collm.errors import CollmError
from collm.types import Message

TokenIds = tuple[int, ...]

SENTINEL = "zqsentinelqz"
"""A text that no template contains, to see what a template puts behind an assistant's turn."""


@dataclass(frozen=True)
class PromptFormat:
    """How one model is shown its prompts.

    `system_prompt` is put before conversations that have none (plain prompts are left as they are).
    `chat_template` replaces the tokenizer's own. `add_bos`: whether plain prompts begin with the BOS token; None = as
    the tokenizer does. (In conversations the template says so.)
    """

    system_prompt: str | None = None
    chat_template: str | None = None
    add_bos: bool | None = None


@dataclass(frozen=True)
class Encoded:
    """One example as one model sees it. `labelled[t]`: token t is a gold token to predict; never token 0."""

    token_ids: TokenIds
    labelled: tuple[bool, ...]
    truncated_tokens: int = 0

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.labelled)
        assert not any(self.labelled[:1])

    @property
    def num_labelled(self) -> int:
        return sum(self.labelled)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class _Turns:
    """A conversation cut up: `contexts[i]` is what stands before `completions[i]`; `tail` what stands behind the last
    one, for a prompt that asks for one more turn."""

    contexts: tuple[TokenIds, ...]
    completions: tuple[TokenIds, ...]
    tail: TokenIds = ()


class Formatter:
    """Rows to token ids for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: PromptFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        if tokenizer.eos_token_id is None:
            raise CollmError("the tokenizer has no EOS token, so that no text could ever end; set tokenizer.eos_token")
        if self.format.add_bos and tokenizer.bos_token_id is None:
            raise CollmError("add_bos is set, but the tokenizer has no BOS token")

    def completions(self, example: Example) -> list[TokenIds]:
        """Token ids of each assistant turn with the token that ends it: what all models share.

        Raises:
            CollmError: the example has nothing to learn from, or the template cannot be split into turns.
        """
        return list(self._turns(example).completions)

    def encode(
        self, example: Example, max_length: int | None = None, completions: Sequence[TokenIds] | None = None
    ) -> Encoded:
        """The whole example, cut from the right to `max_length` tokens.

        Args:
            completions: the turns' tokens from the *base's* formatter, where this one belongs to another model.
        """
        if max_length is not None and max_length < 2:
            raise CollmError(f"max_length must be at least 2 (a token, and one to predict), not {max_length}")
        turns = self._turns(example)
        shared = turns.completions if completions is None else tuple(completions)
        assert len(shared) == len(turns.contexts), "completions of another example"
        token_ids: list[int] = []
        labelled: list[bool] = []
        for context, completion in zip(turns.contexts, shared, strict=True):
            token_ids += [*context, *completion]
            labelled += [False] * len(context) + [True] * len(completion)
        end = len(token_ids) if max_length is None else max_length
        return Encoded(tuple(token_ids[:end]), tuple(labelled[:end]), max(0, len(token_ids) - end))

    def prompt(self, question: Sequence[Message] | str) -> TokenIds:
        """Token ids after which a model writes: a conversation through the chat template, a string as plain text.

        Raises:
            CollmError: the conversation ends with an assistant turn or the template refuses it.
        """
        if isinstance(question, str):
            return self._plain_prompt(question)
        if question and question[-1]["role"] == "assistant":
            raise CollmError("the conversation ends with an assistant turn: there is nothing to answer; leave it out")
        turns = self._conversation(question, "the conversation", open_end=True)
        parts = zip(turns.contexts, turns.completions, strict=True)
        return self._never_empty(tuple(t for pair in parts for part in pair for t in part) + turns.tail)

    def continuation(self, question: Sequence[Message] | str, text: str) -> TokenIds:
        """Token ids of `text` as the beginning of an answer behind `prompt(question)`, as in training."""
        if isinstance(question, str):
            return self._continue(question, text)
        return self._continue(self.rendered(question), text)

    def rendered(self, messages: Sequence[Message]) -> str:
        """The text of the conversation through the template, up to where the next answer begins."""
        return self._render(self._with_system(messages), "the conversation", ask=True)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a text: EOS, and where there is a chat template the end of an assistant's turn."""
        ends = self._turn_ends if self._template is not None else (str(self.tokenizer.eos_token),)
        return frozenset(self._token_id(end) for end in ends)

    def fingerprint(self) -> str:
        """A hash of all that decides how prompts look, apart from the vocabulary."""
        tokenizer = self.tokenizer
        parts = [self.format.system_prompt, self._template, self._adds_bos, tokenizer.bos_token, tokenizer.eos_token]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def completions_fingerprint(self) -> str:
        """A hash of what decides the completions' tokens: unlike `fingerprint`, whatever the system prompt and BOS."""
        return hashlib.sha256(json.dumps([self._template, self.tokenizer.eos_token]).encode()).hexdigest()[:16]

    # -- conversations

    @cached_property
    def _template(self) -> str | None:
        if self.format.chat_template is not None:
            return self.format.chat_template
        if not self.tokenizer.chat_template:
            return None
        return str(self.tokenizer.get_chat_template())

    def _render(self, messages: Sequence[Message], where: str, *, ask: bool) -> str:
        """The template's text; `ask`: with the header of the assistant's next turn."""
        if self._template is None:
            raise CollmError(
                f"{where}: the tokenizer has no chat template, which messages need; pass one (chat_template in the "
                "model's format), or give rows of prompt and completion"
            )
        try:
            rendered: Any = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError as error:
            raise CollmError(f"{where}: the chat template refuses this conversation: {error}") from error
        return str(rendered)

    @cached_property
    def _turn_ends(self) -> tuple[str, ...]:
        """Texts of the tokens that end an assistant's turn: EOS, and what the template puts behind a turn.

        They differ where a chat model's EOS in the tokenizer is still the one of its pretraining.
        """
        eos = str(self.tokenizer.eos_token)
        dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
        suffix = self._render(dialogue, "the chat template", ask=False).rpartition(SENTINEL)[2]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.get_added_vocab().values())
        for token_id in self._encode(suffix):
            if token_id in special:
                return eos, str(self.tokenizer.convert_ids_to_tokens(token_id))
        return (eos,)

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.format.system_prompt is None or any(m["role"] == "system" for m in messages):
            return messages
        return [{"role": "system", "content": self.format.system_prompt}, *messages]

    def _conversation(self, messages: Sequence[Message], where: str, *, open_end: bool) -> _Turns:
        messages = self._with_system(messages)
        contexts: list[TokenIds] = []
        completions: list[TokenIds] = []
        done, anchor = "", ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], where, ask=True)
            whole = self._render(messages[: i + 1], where, ask=False)
            if not whole.startswith(before) or not before.startswith(done):
                raise CollmError(
                    f"{where}: the chat template does not extend the text before turn {i + 1}, but rewrites it: "
                    "no prompt would match its training text; give another chat_template or split the conversation"
                )
            context, turn = before[len(done) :], whole[len(before) :]
            ends = [(turn.find(end), end) for end in self._turn_ends if end in turn]
            cut, anchor = min(ends) if ends else (len(turn), str(self.tokenizer.eos_token))
            completion = self._continue(context, turn[:cut])
            contexts.append(self._after_turn(context) if contexts else self._never_empty(self._encode(context)))
            completions.append((*completion, self._token_id(anchor)))
            done = before + turn[:cut] + (anchor if ends else "")
        if not open_end:
            return _Turns(tuple(contexts), tuple(completions))
        whole = self._render(messages, where, ask=True)
        if not whole.startswith(done):
            raise CollmError(f"{where}: the chat template rewrites earlier turns; pass another chat_template")
        rest = whole[len(done) :]
        return _Turns(tuple(contexts), tuple(completions), self._after_turn(rest) if contexts else self._encode(rest))

    def _turns(self, example: Example) -> _Turns:
        if example.messages is not None:
            turns = self._conversation(example.messages, example.label, open_end=False)
            if not turns.completions:
                raise CollmError(f"{example.label}: there is no assistant turn, so nothing to learn from or to score")
            return turns
        if example.completion is None:
            raise CollmError(f"{example.label}: there is no completion, so nothing to learn from or to score")
        text = example.prompt or ""
        completion = (*self._continue(text, example.completion), self._token_id(str(self.tokenizer.eos_token)))
        return _Turns((self._plain_prompt(text),), (completion,))

    # -- tokens

    def _encode(self, text: str) -> TokenIds:
        # verbose=False: no warning about lengths, which are the models' affair.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else ()

    def _token_id(self, token: str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(number, int)
        return number

    def _continue(self, before: str, text: str) -> TokenIds:
        """Tokens of `text` that may stand behind the tokens of `before`.

        Tokenised together where that leaves `before` as it is (SentencePiece would else put a space at the joint),
        and on its own where a token would straddle the joint, which a model writing after a prompt cannot do either.
        """
        head, both = self._encode(before), self._encode(before + text)
        return both[len(head) :] if both[: len(head)] == head else self._encode(text)

    def _after_turn(self, text: str) -> TokenIds:
        return self._continue(str(self.tokenizer.eos_token), text)

    @cached_property
    def _adds_bos(self) -> bool:
        if self.format.add_bos is not None:
            return self.format.add_bos
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("a", verbose=False)["input_ids"])[:1] == [bos]

    def _plain_prompt(self, text: str) -> TokenIds:
        bos = (int(self.tokenizer.bos_token_id),) if self._adds_bos else ()
        return self._never_empty(bos + self._encode(text))

    def _never_empty(self, token_ids: TokenIds) -> TokenIds:
        """A model predicts after at least one token: an empty prompt is BOS, or EOS for want of it."""
        if token_ids:
            return token_ids
        bos = self.tokenizer.bos_token_id
        return (int(bos if bos is not None else self.tokenizer.eos_token_id),)
