"""The batched driver: many flows in lockstep, one `predict` per model and round; flows join and leave at any round."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from collm.decoding.collaborative import Flow, ModelFailed, Queries, Replies
from collm.decoding.pace import Experience
from collm.errors import CollmError
from collm.types import BASE, Answer, Fault, FinishReason, LanguageModel, Query, Step, Usage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a flow."""

    finish_reason: FinishReason
    usage: Usage
    error: str | None = None


Event = tuple[int, Step | Finished]
"""The number of the flow, and what happened."""
Lengths = tuple[int, ...]
"""Tokens that a text may come to, prompt included, as each model sees it."""


@dataclass(slots=True, eq=False)
class _Running:
    number: int
    flow: Flow
    lengths: Lengths
    started: float
    num_models: int
    queries: Queries = ()
    asked: float = 0.0
    replies: list[list[Answer] | None] = field(default_factory=list)
    forward_passes: list[int] = field(default_factory=list)
    tokens_by_author: list[int] = field(default_factory=list)
    accepted: int = 0
    recovered: int = 0
    discarded: int = 0
    first_token: float = 0.0

    def __post_init__(self) -> None:
        self.forward_passes, self.tokens_by_author = [0] * self.num_models, [0] * self.num_models

    def advance(self, replies: Replies | None) -> Iterator[Event]:
        """Let the flow run until it asks again; `queries` is empty once it has finished."""
        self.queries, to_send = (), replies
        while True:
            try:
                event = self.flow.send(to_send)
            except StopIteration as stop:
                yield self.number, self.finished(stop.value)
                return
            except ModelFailed as failure:
                yield self.number, self.finished("error", str(failure))
                return
            if not isinstance(event, Step):
                self.queries, self.replies, self.asked = event, [None] * len(event), time.perf_counter()
                return
            to_send = None
            self._count(event)
            yield self.number, event

    def _count(self, step: Step) -> None:
        self.first_token = self.first_token or time.perf_counter() - self.started
        self.tokens_by_author[step.author] += 1
        self.accepted += step.draft == "accepted"
        self.recovered += step.draft == "recovered"
        self.discarded += step.discarded

    def finished(self, reason: FinishReason, error: str | None = None) -> Finished:
        usage = Usage(
            tuple(self.tokens_by_author),
            tuple(self.forward_passes),
            self.accepted + self.recovered + self.discarded,
            self.accepted,
            self.recovered,
            time.perf_counter() - self.started,
            self.first_token,
        )
        return Finished(reason, usage, error)

    @property
    def wants_assistants_only(self) -> bool:
        return all(query.model != BASE for query in self.queries)


class Engine:
    """Flows that share models. Each `step` is one round: at most one forward pass of every model.

    What a flow gets does not depend on the others: they only share passes, and the failure of one costs no other.

    Args:
        models: the base first.
        batch_size: flows that run at a time; further ones wait, first come, first served.
        fits: whether texts of these lengths can be held by the models' caches at the same time; a flow waits until
            it fits beside those that run.
        experience: where pass costs are noted, for the pace of speculation.
        patience: how long a text that waits for an assistant may be kept waiting for others to join it, in passes of
            that assistant; see `_turn`. 0 serves assistants at once.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        batch_size: int = 16,
        *,
        fits: Callable[[Sequence[Lengths]], bool] | None = None,
        experience: Experience | None = None,
        patience: float = 1.0,
    ) -> None:
        self._models, self._batch_size, self._patience = tuple(models), batch_size, patience
        self._fits = fits or (lambda lengths: True)
        self._experience = experience or Experience()
        self._waiting: deque[tuple[int, Flow, Lengths]] = deque()
        self._running: list[_Running] = []
        self._count = 0

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_free(self) -> int:
        """How many more flows could start in the next round, as far as their number goes."""
        return max(0, self._batch_size - self.num_unfinished)

    def submit(self, flow: Flow, lengths: Lengths = ()) -> int:
        """Queue a flow; its number names it in events."""
        self._count += 1
        self._waiting.append((self._count - 1, flow, lengths))
        return self._count - 1

    def cancel(self, number: int) -> Finished | None:
        """Drop a flow, wherever it is; its place in the batch is free at once. None if it has finished already."""
        for item in self._running:
            if item.number == number:
                item.flow.close()
                self._running.remove(item)
                return item.finished("cancelled")
        for waiting in self._waiting:
            if waiting[0] == number:
                waiting[1].close()
                self._waiting.remove(waiting)
                return Finished("cancelled", Usage((0,) * len(self._models), (0,) * len(self._models)))
        return None

    def step(self) -> Iterator[Event]:
        """One round."""
        yield from self._admit()
        batch = self._turn()
        self._serve(batch)
        for item in batch:
            if item in self._running:  # nobody has cancelled it meanwhile
                yield from item.advance([reply for reply in item.replies if reply is not None])
        self._running = [item for item in self._running if item.queries]

    def _turn(self) -> list[_Running]:
        """Whose turn it is: texts that wait for an assistant, or else all that want the base.

        A dear pass that serves one text costs about as much as one that serves all. So an assistant is asked once
        the texts that wait for it have together waited as long as its pass would delay those that want the base, or
        once the first of them has waited for the time of `patience` passes (as in the ski-rental problem, that costs it
        at most twice the time); and at once where it is no dearer than the base, or nobody wants the base.
        """
        wanting = [item for item in self._running if not item.wants_assistants_only]
        waiting = [item for item in self._running if item.wants_assistants_only]
        if not wanting or not self._patience:
            return waiting or wanting
        now = time.perf_counter()
        for model in sorted({query.model for item in waiting for query in item.queries}):
            texts = [item for item in waiting if any(query.model == model for query in item.queries)]
            pass_seconds = self._dear(model, sum(query.num_last for item in texts for query in item.queries))
            waited = [now - item.asked for item in texts]
            if sum(waited) >= len(wanting) * pass_seconds or max(waited) >= self._patience * pass_seconds:
                return texts
        return wanting

    def _dear(self, model: int, tokens: int) -> float:
        """Seconds of an assistant's pass if that is known to be dearer than one of the base, else 0."""
        if not self._experience.knows(model):
            return 0.0
        seconds = self._experience.costs[model].pass_seconds(tokens)
        return seconds if seconds > 1.5 * self._experience.costs[BASE].pass_seconds(1) else 0.0

    def _admit(self) -> Iterator[Event]:
        while self._waiting and len(self._running) < self._batch_size:
            number, flow, lengths = self._waiting[0]
            item = _Running(number, flow, lengths, time.perf_counter(), len(self._models))
            if not self._fits([*(running.lengths for running in self._running), lengths]):
                if self._running:
                    return
                self._waiting.popleft()
                flow.close()
                reason = f"a text of up to {max(lengths)} tokens does not fit into the models' caches"
                yield number, item.finished("error", reason)
                continue
            self._waiting.popleft()
            self._running.append(item)
            yield from item.advance(None)
            if not item.queries:
                self._running.remove(item)

    def _serve(self, batch: Sequence[_Running]) -> None:
        """Answer all queries of a batch, with one call per model."""
        for number, model in enumerate(self._models):
            wanted = [(item, i) for item in batch for i, query in enumerate(item.queries) if query.model == number]
            if not wanted:
                continue
            queries = [item.queries[i] for item, i in wanted]
            start = time.perf_counter()
            answers = _answers(model, queries)
            # A text's first pass holds its prompt: it says nothing about the passes that decode.
            if all(item.forward_passes[number] for item, _ in wanted):
                tokens = sum(query.num_last for query in queries)
                self._experience.observe_pass(number, len(queries), tokens, time.perf_counter() - start)
            for (item, i), answer in zip(wanted, answers, strict=True):
                item.replies[i] = answer
                item.forward_passes[number] += 1


def _answers(model: LanguageModel, queries: Sequence[Query]) -> list[list[Answer]]:
    """The model's answers. If it raises, each text is asked for alone, so that only those that fail have a fault."""
    try:
        return model.predict(queries)
    except Exception as error:
        if len(queries) > 1:
            return [answers for query in queries for answers in _answers(model, [query])]
        if not isinstance(error, CollmError):
            _log.warning("%s failed", model.name, exc_info=error)
        told = str(error) if isinstance(error, CollmError) else f"{model.name}: {type(error).__name__}: {error}"
        return [[Fault(told)] * queries[0].num_last]


def run(
    flows: Iterable[Flow | tuple[Flow, Lengths]],
    models: Sequence[LanguageModel],
    batch_size: int = 16,
    *,
    fits: Callable[[Sequence[Lengths]], bool] | None = None,
    experience: Experience | None = None,
    patience: float = 1.0,
) -> Iterator[Event]:
    """Drive flows to their ends, at most `batch_size` at a time; they are drawn from `flows` as there is room."""
    engine = Engine(models, batch_size, fits=fits, experience=experience, patience=patience)
    waiting = iter(flows)
    while True:
        for flow in islice(waiting, engine.num_free):
            engine.submit(*flow) if isinstance(flow, tuple) else engine.submit(flow)
        if not engine.num_unfinished:
            return
        yield from engine.step()
