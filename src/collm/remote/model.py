"""A model behind a server as one of a system: it writes on by itself, and whoever asked takes its tokens as they come.

An assistant is asked for one token, or for the rest of a text. A base on a vLLM that serves an export writes up to its
next deferral, which the server finds by itself (`collm.vllm_plugin`): round trips are counted in deferrals.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any
from weakref import finalize

from transformers import PreTrainedTokenizerBase

from collm.cuts import Cuts
from collm.decoding.policies import Policy
from collm.errors import CollmError
from collm.identity.finding import PROBE, digest, remote_identity
from collm.models.served import ServedInfo
from collm.noise import PURPOSES, key_of, philox
from collm.remote.ahead import Ahead
from collm.remote.background import Job, background
from collm.remote.chunks import NUM_TOP, Openings
from collm.remote.client import Client, ModelCard
from collm.remote.faults import ServerFault
from collm.remote.rules import hidden_share, log_gate_of, settings_of, writes_alone
from collm.remote.wire import Completion, End, Given, Sampling, Token
from collm.values import NO_TOKEN, UNKNOWN, Answer, Draw, Extend, Fault, Query, Replies, Reply, StreamingModel, Told
from collm.views import View

_log = logging.getLogger(__name__)

SCORED_AT_ONCE = 64
NO_TOKEN_CAME = "the server ended the text without a token"
NO_LAW = "a server tells tokens and log-probabilities, not whole laws"
NO_BLOCKS = (
    "a server would have to read a whole text again to judge a block of it: vLLM leaves its prefix cache unread where "
    "log-probabilities of given tokens are asked for, and llama.cpp tells none"
)


class RemoteModel(StreamingModel):
    """See `connecting.connect`, which makes one."""

    def __init__(
        self,
        client: Client,
        card: ModelCard,
        version: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        served: ServedInfo | None,
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        self.client, self.card, self.version, self.served = client, card, version, served
        self._name, self._tokenizer, self._eos, self._vocab_size = name, tokenizer, eos_token_ids, vocab_size
        self._openings: Openings | None = None
        # Where tokens can be had one by one. A base is asked to write on by itself.
        self._ahead = Ahead(self._write) if served is None and client.dialect.streams else None
        self._close = finalize(self, background.start, client.__aexit__(None, None, None))

    @property
    def name(self) -> str:
        return self._name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos

    @property
    def context_length(self) -> int | None:
        """A server counts the token that it is to write, too."""
        return None if self.card.context_length is None else self.card.context_length - 1

    @property
    def lacks(self) -> Mapping[Told, str]:
        found: dict[Told, str] = {"law": NO_LAW, "entropy": NO_LAW, "blocks": NO_BLOCKS}
        if self.served is not None:
            found["given"] = "its law holds the rows of the gate, too: ask a server of the plain model"
            found["top"] = "it tells the gate beside each token, and servers tell one or the other"
        elif not self.client.dialect.scores:
            found["given"] = "llama.cpp's server tells no log-probabilities of given tokens"
            found["top"] = "llama.cpp's server tells no log-probabilities where a token ends inside a character"
        return found

    @property
    def tests_deferral(self) -> bool:
        return self.served is not None

    @property
    def closing_told(self) -> bool:
        return False

    @property
    def closing_approximated(self) -> bool:
        return self.client.address.closing is not None

    def share_chunks(self, cuts: Cuts, first_bytes: Sequence[int]) -> None:
        if self.served is not None:
            raise CollmError(
                f"{self.name} is an export, whose server decides at every token: between models with different "
                "tokenizers, load the base here"
            )
        self._openings = Openings(cuts, first_bytes)

    def start(self, request: Query | Extend, deliver: Callable[[list[Reply] | None], None]) -> Callable[[], None]:
        ids = request.view.token_ids
        if isinstance(request, Query):
            if self._ahead is not None and not request.last_bytes:
                self._ahead.expect(id(request.view))
            job = Job(self._query(request, ids[: request.length], deliver))
        else:
            job = Job(None)
            job.begin(self._extend(request, list(ids), deliver, job))
        return job.cancel

    def predict(self, queries: Sequence[Query]) -> Replies:
        async def answers() -> Replies:
            return await asyncio.gather(*(self._answers(each, each.view.token_ids[: each.length]) for each in queries))

        return background.wait(answers())

    def given(self, texts: Sequence[Sequence[int]]) -> list[list[Given]]:
        """Log-probabilities of the tokens of whole texts, the first left out, `SCORED_AT_ONCE` texts at a time.

        Raises:
            CollmError: the server does not tell them, or is gone.
        """
        if "given" in self.lacks:
            raise CollmError(f"{self.name}: {self.lacks['given']}")

        async def scores() -> list[list[Given]]:
            turns = asyncio.Semaphore(SCORED_AT_ONCE)

            async def one(ids: Sequence[int]) -> list[Given]:
                async with turns:
                    return await self.client.score(ids)

            async with asyncio.TaskGroup() as group:  # one that fails ends the others
                asked = [group.create_task(one(ids)) for ids in texts]
            return [task.result() for task in asked]

        try:
            return background.wait(scores())
        except ExceptionGroup as failed:
            first = failed.exceptions[0]
            raise CollmError(f"{self.name}: {first}") from first

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    @cached_property
    def _identity(self) -> Mapping[str, Any]:
        probe = background.wait(self._probe())
        found = dict(remote_identity(self.card.name, self.version, self._tokenizer, probe))
        if self.served is not None:
            served = self.served.model_dump(mode="json", exclude={"calibration"})
            found["gate"] = digest(served)
        return found

    async def _probe(self) -> list[float]:
        """Log-probabilities of a fixed text; where a server tells none of given tokens, those of the most probable
        tokens behind its parts, which are as steady: at a tie either has them."""
        ids = list(self._tokenizer.encode(PROBE, add_special_tokens=False))[: self.context_length]
        if self.client.dialect.scores:
            return [given.log_prob for given in await self.client.score(ids)]
        ends = [len(ids) * part // 12 for part in range(1, 13)]
        found = await asyncio.gather(*(self._token(ids[:end], Draw(), end, 0) for end in ends if end))
        for reply in found:
            if isinstance(reply, Fault):
                raise CollmError(f"{reply.reason}; so it cannot be told from other models")
        told = [reply.log_prob for reply in found if isinstance(reply, Answer)]
        if all(map(math.isnan, told)):
            raise CollmError(f"{self.name}: the server tells no log-probabilities of what it writes")
        return told

    def release(self, view: View) -> None:
        if self._ahead is not None:
            self._ahead.forget(id(view))

    # -- queries

    async def _query(self, query: Query, ids: Sequence[int], deliver: Callable[[list[Reply] | None], None]) -> None:
        alone = query.num_last == 1 and query.given is None and not (query.law or query.last_bytes)
        if self._ahead is not None and alone:
            deliver([await self._next(self._ahead, query, ids)])
        else:
            deliver(await self._answers(query, ids))

    async def _next(self, ahead: Ahead, query: Query, ids: Sequence[int]) -> Reply:
        """The next token of a text that the engine writes."""
        try:
            token = await ahead.token(query, ids)
        except Exception as error:
            return self._fault(error)
        return self._answer(token, query.draw, tested=False) if token else Fault(f"{self.name}: {NO_TOKEN_CAME}")

    def _write(self, query: Query, ids: Sequence[int], count: int) -> AsyncGenerator[Token | End, None]:
        position = len(ids) - query.view.prompt_length
        if self.card.context_length is not None:
            count = max(1, min(count, self.card.context_length - len(ids)))
        asked = self._completion(ids, count, query.draw, position, query.num_top, {})
        return self.client.complete(asked, id(query.view))

    async def _answers(self, query: Query, ids: Sequence[int]) -> list[Reply]:
        try:
            if query.law:
                raise ServerFault(NO_LAW)
            if query.given is not None:
                return await self._given(query, ids)
            starts = [(ids[:end], end - query.view.prompt_length) for end in query.ends]
            if query.last_bytes:
                assert self._openings is not None, "it shares no chunks"
                return [
                    await self._openings.choose(
                        lambda draw, ids=ids, at=at: self._token(  # type: ignore[misc]
                            ids, draw, at + query.view.shift, max(NUM_TOP, query.num_top), id(query.view)
                        ),
                        query,
                        last,
                    )
                    for (ids, at), last in zip(starts, query.last_bytes, strict=True)
                ]
            asked = (self._token(prefix, query.draw, at, query.num_top, id(query.view)) for prefix, at in starts)
            return list(await asyncio.gather(*asked))
        except Exception as error:
            return [self._fault(error)] * max(1, query.num_last)

    async def _token(
        self, ids: Sequence[int], draw: Draw, position: int, num_top: int, text: int | None = None
    ) -> Reply:
        """The next token of one prefix, written, never deferred."""
        settings, _ = self._settings(None)
        asked = self._completion(ids, 1, draw, position, num_top, settings)
        found: Reply = None
        try:
            async with aclosing(self.client.complete(asked, text)) as events:
                async for event in events:
                    if isinstance(event, Token) and found is None:
                        found = self._answer(event, draw, tested=False)
        except Exception as error:
            # What has come is good, whatever happened to the rest of the answer.
            return found or self._fault(error)
        return found or Fault(f"{self.name}: {NO_TOKEN_CAME}")

    async def _given(self, query: Query, ids: Sequence[int]) -> list[Reply]:
        if "given" in self.lacks:
            raise ServerFault(self.lacks["given"])
        assert query.given is not None
        gold, ends = list(query.given), list(query.ends)
        if gold[:-1] == list(ids[ends[0] :]):
            told = (await self.client.score([*ids, gold[-1]], id(query.view)))[-len(gold) :]
        else:  # tokens that do not follow one another
            asked = (self.client.score([*ids[:end], token]) for end, token in zip(ends, gold, strict=True))
            told = [scores[-1] for scores in await asyncio.gather(*asked)]
        return [
            Answer(
                NO_TOKEN,
                UNKNOWN,
                token if each.is_top else None,
                each.log_prob if each.is_top else UNKNOWN,
                UNKNOWN,
                given_log_prob=each.log_prob,
            )
            for token, each in zip(gold, told, strict=True)
        ]

    # -- writing on

    async def _extend(
        self, extend: Extend, ids: list[int], deliver: Callable[[list[Reply] | None], None], job: Job
    ) -> None:
        try:
            settings, tested = self._settings(extend.until)
            position = len(ids) - extend.view.prompt_length
            limit = extend.max_tokens
            if not tested:
                limit = writes_alone(extend.until, extend.draw, position, limit)
            completion = self._completion(ids, limit, extend.draw, position, extend.num_top, settings)
            count = 0
            async with aclosing(self.client.complete(completion, id(extend.view))) as events:
                async for event in events:
                    if isinstance(event, End):
                        break
                    answer = self._answer(event, extend.draw, tested)
                    count += 1
                    # Its connection is worth more than the few bytes that are still to come.
                    job.ending = count == limit or event.token_id in self._ends
                    deliver([answer])
        except Exception as error:
            deliver([self._fault(error)])
        deliver(None)

    @cached_property
    def _ends(self) -> frozenset[int]:
        return self._eos | frozenset(() if self.served is None else self.served.defer_token_ids)

    def _settings(self, until: Policy | None) -> tuple[Mapping[str, Any], bool]:
        """What the server is told about deferral, and whether it tests it."""
        if self.served is None:
            return {}, False
        found = settings_of(until)
        return ({"collm_deferral": "never"}, False) if found is None else (found, until is not None)

    def _completion(
        self, ids: Sequence[int], max_tokens: int, draw: Draw, position: int, num_top: int, settings: Mapping[str, Any]
    ) -> Completion:
        seed = philox((0, position, draw.sample, PURPOSES["token"]), key_of(draw.seed))[0] >> 1
        sampling = Sampling(draw.temperature, draw.top_p, draw.top_k, seed)
        ends = tuple(sorted(self._ends))  # of which its server may not know all
        if self.served is None:
            return Completion(ids, max_tokens, sampling, ends, max(1, num_top), settings=settings)
        if num_top:
            raise ServerFault(f"the most probable tokens cannot be told: {self.lacks['top']}")
        watch = (*self.served.defer_token_ids, self.served.zero_token_id)
        return Completion(ids, max_tokens, sampling, ends, 0, watch, settings)

    def _answer(self, token: Token, draw: Draw, tested: bool) -> Reply:
        number, log_prob, gate = token.token_id, token.log_prob, None
        if self.served is not None:
            gate = log_gate_of(self.served, token.watched)
            if number in self.served.defer_token_ids:
                if not tested:
                    return Fault(f"{self.name}: the server deferred where it was to write")
                return Answer(NO_TOKEN, UNKNOWN, None, UNKNOWN, UNKNOWN, gate, defers=True)
            # The law over the base's own tokens alone.
            log_prob -= math.log1p(-min(hidden_share(self.served, token.watched), 1 - 1e-12))
        if not 0 <= number < self._vocab_size:
            return Fault(f"{self.name}: the server wrote token {number}, which the tokenizer does not have")
        top, top_log_prob = (number, log_prob) if not draw.temperature else (None, UNKNOWN)
        if token.top:
            top, top_log_prob = token.top[0]
        told = False if tested else None
        return Answer(number, log_prob, top, top_log_prob, UNKNOWN, gate, top=token.top, defers=told)

    def _fault(self, error: Exception) -> Fault:
        if not isinstance(error, CollmError):
            _log.warning("%s failed", self.name, exc_info=error)
        told = str(error) if isinstance(error, CollmError) else f"{type(error).__name__}: {error}"
        return Fault(f"{self.name}: {told}")
