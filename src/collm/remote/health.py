"""Which replica is asked, and which is left alone for a while. Pure: the clock is given."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from collm.remote.faults import ServerFault

FAILURES = 5
"""In a row, until a server is called broken. Requests that fail while they are under way together count as one: a
hiccup ends many of them, and says as little as one does."""
COOLDOWN = 15.0
"""Seconds for which nobody asks a broken server; then one request tries it."""
SLACK = 4
"""Requests by which a text's own replica, which holds its prefix in its cache, may be busier than the least busy."""
REMEMBERED = 4096
"""Texts whose replica is known."""


@dataclass
class Replica:
    """One server of a model. Closed (healthy), open (broken, until `retry_at`), or half open: one request tries it."""

    url: str
    in_flight: int = 0
    failures: int = 0
    failed_at: float | None = None
    retry_at: float | None = None
    trying: bool = False
    reason: str = ""

    def available(self, now: float) -> bool:
        return self.retry_at is None or (now >= self.retry_at and not self.trying)

    def began(self) -> bool:
        """Whether this is the one request that tries a broken server."""
        self.in_flight += 1
        self.trying = self.trying or self.retry_at is not None
        return self.trying

    def ended(self, trying: bool) -> None:
        """Whatever came of it; one that was given up says nothing about the server."""
        self.in_flight -= 1
        if trying:
            self.trying = False

    def succeeded(self) -> None:
        self.failures, self.retry_at, self.trying = 0, None, False

    def failed(self, fault: ServerFault, now: float, began: float) -> None:
        if self.failed_at is None or began >= self.failed_at or self.trying:
            self.failures, self.failed_at = self.failures + 1, now
        self.reason = str(fault)
        if self.trying or self.failures >= FAILURES:
            self.retry_at = now + COOLDOWN
        self.trying = False


@dataclass
class Replicas:
    """All servers of one model."""

    all: Sequence[Replica]
    clock: Callable[[], float]
    _homes: OrderedDict[Hashable, Replica] = field(default_factory=OrderedDict)

    def choose(self, text: Hashable | None = None, failed: Replica | None = None) -> Replica:
        """The one that this text was sent to last, unless it has much more to do than others; else the least busy.

        Args:
            failed: where it has just come to nothing, so that another one is tried if there is one.

        Raises:
            ServerFault: all of them are broken.
        """
        now = self.clock()
        there = [replica for replica in self.all if replica.available(now)]
        if not there:
            first = min(self.all, key=lambda replica: replica.retry_at or now)
            wait = max(0.0, (first.retry_at or now) - now)
            raise ServerFault(
                f"{first.url} is left alone for {wait:.0f} s more after {first.failures} failures in a row, the last: "
                f"{first.reason}"
            )
        there = [replica for replica in there if replica is not failed] or there
        least = min(there, key=lambda replica: replica.in_flight)
        home = self._homes.get(text) if text is not None else None
        chosen = home if home in there and home.in_flight <= least.in_flight + SLACK else least
        assert chosen is not None
        if text is not None:
            self._homes[text] = chosen
            self._homes.move_to_end(text)
            if len(self._homes) > REMEMBERED:
                self._homes.popitem(last=False)
        return chosen
