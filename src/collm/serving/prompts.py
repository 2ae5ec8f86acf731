"""From a request's prompt to what each model sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collm.data.formatting import Formatter, require_read
from collm.data.messages import read_conversation
from collm.errors import CollmError
from collm.evaluation.likelihood import GivenText
from collm.llm import CollaborativeLM, TokenPrompt
from collm.serving.fields import ChatRequest, CompletionRequest, OthersRequest
from collm.serving.refusals import Refusal
from collm.text import require_text
from collm.types import BASE

TokenIds = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """One prompt: as each model sees it, and the text it was given as, if it was given as one.

    `alone`: the number of the only model that is to write, if there is one.
    """

    ids: tuple[TokenIds, ...]
    text: str | None = None
    alone: int | None = None

    @property
    def prompt(self) -> TokenPrompt:
        return TokenPrompt(self.ids)

    @property
    def num_tokens(self) -> int:
        return len(self.ids[BASE if self.alone is None else self.alone])


def chat_prompt(llm: CollaborativeLM, request: ChatRequest | OthersRequest, alone: int | None = None) -> Asked:
    """The conversation; a last message of the assistant is the beginning of its answer.

    Raises:
        Refusal: it cannot be read, or a model's template does not show it.
    """
    try:
        conversation = read_conversation(request.messages, None, request.chat_template_kwargs, where="the conversation")
        require_read(llm.formatters, conversation.template_kwargs)
        if conversation[-1]["role"] != "assistant":
            whole = _each(llm, lambda formatter: formatter.prompt(conversation))
            return _fitting(llm, Asked(whole, alone=alone), "messages")
        *_, last = conversation
        if set(last) - {"role", "content"}:
            raise CollmError("the last message begins the answer: it has content alone")
        if len(conversation) > 1 and conversation[-2]["role"] == "assistant":
            raise CollmError("two messages of the assistant stand at the end: only the last one can begin the answer")
        if len(conversation) == 1:
            raise CollmError("there is nothing to answer: put a message of the user before the assistant's")
        del conversation[-1]

        def begun(formatter: Formatter) -> TokenIds:
            return formatter.prompt(conversation) + formatter.continuation(conversation, last["content"])

        return _fitting(llm, Asked(_each(llm, begun), alone=alone), "messages")
    except CollmError as error:
        raise Refusal(str(error), param="messages", code="invalid_value") from error


def completion_prompts(llm: CollaborativeLM, request: CompletionRequest, alone: int | None = None) -> list[Asked]:
    """A text, token ids, or a list of both.

    Raises:
        Refusal: it is none of them, or too long.
    """
    given: Any = request.prompt
    if isinstance(given, str) or (given and all(_is_id(each) for each in given)):
        given = [given]
    if not given:
        raise Refusal("the prompt is an empty list: give a text, or at least one token id", param="prompt")
    return [_completion_prompt(llm, each, f"prompt {number}", alone) for number, each in enumerate(given, start=1)]


def finished_text(llm: CollaborativeLM, request: OthersRequest) -> GivenText:
    """What stands before the tokens of a request for each model, and these.

    Raises:
        Refusal: it is not one prompt, the tokens are none of the base's, or a context is too short for both.
    """
    if (request.messages is None) == (request.prompt is None):
        raise Refusal("give messages or a prompt, as in the request that the text was written for", param="messages")
    require_one_tokenizer(llm, "what each model would have written is told of models with one tokenizer", "token_ids")
    if request.messages is not None:
        asked = chat_prompt(llm, request)
    else:
        prompt: Any = request.prompt
        asked = _completion_prompt(llm, prompt, "the prompt")
    _require_known(llm, request.token_ids, "token_ids")
    written = tuple(request.token_ids)
    _fitting(llm, Asked(tuple(own + written for own in asked.ids)), "token_ids")
    return GivenText(tuple(_not_empty(llm, asked)), written)


def _not_empty(llm: CollaborativeLM, asked: Asked) -> list[TokenIds]:
    """A model needs something before the first token: its BOS, where the prompt is an empty text."""
    return [own or formatter.prompt("") for formatter, own in zip(llm.formatters, asked.ids, strict=True)]


def _completion_prompt(llm: CollaborativeLM, given: Any, which: str, alone: int | None = None) -> Asked:
    if isinstance(given, str):
        try:
            text = require_text(given, which)
            whole = _each(llm, lambda formatter: formatter.prompt(text))
            return _fitting(llm, Asked(whole, text, alone), "prompt")
        except CollmError as error:
            raise Refusal(str(error), param="prompt", code="invalid_value") from error
    if not isinstance(given, list) or not given or not all(_is_id(each) for each in given):
        raise Refusal(f"{which} is neither a text nor a list of token ids", param="prompt", code="invalid_value")
    require_one_tokenizer(llm, f"{which} is given as token ids, which mean one text to models with one tokenizer")
    _require_known(llm, given, "prompt", which)
    return _fitting(llm, Asked((tuple(given),) * len(llm.models), alone=alone), "prompt")


def require_one_tokenizer(llm: CollaborativeLM, what: str, param: str = "prompt") -> None:
    """Raises:
    Refusal: the models have different ones.
    """
    if llm.sharing is not None:
        raise Refusal(str(llm.sharing.refuse(what)), param=param, code="invalid_value")


def _require_known(llm: CollaborativeLM, ids: Sequence[int], param: str, which: str | None = None) -> None:
    size = len(llm.tokenizer)
    unknown = next((each for each in ids if not 0 <= each < size), None)
    if unknown is not None:
        message = f"{which or param}: there is no token {unknown}; ids lie between 0 and {size - 1}"
        raise Refusal(message, param=param, code="invalid_value")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _each(llm: CollaborativeLM, prompt: Any) -> tuple[TokenIds, ...]:
    """One for each formatter; models that share one share its prompt."""
    found: dict[int, TokenIds] = {}
    for formatter in llm.formatters:
        if id(formatter) not in found:
            found[id(formatter)] = prompt(formatter)
    return tuple(found[id(formatter)] for formatter in llm.formatters)


def _fitting(llm: CollaborativeLM, asked: Asked, param: str) -> Asked:
    for model, own, context in zip(llm.models, asked.ids, llm.contexts(asked.alone), strict=True):
        if context is not None and len(own) > context:
            raise Refusal(
                f"the prompt has {len(own)} tokens, more than the context of {context} tokens of {model.name}: "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
    return asked


def given_tokens(llm: CollaborativeLM, asked: Asked) -> tuple[tuple[TokenIds, ...], TokenIds]:
    """A plain prompt as a text to be scored: what stands before its second token for each model, and the rest.

    Models add BOS tokens of their own; where one has nothing before, its BOS (or for want of it EOS) stands there.
    """
    given = asked.ids[BASE][1:]
    before: list[TokenIds] = []
    for formatter, own in zip(llm.formatters, asked.ids, strict=True):
        shared = len(own) > len(given) and own[len(own) - len(given) :] == given
        before.append(own[: len(own) - len(given)] if shared else formatter.prompt(""))
    return tuple(before), given
