"""What a request gets back, in the forms of the OpenAI API: whole, or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property

from collm.evaluation.likelihood import Given
from collm.llm import Chunk
from collm.serving.asking import Served
from collm.serving.desk import Desk, Order
from collm.serving.fields import ChatRequest, CompletionRequest, Json, Request, StreamOptions
from collm.serving.prompts import Asked
from collm.serving.tokens import (
    LogProbs,
    Telling,
    Token,
    TokenTexts,
    author_counts,
    chat_log_probs,
    completion_log_probs,
    told_tokens,
    top_dict,
)
from collm.types import BASE, Generation


@dataclass(slots=True)
class Choice:
    """One text of an answer, as far as it has come."""

    index: int
    asked: Asked
    telling: Telling
    given: list[Given] = field(default_factory=list)
    """The prompt's own tokens, where they are told, too."""
    echoed: str | None = None
    """The prompt's text, once it is known."""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    generation: Generation | None = None

    def take(self, chunk: Chunk) -> list[Token]:
        """Note a chunk; the tokens that it releases."""
        tokens = self.telling.take(chunk)
        self.text += chunk.text
        self.tokens += tokens
        self.generation = chunk.generation
        return tokens

    @property
    def finish_reason(self) -> str:
        # Without a generation nothing was to be written. A tool that has nothing to say has ended its text.
        if self.generation is None:
            return "length"
        return "length" if self.generation.finish_reason == "length" else "stop"

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) if self.generation is None else self.generation.completion_tokens


class Answer(ABC):
    """The answer to one request. `choices`: in the order of the prompts, then of `n`."""

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, served: Served, texts: TokenTexts, request: Request, asked: Sequence[Asked]) -> None:
        self.served, self.texts, self.request, self.asked = served, texts, request, asked
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        hidden = texts.hidden.union(request.stop_token_ids or ())
        self.choices = [
            Choice(i * (request.n or 1) + j, each, Telling(hidden))
            for i, each in enumerate(asked)
            for j in range(request.n or 1)
        ]

    # What the two forms do differently.

    @abstractmethod
    def opening(self, choice: Choice) -> Json | None:
        """What a stream says of a choice before its first token."""

    @abstractmethod
    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> Json:
        """What a stream says of a choice when there is more of it."""

    @abstractmethod
    def closing(self) -> Json:
        """An empty piece."""

    @abstractmethod
    def whole(self, choice: Choice) -> Json:
        """A whole choice."""

    @property
    @abstractmethod
    def tells_tokens(self) -> bool:
        """Whether log-probabilities are asked for."""

    # What they have in common.

    async def gathered(self, desk: Desk, orders: Sequence[Order]) -> Json:
        """The whole answer, once it is complete."""
        async with aclosing(desk.write(orders)) as chunks:  # type: ignore[type-var]
            async for index, chunk in chunks:
                self.choices[index].take(chunk)
        choices = [
            {"index": each.index, **self.whole(each), "finish_reason": each.finish_reason, **self._collm(each)}
            for each in self.choices
        ]
        return {**self._head(self.kind), "choices": choices, "usage": self.usage}

    async def streamed(self, desk: Desk, orders: Sequence[Order]) -> AsyncIterator[Json]:
        """The answer in chunks. The first comes with the first token: what fails before is an error of its own."""
        opened: set[int] = set()
        async with aclosing(desk.write(orders)) as chunks:  # type: ignore[type-var]
            async for index, chunk in chunks:
                choice = self.choices[index]
                for said in self._opening(choice, opened):
                    yield said
                tokens = choice.take(chunk)
                if chunk.text or (tokens and (self.tells_tokens or self._tells_authors)):
                    yield self._chunk(choice, self.piece(choice, chunk.text, tokens), None, self._told(tokens))
                if choice.generation is not None:
                    yield self._chunk(choice, self.closing(), choice.finish_reason, self._collm(choice, whole=False))
        for choice in self.choices:
            if choice.generation is None:
                for said in self._opening(choice, opened):
                    yield said
                yield self._chunk(choice, self.closing(), choice.finish_reason, {})
        if self._options.include_usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self.usage}

    def _opening(self, choice: Choice, opened: set[int]) -> list[Json]:
        said = None if choice.index in opened else self.opening(choice)
        opened.add(choice.index)
        return [] if said is None else [self._chunk(choice, said, None, {})]

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model or self.served.name}

    def _chunk(self, choice: Choice, said: Json, finish_reason: str | None, collm: Json) -> Json:
        one = {"index": choice.index, **said, "finish_reason": finish_reason, **collm}
        found = {**self._head(self.chunk_kind), "choices": [one]}
        if self._options.continuous_usage_stats:
            found["usage"] = self.usage
        elif self._options.include_usage:
            found["usage"] = None
        return found

    @cached_property
    def _options(self) -> StreamOptions:
        return self.request.stream_options or StreamOptions()

    @property
    def _tells_authors(self) -> bool:
        return self.request.collm is not None and self.request.collm.tokens

    def _told(self, tokens: Sequence[Token]) -> Json:
        if not self._tells_authors:
            return {}
        return {"collm": {"tokens": told_tokens(tokens, self.served.llm.model_names, self.texts)}}

    def _collm(self, choice: Choice, *, whole: bool = True) -> Json:
        """What a finished choice says of its authors; of its tokens, too, unless a stream has said it."""
        generation = choice.generation
        if self.request.collm is None or generation is None:
            return {}
        names, usage = generation.model_names, generation.usage
        found = {
            "tokens_by_author": author_counts(generation.steps, names),
            "forward_passes": dict(zip(names, usage.forward_passes, strict=True)),
            "deferral_rate": generation.deferral_rate,
            "drafted": usage.drafted,
            "accepted": usage.accepted,
            "seconds": usage.seconds,
            "first_token_seconds": usage.first_token_seconds,
        }
        if generation.finish_reason == "abstained":
            found["abstained"] = True
        tokens = self._told(choice.tokens).get("collm", {}) if whole else {}
        return {"collm": {**tokens, **found}}

    @property
    def usage(self) -> Json:
        prompt = sum(each.num_tokens for each in self.asked)
        completion = sum(each.num_tokens for each in self.choices)
        found: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        if all(each.generation is not None for each in self.choices):
            found["prompt_tokens_details"] = {"cached_tokens": sum(map(self._cached_tokens, range(len(self.asked))))}
        if self.request.collm is not None:
            total: Counter[str] = Counter()
            for each in self.choices:
                if each.generation is not None:
                    total.update(author_counts(each.generation.steps, self.served.llm.model_names))
            found["completion_tokens_by_author"] = {name: total[name] for name in self.served.llm.model_names}
        return found

    def _cached_tokens(self, number: int) -> int:
        """Of a prompt, those that its model's caches had already, whichever of its texts came first."""
        n = self.request.n or 1
        found = []
        for each in self.choices[number * n : (number + 1) * n]:
            assert each.generation is not None
            usage = each.generation.usage
            # A model that writes alone is the only one that was asked.
            asked = next((z for z, passes in enumerate(usage.forward_passes) if passes), BASE)
            found.append(usage.cached_tokens[asked] if usage.cached_tokens else 0)
        return min(found)


class ChatAnswer(Answer):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"
    request: ChatRequest

    @property
    def tells_tokens(self) -> bool:
        return bool(self.request.logprobs)

    def _log_probs(self, tokens: Sequence[Token]) -> Json | None:
        return chat_log_probs(tokens, self.texts, self.request.top_logprobs or 0) if self.tells_tokens else None

    def opening(self, choice: Choice) -> Json:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> Json:
        return {"delta": {"content": text}, "logprobs": self._log_probs(tokens)}

    def closing(self) -> Json:
        return {"delta": {}, "logprobs": None}

    def whole(self, choice: Choice) -> Json:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._log_probs(choice.tokens)}


class CompletionAnswer(Answer):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"
    request: CompletionRequest

    @property
    def tells_tokens(self) -> bool:
        return self.request.logprobs is not None

    def _echoed(self, choice: Choice) -> str:
        """What stands before the completion."""
        if not self.request.echo:
            return ""
        if choice.echoed is None:
            asked = choice.asked
            choice.echoed = "".join(self.texts.pieces(asked.ids[BASE])) if asked.text is None else asked.text
        return choice.echoed

    def _given(self, choice: Choice) -> Json:
        """Log-probabilities of the prompt's tokens: the first has none, for nothing stands before it."""
        asked, found = choice.asked, LogProbs.empty()
        ids = asked.ids[BASE]
        pieces = self.texts.pieces(ids)
        # A BOS token of the model's own is no part of the text.
        offset = 0 if asked.text is None else len(asked.text) - sum(map(len, pieces))
        top = None
        for number, (token_id, piece) in enumerate(zip(ids, pieces, strict=True)):
            log_prob = None
            if number:
                given = choice.given[number - 1]
                log_prob, top = given.log_prob, top_dict(token_id, given.log_prob, given.top, self.texts)
            found.add(piece, max(0, offset), log_prob, top)
            offset += len(piece)
        return found.to_json()

    def opening(self, choice: Choice) -> Json | None:
        if not self.request.echo:
            return None
        return {"text": self._echoed(choice), "logprobs": self._given(choice) if self.tells_tokens else None}

    def piece(self, choice: Choice, text: str, tokens: Sequence[Token]) -> Json:
        return {"text": text, "logprobs": self._log_probs(choice, tokens)}

    def _log_probs(self, choice: Choice, tokens: Sequence[Token]) -> Json | None:
        if self.request.logprobs is None:
            return None
        return completion_log_probs(tokens, self.texts, self.request.logprobs, len(self._echoed(choice)))

    def closing(self) -> Json:
        return {"text": "", "logprobs": None}

    def whole(self, choice: Choice) -> Json:
        written, echoed = self._log_probs(choice, choice.tokens), self._echoed(choice)
        if written is not None and self.request.echo:
            given = self._given(choice)
            written = {name: [*given[name], *values] for name, values in written.items()}
        return {"text": echoed + choice.text, "logprobs": written}
