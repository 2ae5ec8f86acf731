"""What a served assistant writes ahead of being asked: in a run of deferrals, the next token is on its way already.

It is the token that the assistant would write next in any case, so that it costs nothing but work of its server, where
the base then writes by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from collm.remote.background import background
from collm.remote.wire import End, Token
from collm.values import Query

MOST = 8
"""Tokens that are asked for at a time."""

Ask = Callable[[Query, Sequence[int], int], AsyncGenerator[Token | End, None]]
"""So many tokens behind these."""


@dataclass(slots=True)
class Run:
    """The deferrals of a text that follow one another: the longer they have, the more will. A function of the text
    alone, so that what is asked for, and drawn, does not depend on time."""

    last: int = -1
    count: int = 0

    def wanted(self, length: int) -> int:
        """How many tokens are to be asked for behind the first `length`."""
        self.count = self.count + 1 if length == self.last + 1 else 0
        self.last = length
        return min(MOST, 1 + self.count)


@dataclass(slots=True, eq=False)
class _Written:
    """A completion that runs: the tokens behind `ids` so far. `came` is set whenever there is more, and at its end."""

    query: Query
    ids: Sequence[int]
    tokens: list[Token] = field(default_factory=list)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    ended: bool = False
    task: asyncio.Task[None] | None = None

    def holds(self, query: Query, ids: Sequence[int]) -> bool:
        """Whether the token behind `ids` is one of those that it writes."""
        start = len(self.ids)
        return (
            (query.draw, query.num_top) == (self.query.draw, self.query.num_top)
            and len(ids) > start
            and ids[:start] == self.ids
            and ids[start:] == [token.token_id for token in self.tokens[: len(ids) - start]]
        )

    async def token(self, number: int) -> Token | None:
        """The one of this number; None if it ended before."""
        while number >= len(self.tokens) and not self.ended:
            self.came.clear()
            try:
                await self.came.wait()
            except asyncio.CancelledError:  # whoever asked has given it up: nobody else waits for it
                if self.task is not None:
                    self.task.cancel()
                raise
        return self.tokens[number] if number < len(self.tokens) else None


class Ahead:
    """For all texts of one model, in the event loop of `background`.

    Args:
        ask: its server.
    """

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._texts: set[int] = set()
        self._runs: dict[int, Run] = {}
        self._written: dict[int, _Written] = {}

    async def token(self, query: Query, ids: Sequence[int]) -> Token | None:
        """The token behind `ids`; None where the server ends the text without one.

        Raises:
            ServerFault: as the client.
        """
        text = id(query.view)
        count = self._runs.setdefault(text, Run()).wanted(len(ids))
        written = self._written.get(text)
        if written is not None and written.holds(query, ids):
            found = await written.token(len(ids) - len(written.ids))
            if found is not None:
                return found
        if written is not None and written.task is not None:
            written.task.cancel()  # nothing happens where it has ended
        written = self._written[text] = _Written(query, ids)
        written.task = asyncio.create_task(self._write(written, count))
        found = await written.token(0)
        if found is None and written.error is not None:
            raise written.error
        return found

    async def _write(self, written: _Written, count: int) -> None:
        try:
            async with aclosing(self._ask(written.query, written.ids, count)) as events:
                async for event in events:
                    if isinstance(event, Token):
                        written.tokens.append(event)
                        written.came.set()
        except Exception as error:  # what has come is good; the rest is asked for again if it is wanted
            written.error = error
        finally:
            written.ended = True
            written.came.set()

    # From the engine's thread.

    def expect(self, text: int) -> None:
        """A text is about to ask."""
        self._texts.add(text)

    def forget(self, text: int) -> None:
        """A text has ended, whatever it still waits for."""
        if text in self._texts:
            self._texts.remove(text)
            background.start(self._forget(text))

    async def _forget(self, text: int) -> None:
        self._runs.pop(text, None)
        written = self._written.pop(text, None)
        if written is not None and written.task is not None:
            written.task.cancel()
