"""What one pass serves: who goes along, and how much of a long prompt is read before others have their turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from collm.decoding.pace import LONGEST_PIECE, Experience
from collm.engine.running import Running
from collm.values import LanguageModel, Query

LONG = 64
"""Tokens from which on a query counts as a prompt that is read, not as decoding."""


class Waiting(NamedTuple):
    """The query of a text that waits for a model: the `place`-th of what its flow asked."""

    item: Running
    place: int
    query: Query


@dataclass(slots=True, eq=False)
class Batch:
    """One pass of a model over `tokens` tokens, `decoding` of them not of long prompts.

    `unfinished[i]`: the i-th query reads a piece of what is waited for and answers nothing.
    """

    model: int
    waiting: list[Waiting]
    queries: list[Query]
    unfinished: list[bool]
    tokens: int
    decoding: int
    started: float = 0.0
    expired: bool = False


def plan_pass(
    number: int, model: LanguageModel, waiting: Sequence[Waiting], others: int, experience: Experience
) -> Batch:
    """The next pass of a model: all that decode, and of the prompts as much as delays nobody by more than a pass.

    Args:
        others: texts that run and do not wait for this model.
    """
    sizes = [model.missing(each.query) for each in waiting]
    long = [n for n, size in enumerate(sizes) if size > max(LONG, waiting[n].query.num_last)]
    if not long:
        tokens = sum(sizes)
        return Batch(number, list(waiting), [each.query for each in waiting], [False] * len(waiting), tokens, tokens)
    decoding = [n for n in range(len(waiting)) if n not in long]
    tokens = sum(sizes[n] for n in decoding)
    room = experience.reading_tokens(number, tokens) if decoding or others else LONGEST_PIECE
    batch = Batch(number, [], [], [], 0, tokens)
    for n in decoding + sorted(long, key=sizes.__getitem__):
        entry, size = waiting[n], sizes[n]
        query, take = entry.query, size
        if n in long:
            take = min(size, room, max(0, LONGEST_PIECE - batch.tokens))
            room -= take
            if take < size:
                query = query._replace(length=query.length - size + take, num_last=0, given=None)
        if take:
            batch.waiting.append(entry)
            batch.queries.append(query)
            batch.unfinished.append(query is not entry.query)
            batch.tokens += take
    return batch
