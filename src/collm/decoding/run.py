"""The batched driver: many flows in lockstep, one `predict` per model and round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from collm.decoding.collaborative import Flow, Queries, Replies
from collm.types import BASE, Answer, FinishReason, LanguageModel, Step


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a flow. `forward_passes`: queries answered for it by each model."""

    finish_reason: FinishReason
    forward_passes: tuple[int, ...]


Event = tuple[int, Step | Finished]
"""The index of the flow, and what happened."""


@dataclass(slots=True)
class _Running:
    index: int
    flow: Flow
    queries: Queries = ()
    replies: list[list[Answer] | None] = field(default_factory=list)
    forward_passes: list[int] = field(default_factory=list)

    def advance(self, replies: Replies | None) -> Iterator[Event]:
        """Let the flow run until it asks again; `queries` is empty once it has finished."""
        self.queries, to_send = (), replies
        while True:
            try:
                event = self.flow.send(to_send)
            except StopIteration as stop:
                yield self.index, Finished(stop.value, tuple(self.forward_passes))
                return
            if not isinstance(event, Step):
                self.queries, self.replies = event, [None] * len(event)
                return
            to_send = None
            yield self.index, event

    @property
    def wants_assistants_only(self) -> bool:
        return all(query.model != BASE for query in self.queries)


def run(flows: Iterable[Flow], models: Sequence[LanguageModel], batch_size: int = 16) -> Iterator[Event]:
    """Drive flows to their ends, at most `batch_size` at a time; the next one starts as soon as one has finished.

    Texts that wait for an assistant are served before the base is asked again, so that the base always sees the whole
    batch. What a flow gets does not depend on the others.
    """
    waiting = enumerate(flows)
    running: list[_Running] = []
    while True:
        admitted = [
            _Running(index, flow, forward_passes=[0] * len(models))
            for index, flow in islice(waiting, batch_size - len(running))
        ]
        for item in admitted:
            yield from item.advance(None)
        running = [item for item in running + admitted if item.queries]
        if not running and not admitted:
            return
        deferred = [item for item in running if item.wants_assistants_only]
        yield from _serve(deferred or running, models)
        running = [item for item in running if item.queries]


def _serve(batch: Sequence[_Running], models: Sequence[LanguageModel]) -> Iterator[Event]:
    """Answer all queries of a batch, with one call per model, and let its flows go on."""
    for number, model in enumerate(models):
        wanted = [(item, i) for item in batch for i, query in enumerate(item.queries) if query.model == number]
        if not wanted:
            continue
        answers = model.predict([item.queries[i] for item, i in wanted])
        for (item, i), answer in zip(wanted, answers, strict=True):
            item.replies[i] = answer
            item.forward_passes[number] += 1
    for item in batch:
        yield from item.advance([reply for reply in item.replies if reply is not None])
