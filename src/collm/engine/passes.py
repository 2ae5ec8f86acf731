"""What one pass serves: who goes along, and how much of a long prompt is read before others have their turn."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import NamedTuple

from collm.decoding.experience import LONGEST_PIECE, SHORTEST_PIECE, Experience
from collm.engine.running import Running
from collm.errors import CollmError
from collm.values import Answer, Chosen, Fault, KeepOn, LanguageModel, Query, Replies, Tell

_log = logging.getLogger(__name__)

LONG = 64
"""Tokens from which on a query counts as a prompt that is read, not as decoding."""

OF_TIMEOUT = 0.25
"""The part of the time-out of a pass that one with pieces may be expected to take: a machine's load changes."""


class Waiting(NamedTuple):
    """The query of a text that waits for a model: the `place`-th of what its flow asked. `left`: tokens that were still
    to be read of it behind its last piece, if there was one."""

    item: Running
    place: int
    query: Query
    left: int = 0


@dataclass(slots=True, eq=False)
class Batch:
    """One pass of a model over `tokens` tokens, `decoding` of them not of long prompts.

    `unfinished[i]`: the i-th query reads a piece of what is waited for and answers nothing. `left`: who wants this
    model and does not go along.
    """

    model: int
    waiting: Sequence[Waiting]
    queries: list[Query]
    unfinished: list[bool]
    left: list[Waiting]
    tokens: int
    decoding: int
    started: float = 0.0
    expired: bool = False
    keep_on: KeepOn | None = None
    """How long its texts may write on by themselves; None: they may not."""
    tell: Tell | None = None
    """Who takes their answers while they do."""
    chosen: Chosen | None = None
    """Who is told what a pass has chosen before its answers are there."""
    told: list[int] = field(init=False)
    """By text, how many answers have been taken meanwhile."""

    def __post_init__(self) -> None:
        self.told = [0] * len(self.queries)

    @property
    def reading(self) -> int:
        """Tokens of long prompts."""
        return self.tokens - self.decoding


def plan_pass(
    number: int,
    model: LanguageModel,
    waiting: Sequence[Waiting],
    others: int,
    experience: Experience,
    timeout: float | None = None,
) -> Batch:
    """The next pass of a model: all that decode, and a piece of each prompt.

    A prompt makes a pass longer by less than a usual one of the model. Prompts that are shorter than such a piece are
    read whole, all that wait together: texts that begin together stay together, and share their passes later.

    Args:
        others: texts that run and do not wait for this model.
        timeout: seconds after which the pass is given up: no piece comes near it, and the first, of which nothing is
            known, is short.
    """
    queries = [each.query for each in waiting]
    sizes = list(map(model.missing, queries))
    if max(sizes) <= LONG:
        tokens = sum(sizes)
        return Batch(number, waiting, queries, [False] * len(queries), [], tokens, tokens)
    decoding = [n for n, size in enumerate(sizes) if size <= max(LONG, queries[n].num_last)]
    prompts = [n for n, size in enumerate(sizes) if size > max(LONG, queries[n].num_last)]
    tokens = sum(sizes[n] for n in decoding)
    takes = {n: sizes[n] for n in decoding}
    room = max(SHORTEST_PIECE, LONGEST_PIECE - tokens)
    if timeout is not None:
        room = min(room, experience.readable(number, tokens, OF_TIMEOUT * timeout))
    piece = experience.reading_tokens(number, tokens) if decoding or others else LONGEST_PIECE
    for n in prompts:
        take = min(sizes[n], piece, room)
        left = waiting[n].left
        if left and sizes[n] > max(left, queries[n].num_last):
            # Others, of another engine, took the place of its last piece; the next one would be lost as well.
            take = sizes[n]
        room = max(0, room - take)
        if take:
            takes[n] = take
    return Batch(
        number,
        [waiting[n] for n in takes],
        [_piece(queries[n], sizes[n] - take) for n, take in takes.items()],
        [take < sizes[n] for n, take in takes.items()],
        [each for n, each in enumerate(waiting) if n not in takes],
        sum(takes.values()),
        tokens,
    )


def _piece(query: Query, left: int) -> Query:
    """What is read of a query if so many of its tokens are left for later."""
    return (
        query._replace(length=query.length - left, num_last=0, given=None, write_on=None, then=None) if left else query
    )


def written_on(batch: Batch, replies: Replies) -> list[int]:
    """The tokens of each further pass in which texts wrote on by themselves."""
    if batch.keep_on is None:
        return []
    more = sorted([len(reply) - query.num_last for reply, query in zip(replies, batch.queries, strict=True)])
    return [len(more) - bisect_left(more, n) for n in range(1, more[-1] + 1)]


KINDS = frozenset((Answer, Fault, type(None)))
"""What a reply is."""


def run_pass(models: Sequence[LanguageModel], batch: Batch) -> Replies:
    """What a batch is answered, in the thread of its device."""
    model, queries = models[batch.model], batch.queries
    if batch.keep_on is None and batch.chosen is None:
        return answers(model, queries)
    return answers(model, queries, partial(model.write_on, queries, batch.keep_on, batch.tell, batch.chosen))


def answers(model: LanguageModel, queries: Sequence[Query], ask: Callable[[], Replies] | None = None) -> Replies:
    """The model's answers. If it fails, each text is asked for alone, so that only those that fail have a fault.

    Args:
        ask: how all of them are asked, if not by `predict`.
    """
    try:
        replies = model.predict(queries) if ask is None else ask()
        if not _complete(replies, queries):
            raise CollmError(f"{model.name} does not answer what it is asked: a fault of this model")
        return replies
    except Exception as error:
        if len(queries) > 1:
            return [found for query in queries for found in answers(model, [query])]
        if not isinstance(error, CollmError):
            _log.warning("%s failed", model.name, exc_info=error)
        reason = str(error) if isinstance(error, CollmError) else f"{model.name}: {type(error).__name__}: {error}"
        return [[Fault(reason)] * max(1, queries[0].num_last)]


def _complete(replies: Replies, queries: Sequence[Query]) -> bool:
    if len(replies) != len(queries):
        return False
    for reply, query in zip(replies, queries, strict=True):
        # What is only read is not answered, unless by a fault.
        found, least = len(reply), query.num_last
        if found != least and (found, least) != (1, 0):
            leave = query.write_on
            if leave is None or not least <= found <= least + leave.max_tokens:
                return False
    # Anything else would be taken for a model that abstains.
    return KINDS.issuperset(map(type, chain.from_iterable(replies)))
