"""Answers without the slots of a pool: each text from its start, or by transformers' own caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from collm.models.backbone import hidden_states
from collm.models.bounds import Bounds
from collm.models.crop_cache import CropCache
from collm.models.devices import input_device
from collm.models.laws import Asked, Laws
from collm.models.openings import Openings
from collm.types import ForwardPass
from collm.values import Fault, Query, Replies, Reply


class PlainAnswering:
    """The plain twin of `SlotAnswering`, and what stands in for it where no pool serves. Whoever calls has the network.

    Args:
        on_pass: called after every forward pass.
    """

    def __init__(
        self, laws: Laws, bounds: Bounds, cache: CropCache | None, on_pass: Callable[[ForwardPass], None] | None
    ) -> None:
        self.laws = laws
        self.on_pass = on_pass
        self._bounds, self._cache = bounds, cache

    def share_chunks(self, openings: Openings) -> None:
        """See `LanguageModel.share_chunks`."""
        self.laws = replace(self.laws, openings=openings)

    def answers(self, queries: Sequence[Query]) -> Replies:
        """See `LanguageModel.predict`; no text writes on."""
        return self._bounds.answered(queries, self._served)

    def _served(self, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        for query, replies in zip(queries, self._read(queries), strict=True):
            yield self._bounds.unspoilt(query, replies, self._read)

    def _read(self, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        # No text twice in a pass of texts together, and as many as fit; without caches, each by itself.
        together: list[Query] = []
        for query in queries:
            if together and (
                self._cache is None
                or any(each.view is query.view for each in together)
                or not self._cache.fits([each.length for each in [*together, query]])
            ):
                yield from self._pass(together)
                together = []
            together.append(query)
        if together:
            yield from self._pass(together)

    def _pass(self, queries: Sequence[Query]) -> list[list[Reply]]:
        began = perf_counter()
        # What is held has been looked at before.
        missing = [self._missing(query) for query in queries]
        replies: list[list[Reply]] = []
        known: list[Query] = []
        for query, tokens in zip(queries, missing, strict=True):
            replies.append(self._bounds.unknown(query, query.length - tokens))
            if not replies[-1]:
                known.append(query)
        if not known:
            return replies
        if self._cache is None:
            [query] = known
            lm = self.laws.lm
            ids = torch.tensor([query.view.token_ids[: query.length]], device=input_device(lm))
            states = [hidden_states(lm, ids, use_cache=False)[0, query.length - query.num_last :]]
        else:
            states = self._cache.read([(query.view, query.length, query.num_last) for query in known])
        answered = [(query, own) for query, own in zip(known, states, strict=True) if query.num_last]
        if answered:
            prefixes = [(query, 0, query.num_last) for query, _ in answered]
            hidden = torch.cat([own for _, own in answered])
            asked = Asked.of(prefixes)
            packed = torch.tensor(asked.numbers, dtype=torch.int64, device=hidden.device)
            found = iter(self._bounds.checked(self.laws.answers(hidden, asked, packed), prefixes))
            for query, reply in zip(queries, replies, strict=True):
                if not reply:
                    reply += [next(found) for _ in range(query.num_last)]
                    if self._cache is not None and Fault in map(type, reply):
                        self._cache.clear(query.view)
        if self.on_pass is not None:
            longest = max(query.length for query in known)
            self.on_pass(ForwardPass(len(known), max(missing), sum(missing), longest, perf_counter() - began))
        return replies

    def _missing(self, query: Query) -> int:
        held = 0 if self._cache is None else self._cache.held(query.view)
        return max(query.length - held, query.num_last)
