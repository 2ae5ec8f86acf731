"""A model behind one or several servers: asks, waits as long as is worth it, asks again where that may help."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import httpx

from collm.errors import nearest
from collm.remote.address import Address
from collm.remote.faults import CONNECT_TIMEOUT, Patience, ServerFault, fault_of, refusal
from collm.remote.health import Replica, Replicas
from collm.remote.wire import DIALECTS, Completion, End, Given, Token
from collm.text import Lines

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a server says about its model."""

    name: str
    context_length: int | None


class Client:
    """Asks a model behind servers. To be used in one event loop: `async with Client(address) as client`.

    Args:
        transport: instead of the network.
        clock, sleep: instead of the real ones.
    """

    def __init__(
        self,
        address: Address,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self.address = address
        self.dialect = DIALECTS[address.kind]
        self.clock, self.sleep = clock, sleep
        self.replicas = Replicas([Replica(url) for url in address.urls], clock)
        self.model = address.model
        key = address.key()
        self._http = httpx.AsyncClient(
            transport=transport,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            verify=True if address.ca is None else ssl.create_default_context(cafile=address.ca),
            timeout=httpx.Timeout(address.timeout, connect=CONNECT_TIMEOUT, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    # -- what is asked

    async def complete(
        self, completion: Completion, text: Hashable | None = None, *, only: Replica | None = None
    ) -> AsyncGenerator[Token | End, None]:
        """The tokens as they come, then an `End`. Where a connection breaks, the rest is asked for again.

        Args:
            text: whatever tells this text from others; its requests go to one replica, which has its prefix cached.
            only: the replica to ask, whatever others have to do.

        Raises:
            ServerFault: the server refused, or did not answer for too long; tokens that came are good.
        """
        written: list[int] = []
        patience, replica = Patience(self.clock, self.sleep), only
        while True:
            rest = completion.after(written)
            try:
                replica = only or self.replicas.choose(text, failed=replica)
                async with aclosing(self._stream(rest, replica)) as events:
                    async for event in events:
                        if isinstance(event, Token):
                            patience.progress()
                            written.append(event.token_id)
                        yield event
                        if isinstance(event, End):
                            return
            except ServerFault as fault:
                # What has come may have been all of it, but for the word that it was.
                if fault.repeatable and written and written[-1] in completion.stop_ids:
                    yield End("stop")
                    return
                if fault.repeatable and len(written) >= completion.max_tokens:
                    yield End("length")
                    return
                await patience.after(fault)

    async def score(self, token_ids: Sequence[int], text: Hashable | None = None) -> list[Given]:
        """For each token but the first: its log-probability after those before it.

        Raises:
            ServerFault: as `complete`; or such a server cannot score.
        """
        if len(token_ids) < 2:
            return []
        body = self.dialect.score_body(token_ids, self.model)
        answer = await self._ask("POST", self.dialect.path, body, text)
        return self._read(lambda: self.dialect.parse_score(answer, token_ids))

    async def card(self) -> ModelCard:
        """Which model it is, the same on every replica; from now on it is asked for by this name.

        Raises:
            ServerFault: a server has no such model, or several and none was named.
        """
        cards = []
        for replica in self.replicas.all:
            cards.append(await self._card(replica))
            self.model = cards[0].name
        lengths = [card.context_length for card in cards if card.context_length is not None]
        return ModelCard(cards[0].name, min(lengths, default=None))

    async def version(self) -> str:
        """Of the server's software, the same on every replica; empty where it does not say.

        Raises:
            ServerFault: replicas differ, so that one text might come out of two.
        """
        path = self.dialect.version_path
        if path is None:
            return ""
        found = {}
        for replica in self.replicas.all:
            answer = await self._ask("GET", path, only=replica)
            found[replica.url] = self._read(partial(self.dialect.parse_version, answer))
        if len(set(found.values())) > 1:
            told = ", ".join(f"{version} at {url}" for url, version in found.items())
            raise ServerFault(f"replicas of one model must be of one version; here are {told}")
        return next(iter(found.values()))

    async def tokenize(self, text: str) -> list[int]:
        """The ids that the server gives a text, special tokens understood and none added."""
        answer = await self._ask("POST", self.dialect.tokenize_path, self.dialect.tokenize_body(text, self.model))
        return self._read(lambda: self.dialect.parse_tokens(answer))

    async def compare_tokenizer(self, encode: Callable[[str], list[int]], texts: Sequence[str]) -> None:
        """Find out at once whether another model stands behind the URL than whoever wrote it believes.

        Args:
            encode: the tokenizer that it should have, without special tokens.
            texts: that tell tokenizers apart.

        Raises:
            ServerFault: the first difference, or the server does not tell its tokens.
        """
        for replica in self.replicas.all:
            for probe in texts:
                body = self.dialect.tokenize_body(probe, self.model)
                answer = await self._ask("POST", self.dialect.tokenize_path, body, only=replica)
                found, expected = self._read(partial(self.dialect.parse_tokens, answer)), encode(probe)
                if found != expected:
                    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
                    where = f"token {at} is {found[at]}, not {expected[at]}" if at is not None else "of another length"
                    raise ServerFault(
                        f"the model behind {replica.url} has another tokenizer: {probe[:40]!r} gives {where}. Models "
                        "that write together must share one; is this the server that was meant?"
                    )

    # -- how

    async def _card(self, replica: Replica) -> ModelCard:
        answer = await self._ask("GET", "/v1/models", only=replica)
        cards = self._read(lambda: {str(card["id"]): card for card in answer["data"]})
        name = self.model or (next(iter(cards)) if len(cards) == 1 else None)
        if name not in cards:
            there = ", ".join(cards) or "none"
            hint = nearest(name or "", cards, f"it has {there}")
            what = f"has no model {name!r}" if name else "has several models: name one (model=...)"
            raise ServerFault(f"{replica.url} {what}; {hint}")
        assert name is not None
        return ModelCard(name, self.dialect.context_length(cards[name]))

    async def _stream(self, completion: Completion, replica: Replica) -> AsyncGenerator[Token | End, None]:
        body = self.dialect.body(completion, self.model)
        async with self._response("POST", self.dialect.path, body, replica) as response:
            if not self.dialect.streams:
                for event in self._events(json.loads(await response.aread()), completion):
                    yield event
                return
            lines = _lines(response)
            while True:
                try:
                    # A server that sends signs of life, and no tokens, would be waited for for ever.
                    async with asyncio.timeout(self.address.timeout):
                        line = await anext(lines)
                        while not line.startswith("data:"):
                            line = await anext(lines)
                except StopAsyncIteration:
                    line = "data: [DONE]"
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    raise ServerFault("the stream ended in the middle", repeatable=True)
                for event in self._events(json.loads(data), completion):
                    if isinstance(event, End):
                        await _drain(lines)
                        yield event
                        return
                    yield event

    def _events(self, answer: Any, completion: Completion) -> list[Token | End]:
        tokens, end = self._read(lambda: self.dialect.parse(answer, completion))
        return [*tokens, *([] if end is None else [end])]

    @staticmethod
    def _read(parse: Callable[[], T]) -> T:
        """Whatever is not as it should be is a fault of the server's."""
        try:
            return parse()
        except ServerFault:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerFault(
                f"the server answered something else than was asked ({type(error).__name__}: {error})", repeatable=True
            ) from error

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        text: Hashable | None = None,
        *,
        only: Replica | None = None,
    ) -> Any:
        """One whole answer; asked again as long as that may help."""
        patience, replica = Patience(self.clock, self.sleep), only
        while True:
            try:
                replica = only or self.replicas.choose(text, failed=replica)
                async with self._response(method, path, body, replica) as response:
                    return json.loads(await response.aread())
            except ServerFault as fault:
                await patience.after(fault)

    @asynccontextmanager
    async def _response(
        self, method: str, path: str, body: Mapping[str, Any] | None, replica: Replica
    ) -> AsyncIterator[httpx.Response]:
        """A good answer of one replica, whose health is kept; what goes wrong while it is read is a `ServerFault`."""
        trying, began = replica.began(), self.clock()
        try:
            async with self._http.stream(method, f"{replica.url}{path}", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response, await response.aread(), self.address)
                yield response
            replica.succeeded()
        except ServerFault as fault:
            # One that refuses, or asks for patience, is alive.
            if fault.repeatable and not fault.busy:
                replica.failed(fault, self.clock(), began)
            else:
                replica.succeeded()
            raise fault.of(replica.url) from fault.__cause__
        except (httpx.HTTPError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError) as error:
            found = fault_of(error, self.address)
            replica.failed(found, self.clock(), began)
            raise found.of(replica.url) from error
        finally:
            replica.ended(trying)


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    lines = Lines()
    async for data in response.aiter_bytes():
        for line in lines.push(data):
            yield line
    for line in lines.flush():
        yield line


async def _drain(lines: AsyncIterator[str]) -> None:
    """Read what is left of an answer, a word or two: only then is its connection free for the next request."""
    with suppress(TimeoutError, httpx.HTTPError):
        async with asyncio.timeout(1.0):
            async for _ in lines:
                pass
