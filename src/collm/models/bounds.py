"""What a transformers model can answer; beyond that a fault for the text concerned, and none for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from collm.models.crop_cache import CropCache
from collm.models.prefix_cache import PrefixCache
from collm.values import Answer, Fault, Query, Replies, Reply


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one model. `known_tokens`: those from there on it cannot read."""

    name: str
    known_tokens: int
    context_length: int | None
    cache: PrefixCache | CropCache | None

    @property
    def longest(self) -> int | None:
        """Tokens that a text may have."""
        held = None if self.cache is None else self.cache.max_tokens
        bounds = [bound for bound in (held, self.context_length) if bound is not None]
        return min(bounds, default=None)

    def answered(self, queries: Sequence[Query], served: Callable[[list[Query]], Iterator[list[Reply]]]) -> Replies:
        """What `served` replies, in order, to the queries that are not too long."""
        faults = [self._too_long(query) for query in queries]
        replies = served([query for query, fault in zip(queries, faults, strict=True) if fault is None])
        return [
            next(replies) if fault is None else [fault] * max(1, query.num_last)
            for query, fault in zip(queries, faults, strict=True)
        ]

    def _too_long(self, query: Query) -> Fault | None:
        if self.context_length is not None and query.length > self.context_length:
            return Fault(
                f"{self.name}: {query.length} tokens do not fit into its context of {self.context_length}; "
                "shorten the prompt"
            )
        if self.cache is not None and not self.cache.fits([query.length]):
            return Fault(
                f"{self.name}: {query.length} tokens do not fit into max_cache_tokens={self.cache.max_tokens}; "
                f"raise it to at least {query.length}"
            )
        return None

    def unspoilt(
        self, query: Query, replies: list[Reply], served: Callable[[list[Query]], Iterator[list[Reply]]]
    ) -> list[Reply]:
        """The replies to a query of which some are faults: what comes before the token that is at fault is asked for
        without it. A token that is not a number spoils all that is read in one pass with it, what stands before it,
        too: masks let NaN through. And nobody need know a token that is drafted and will perhaps never be written.

        Args:
            served: what is replied to queries, as they are.
        """
        if query.num_last <= 1 or Fault not in map(type, replies):
            return replies
        # So many replies hold, and among so many is one that does not.
        first, held, spoilt = query.length - query.num_last, list(map(type, replies)).index(Fault), query.num_last
        while spoilt - held > 1:
            count = (held + spoilt) // 2
            given = None if query.given is None else query.given[:count]
            shorter = query._replace(length=first + count, num_last=count, given=given, opens=False, then=None)
            [found] = served([shorter._replace(last_bytes=query.last_bytes[:count])])
            if Fault in map(type, found):
                spoilt = count
            else:
                held, replies = count, [*found, *replies[count:]]
        return replies

    def unknown(self, query: Query, start: int) -> list[Reply]:
        """The replies to a query with a token, from `start` on, that the model does not know; none if it knows all."""
        highest = max(query.view.token_ids[start : query.length], default=0)
        if highest < self.known_tokens:
            return []
        fault = Fault(
            f"{self.name}: token {highest} lies beyond the {self.known_tokens} tokens that the model "
            "knows; give the tokenizer that belongs to it"
        )
        return [fault] * max(1, query.num_last)

    def checked(self, answers: Iterable[Answer | None], prefixes: Sequence[tuple[Query, int, int]]) -> Iterator[Reply]:
        """Answers behind the i-th to before the j-th prefix of each query, faults in place of those that are None."""
        found = list(answers)
        if None not in found:
            return iter(found)
        positions = [query.length - query.num_last + n for query, i, j in prefixes for n in range(i, j)]
        return (
            self.no_numbers(position) if answer is None else answer
            for answer, position in zip(found, positions, strict=True)
        )

    def no_numbers(self, position: int) -> Fault:
        """What is said behind the token at `position`, counted from 0, is not a number."""
        return Fault(
            f"{self.name}: the predictions after position {position} are not numbers (NaN); its weights are damaged "
            "or overflow in this dtype: try another dtype"
        )
