"""One text on its way through the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from collm.decoding.collaborative import MORE, Flow, More
from collm.types import FinishReason, Step, Usage
from collm.values import Extend, Reply
from collm.views import Text


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a text; each has exactly one."""

    finish_reason: FinishReason
    usage: Usage
    error: str | None = None


Event = Step | Finished
Sink = Callable[[Event], None]
"""Told each event of a text, in the driver's thread: it must not wait."""


@dataclass(slots=True, eq=False)
class Stream:
    """An `Extend` that a streaming model is working on: the answers that its flow has not asked for yet."""

    ready: deque[list[Reply]] = field(default_factory=deque)
    ended: bool = False
    cancel: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Asked:
    """A query that a streaming model is working on, for so many answers."""

    num_last: int
    cancel: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Running:
    """`replies` fill up until `left` is 0; then the flow goes on. `advancing`: it is running now."""

    number: int
    flow: Flow
    text: Text
    lengths: tuple[int, ...]
    """Tokens that it may come to, prompt included, as each model sees it."""
    sink: Sink
    num_models: int
    started: float = 0.0
    asked: float = 0.0
    stopped: float | None = None
    """When it stopped to write on by itself, in a call of which others have made use since."""
    replies: list[list[Reply]] = field(default_factory=list)
    left: int = 0
    extend: Extend | None = None
    extended_from: int = 0
    """Where its view ended when it was asked for."""
    call: object = None
    """The passes in which it writes on by itself, and whose answers it takes as they come."""
    more: More = MORE
    """What it asked for last in them."""
    stream: Stream | None = None
    ticket: int = 0
    """Rises with each request: what a streaming model delivers late is not taken for an answer to the next one."""
    remote: dict[int, Asked] = field(default_factory=dict)
    """By place, what is awaited from streaming models."""
    advancing: bool = False
    cancelled: bool = False
    done: bool = False
    first_token: float = 0.0
    forward_passes: list[int] = field(default_factory=list)
    tokens_by_author: list[int] = field(default_factory=list)
    accepted: int = 0
    recovered: int = 0
    discarded: int = 0

    def __post_init__(self) -> None:
        self.forward_passes, self.tokens_by_author = [0] * self.num_models, [0] * self.num_models

    def count(self, step: Step) -> None:
        self.tokens_by_author[step.author] += len(step.token_ids) or 1
        if step.draft:
            self.accepted += step.draft == "accepted"
            self.recovered += step.draft == "recovered"
            self.discarded += step.discarded

    def usage(self, now: float, cached: Sequence[int]) -> Usage:
        """`cached`: tokens of the text that each model's caches had when it came."""
        return Usage(
            tuple(self.tokens_by_author),
            tuple(self.forward_passes),
            self.accepted + self.recovered + self.discarded,
            self.accepted,
            self.recovered,
            now - self.started if self.started else 0.0,
            self.first_token,
            # The last token of a prompt is always read, for what comes behind it.
            tuple(max(0, min(n, view.prompt_length - 1)) for n, view in zip(cached, self.text.views, strict=True)),
        )
