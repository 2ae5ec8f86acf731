"""What the harness asks, in our words: conversations that keep their messages, token ids for each model, settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from collm.data.formatting import Formatter
from collm.errors import CollmError, nearest
from collm.evaluation.likelihood import GivenText
from collm.sampling_params import SamplingParams
from collm.types import BASE, Message

TokenIds = tuple[int, ...]

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the token limit, the first that is given counts."""
SAMPLING = ("do_sample", "temperature", "top_p", "top_k")
START = -1
"""Stands for what comes before a whole text, for which each model has its own token."""
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1}
"""Settings that we do not have, at the values at which they do nothing."""


class ChatPrompt(str):
    """A prompt as the base's template renders it, with the messages it was made of: other models have other templates.

    `prefix` is the beginning of the answer, where the task gives one.
    """

    messages: tuple[Message, ...]
    prefix: str

    def __new__(cls, text: str, messages: Sequence[Message], prefix: str = "") -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.messages, prompt.prefix = tuple(messages), prefix
        return prompt

    def __getnewargs__(self) -> tuple[Any, ...]:
        return str(self), self.messages, self.prefix

    @classmethod
    def of(cls, formatter: Formatter, history: Sequence[Message], add_generation_prompt: bool) -> ChatPrompt:
        """The harness's chat history; without generation prompt, its last turn is the beginning of the answer."""
        messages = list(history)
        prefix = "" if add_generation_prompt else messages.pop()["content"]
        return cls(formatter.rendered(messages) + prefix, messages, prefix)


def prompt_ids(formatter: Formatter, context: str) -> TokenIds:
    """What a model sees before it writes; the BOS token (or for want of it EOS) stands for an empty context."""
    if not isinstance(context, ChatPrompt):
        return formatter.prompt(context)
    begun = formatter.continuation(context.messages, context.prefix) if context.prefix else ()
    return formatter.prompt(context.messages) + begun


@dataclass(frozen=True, slots=True)
class Cut:
    """Prompts cut from the left to the models' contexts, as the harness does it."""

    ids: tuple[TokenIds, ...]
    tokens: int


def cut_to(ids: Sequence[TokenIds], contexts: Sequence[int | None], rooms: Sequence[int]) -> Cut:
    """Keep of each prompt what leaves room for so many more tokens of that model, at least one token.

    Raises:
        CollmError: there is no room for a prompt.
    """
    kept = []
    for own, context, room in zip(ids, contexts, rooms, strict=True):
        if context is not None and context <= room:
            raise CollmError(
                f"{room} tokens behind the prompt leave no place for it in a context of {context} tokens: "
                "lower max_gen_toks (--max-tokens), or leave this task out"
            )
        kept.append(own if context is None else own[-(context - room) :])
    return Cut(tuple(kept), sum(map(len, ids)) - sum(map(len, kept)))


def pair_ids(formatters: Sequence[Formatter], context: str, continuation: str) -> tuple[tuple[TokenIds, ...], TokenIds]:
    """The context as each model sees it, and the continuation's tokens, which they share.

    Behind a plain context the harness's own rule holds: its trailing white space counts to the continuation, and the
    continuation is what stands behind as many tokens as the context has by itself. Behind a conversation, tokens are
    as training has them.

    Raises:
        CollmError: there is nothing to score.
    """
    base = formatters[BASE]
    if isinstance(context, ChatPrompt):
        tokens = base.continuation(context.messages, context.prefix + continuation)
        begun = base.continuation(context.messages, context.prefix) if context.prefix else ()
        shared = tokens[len(begun) :]
    else:
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole = base.continuation("", context + continuation)
        shared = whole[len(base.continuation("", context)) :]
    if not shared:
        raise CollmError(f"the continuation {continuation!r} has no tokens, so nothing to score")
    return tuple(prompt_ids(formatter, context) for formatter in formatters), shared


def windows(formatters: Sequence[Formatter], text: str, contexts: Sequence[int | None]) -> Iterator[GivenText]:
    """A whole text to be scored, in windows that fit into every model's context, each token predicted once.

    The first window stands behind each model's own BOS token (or for want of it EOS), the others behind what they can
    hold of the text before.
    """
    token_ids = list(formatters[BASE].continuation("", text))
    longest = min((length for length in contexts if length is not None), default=max(1, len(token_ids)))
    for window in get_rolling_token_windows(token_ids, START, longest, context_len=1):
        before, tokens = make_disjoint_window(window)
        prompts = [formatter.prompt("") if before == [START] else tuple(before) for formatter in formatters]
        yield GivenText(tuple(prompts), tuple(tokens))


def sampling_params(kwargs: Mapping[str, Any], base: SamplingParams) -> SamplingParams:
    """The harness's generation settings on top of `base`: who writes is ours, how tokens are drawn is the task's.

    `do_sample` without a temperature means temperature 1; without `do_sample`, a temperature above 0 samples.

    Raises:
        CollmError: a setting that we do not have.
    """
    known = {*LENGTHS, *SAMPLING, *NEUTRAL, "until"}
    for name, value in kwargs.items():
        if name not in known:
            hint = nearest(name, known, f"there are {', '.join(sorted(known))}")
            raise CollmError(f"the task sets {name}={value!r} for generation, which collm does not have; {hint}")
        if name in NEUTRAL and value not in (None, NEUTRAL[name]):
            raise CollmError(f"the task wants {name}={value!r}; collm has only {NEUTRAL[name]}")
    given = {name: value for name, value in kwargs.items() if value is not None}
    until = given.get("until", ())
    temperature = float(given.get("temperature", 1.0 if given.get("do_sample") else 0.0))
    lengths = [int(given[name]) for name in LENGTHS if name in given]
    try:
        return replace(
            base,
            max_tokens=lengths[0] if lengths else base.max_tokens,
            temperature=0.0 if given.get("do_sample") is False else temperature,
            top_p=float(given.get("top_p", 1.0)),
            top_k=int(given.get("top_k", 0)),
            stop=(until,) if isinstance(until, str) else tuple(map(str, until)),
        )
    except ValueError as error:
        raise CollmError(f"the task's generation settings {dict(kwargs)}: {error}") from None
