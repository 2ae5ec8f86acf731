"""Whose turn it is: the engine without threads and without a clock of its own.

Flows are admitted, asked, answered and ended here. What runs the passes (threads, a simulation, a test) takes a `Batch`
from `next_pass` for each device that is idle, and brings it back with its replies to `finish`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from collm.decoding.collaborative import Flow, ModelFailed, More, Request
from collm.decoding.pace import Experience
from collm.engine.passes import Batch, Waiting, plan_pass
from collm.engine.running import Event, Finished, Running, Sink, Stream
from collm.errors import CollmError
from collm.types import BASE, FinishReason, Step
from collm.values import Extend, Fault, LanguageModel, Query, Replies, Reply, StreamingModel
from collm.views import Text

__all__ = ["Event", "Finished", "Scheduler", "Sink", "answers"]

_log = logging.getLogger(__name__)


class Scheduler:
    """Flows that share models. What a flow gets does not depend on the others, whose failures cost it nothing.

    Args:
        models: the base first.
        max_num_seqs: texts that run at a time; further ones wait, first come, first served.
        experience: where pass costs are noted, for the pace of speculation and the size of pieces.
        patience: how long a text that waits for an assistant may be kept waiting for others to join it, in passes of
            that assistant; see `_turn`. 0 serves assistants at once.
        timeout: seconds after which a pass that has not come back is given up; its texts get a fault.
        post: runs a call in the thread that owns the scheduler: what streaming models deliver comes through it.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        max_num_seqs: int = 16,
        experience: Experience | None = None,
        patience: float = 1.0,
        timeout: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        post: Callable[[Callable[[], None]], None] = lambda call: call(),
    ) -> None:
        self.models, self.max_num_seqs = tuple(models), max_num_seqs
        self.experience = experience or Experience()
        self.patience, self.timeout = patience, timeout
        self.devices: dict[Hashable, list[int]] = {}
        """The models whose passes take turns, by device."""
        for number, model in enumerate(self.models):
            if not (model.instant or isinstance(model, StreamingModel)):
                self.devices.setdefault(model.device, []).append(number)
        self.running: dict[int, Running] = {}
        self.waiting: deque[Running] = deque()
        self._queues: list[list[Waiting]] = [[] for _ in self.models]
        self._passes: dict[Hashable, Batch] = {}
        self._served: dict[Hashable, set[int]] = {device: set() for device in self.devices}
        self._cancelled = False
        """A text that may wait in a queue has ended."""
        self._clock, self._post = clock, post

    # Texts come and go.

    def submit(self, number: int, flow: Flow, text: Text, max_tokens: int, sink: Sink) -> None:
        """Take on a text; `number` names it.

        Raises:
            CollmError: it can never fit into the caches.
        """
        lengths = lengths_of(text, max_tokens)
        self.require_room(lengths)
        self.waiting.append(Running(number, flow, text, lengths, sink, len(self.models)))

    def require_room(self, lengths: Sequence[int]) -> None:
        """Refuse a text that would not even fit alone."""
        for model, length in zip(self.models, lengths, strict=True):
            if not model.fits([length]):
                raise CollmError(
                    f"a text of up to {length} tokens does not fit into the cache of {model.name}: raise "
                    f"max_cache_tokens to at least {length}, or lower max_tokens"
                )

    def cancel(self, number: int, reason: FinishReason = "cancelled", error: str | None = None) -> None:
        """End a text, wherever it is. Nothing happens if it has ended."""
        item = self.running.get(number) or next((each for each in self.waiting if each.number == number), None)
        if item is None:
            return
        if item.advancing:  # whoever is told its events cancels it: its flow is on the stack
            item.cancelled = True
            return
        if number not in self.running:
            self.waiting.remove(item)
        self._end(item, reason, error)

    def admit(self) -> None:
        """Start what has been waiting, as far as there is room."""
        while self.waiting and len(self.running) < self.max_num_seqs:
            item = self.waiting[0]
            if self.running and not self._fits(item):
                return
            self.waiting.popleft()
            self.running[item.number] = item
            item.started = self._clock()
            self._advance(item, None)

    def _fits(self, item: Running) -> bool:
        together = [*(each.lengths for each in self.running.values()), item.lengths]
        return all(model.fits([lengths[n] for lengths in together]) for n, model in enumerate(self.models))

    def _end(self, item: Running, reason: FinishReason, error: str | None = None) -> None:
        """Exactly once for every text."""
        assert not item.done
        item.done = True
        self._cancelled |= item.left > 0
        self.running.pop(item.number, None)
        self._stop_stream(item)
        try:
            item.flow.close()
        except Exception:  # a flow that does not let go
            _log.warning("a flow failed while it was closed", exc_info=True)
        for model, view in zip(self.models, item.text.views, strict=True):
            try:
                model.release(view)
            except Exception:
                _log.warning("%s failed to let go of a text", model.name, exc_info=True)
        try:
            item.sink(Finished(reason, item.usage(self._clock()), error))
        except Exception:
            _log.exception("whoever reads text %d failed", item.number)

    # A flow goes on.

    def _advance(self, item: Running, replies: Replies | None) -> None:
        """Let a flow run until it waits for a model, or ends."""
        to_send = replies
        item.advancing = True
        reason: FinishReason = "error"
        try:
            while True:
                event = item.flow.send(to_send)
                if isinstance(event, Step):
                    to_send = None
                    self._write(item, event)
                    if item.cancelled:
                        reason, error = "cancelled", None
                        break
                    continue
                to_send = self._ask(item, event)
                if to_send is None:
                    item.advancing = False
                    return
        except StopIteration as stop:
            reason, error = stop.value, None
        except ModelFailed as failure:
            error = str(failure)
        except Exception as failure:
            _log.exception("text %d failed", item.number)
            error = f"{type(failure).__name__}: {failure}"
        item.advancing = False
        self._end(item, reason, error)

    def _write(self, item: Running, step: Step) -> None:
        if not item.first_token:
            item.first_token = self._clock() - item.started
        item.count(step)
        item.sink(step)

    def _ask(self, item: Running, request: Request) -> Replies | None:
        """Queue what a flow asks for; its replies, if they are there at once."""
        if isinstance(request, tuple) and not isinstance(request, Extend):
            self._stop_stream(item)
            queries: tuple[Query, ...] = request
        else:
            if isinstance(request, More):
                extend = item.extend
                assert extend is not None, "MORE goes on with an Extend"
                found = self._from_stream(item)
                if found is not None:
                    return found
                if item.stream is not None:
                    item.asked, item.left = self._clock(), 1
                    return None
            else:
                self._stop_stream(item)
                extend = item.extend = request
                item.extended_from = len(extend.view)
            if isinstance(self.models[extend.model], StreamingModel):
                self._start_stream(item, extend)
                return None
            view = extend.view
            queries = (Query(extend.model, view, len(view.token_ids), 1, extend.draw, num_top=extend.num_top),)
        item.asked, item.left = self._clock(), len(queries)
        item.replies = [[] for _ in queries]
        item.ticket += 1
        if item.remote:
            item.remote = {}
        for place, query in enumerate(queries):
            model = self.models[query.model]
            if model.instant:
                item.forward_passes[query.model] += 1
                [item.replies[place]] = answers(model, [query])
                item.left -= 1
            elif isinstance(model, StreamingModel):
                self._start_query(item, model, place, query)
            else:
                self._queues[query.model].append(Waiting(item, place, query))
        return None if item.left else item.replies

    def _take(self, item: Running, place: int, replies: list[Reply]) -> None:
        item.replies[place] = replies
        item.left -= 1
        if not item.left:
            self._advance(item, item.replies)

    # Passes.

    def next_pass(self, device: Hashable) -> Batch | None:
        """The pass that an idle device is to run, if anybody wants one."""
        if device in self._passes:
            return None
        numbers = self.devices[device]
        if self._cancelled:
            self._cancelled = False
            self._queues = [[each for each in queue if not each.item.done] for queue in self._queues]
        wanted = [number for number in numbers if self._queues[number]]
        if not wanted:
            return None
        now = self._clock()
        number = wanted[0] if len(wanted) == 1 else self._turn(wanted, now, self._served[device])
        waiting = self._queues[number]
        others = len(self.running) - len(waiting)
        try:
            batch = plan_pass(number, self.models[number], waiting, others, self.experience)
        except Exception as error:  # what a model says of itself
            _log.warning("%s failed", self.models[number].name, exc_info=True)
            self._queues[number] = []
            self._fail(waiting, f"{self.models[number].name}: {type(error).__name__}: {error}")
            return self.next_pass(device)
        going = set(map(id, batch.waiting))
        self._queues[number] = [each for each in waiting if id(each) not in going]
        batch.started = now
        self._passes[device] = batch
        served = self._served[device]
        if number == BASE:
            served.clear()
        else:
            served.add(number)
        return batch

    def _fail(self, waiting: Sequence[Waiting], reason: str) -> None:
        for each in waiting:
            if not each.item.done:
                self._take(each.item, each.place, [Fault(reason)] * each.query.num_last)

    def _turn(self, wanted: Sequence[int], now: float, served: set[int]) -> int:
        """Which model's turn it is on its device: an assistant's, or else the base's.

        A pass of an assistant that serves one text costs about as much as one that serves all. So, where it takes
        turns with the base, it is asked once the texts that wait for it have together waited as long as its pass would
        delay those that want the base, or once the first of them has waited for the time of `patience` passes (as in
        the ski-rental problem, that costs it at most twice the time); and at once where it is no dearer than the base,
        or nobody wants the base. An assistant that has been `served` since the base was comes after texts that have
        wanted the base for longer, so that nobody is kept waiting by those who want it again and again.
        """
        since = {number: min(each.item.asked for each in self._queues[number]) for number in wanted}
        assistants = sorted((number for number in wanted if number != BASE), key=since.__getitem__)
        if BASE not in wanted:
            return assistants[0]
        wanting = len(self._queues[BASE])
        for number in assistants:
            if number in served and since[BASE] <= since[number]:
                continue
            if not self.patience:
                return number
            queue = self._queues[number]
            seconds = self._dear(number, sum(each.query.num_last for each in queue))
            waited = [now - each.item.asked for each in queue]
            if sum(waited) >= wanting * seconds or max(waited) >= self.patience * seconds:
                return number
        return BASE

    def _dear(self, model: int, tokens: int) -> float:
        """Seconds of an assistant's pass if that is known to be dearer than one of the base, else 0."""
        if not self.experience.knows(model):
            return 0.0
        seconds = self.experience.costs[model].pass_seconds(tokens)
        return seconds if seconds > 1.5 * self.experience.costs[BASE].pass_seconds(1) else 0.0

    def finish(self, device: Hashable, batch: Batch, replies: Replies, seconds: float) -> None:
        """A pass is done: its texts go on."""
        assert self._passes.get(device) is batch
        del self._passes[device]
        if batch.expired:
            return
        read = batch.tokens - batch.decoding
        if read:
            self.experience.observe_reading(batch.model, batch.decoding, read, seconds)
        else:
            self.experience.observe_pass(batch.model, len(batch.queries), batch.tokens, seconds)
        for waiting, reply, unfinished in zip(batch.waiting, replies, batch.unfinished, strict=True):
            item = waiting.item
            if item.done:
                continue
            item.forward_passes[batch.model] += 1
            if unfinished and not any(isinstance(each, Fault) for each in reply):
                item.asked = self._clock()  # it has had its turn
                self._queues[batch.model].insert(0, waiting)
            else:
                self._take(item, waiting.place, reply if not unfinished else reply[:1] * waiting.query.num_last)

    def expire(self) -> None:
        """Give up passes that have run for too long; what is asked of such a model meanwhile fails at once."""
        if self.timeout is None:
            return
        now = self._clock()
        for device, batch in list(self._passes.items()):
            if now - batch.started < self.timeout:
                continue
            late = batch.waiting if not batch.expired else []
            batch.expired = True
            for number in self.devices[device]:
                late = late + self._queues[number]
                self._queues[number] = []
            for number in sorted({each.query.model for each in late}):
                own = [each for each in late if each.query.model == number]
                self._fail(own, self._too_late(number))
        for item in [each for each in self.running.values() if self._waits_remotely(each)]:
            if now - item.asked >= self.timeout and not item.done:
                self._give_up(item)

    def _too_late(self, number: int) -> str:
        return f"{self.models[number].name} has not answered within {self.timeout:g} seconds"

    def _waits_remotely(self, item: Running) -> bool:
        return item.left > 0 and (item.stream is not None or bool(item.remote))

    def _give_up(self, item: Running) -> None:
        """Faults in place of what streaming models have not answered."""
        if item.stream is not None:
            assert item.extend is not None
            fault: Reply = Fault(self._too_late(item.extend.model))
            self._stop_stream(item)
            item.left = 0
            self._advance(item, [[fault]])
            return
        names = ", ".join(model.name for model in self.models if isinstance(model, StreamingModel))
        for place, num_last in list(item.remote.items()):
            del item.remote[place]
            fault = Fault(f"{names}: no answer within {self.timeout:g} seconds")
            self._take(item, place, [fault] * num_last)

    def deadline(self) -> float | None:
        """When `expire` is to be called next."""
        if self.timeout is None:
            return None
        since = [batch.started for batch in self._passes.values() if not batch.expired]
        since += [item.asked for item in self.running.values() if self._waits_remotely(item)]
        stuck = [device for device, batch in self._passes.items() if batch.expired]
        if any(self._queues[number] for device in stuck for number in self.devices[device]):
            return self._clock()
        return min(since) + self.timeout if since else None

    # Streaming models.

    def _start_query(self, item: Running, model: StreamingModel, place: int, query: Query) -> None:
        ticket = item.ticket
        item.remote[place] = query.num_last
        item.forward_passes[query.model] += 1

        def deliver(replies: list[Reply] | None) -> None:
            def take() -> None:
                if not item.done and item.ticket == ticket and item.remote.pop(place, None) is not None:
                    found = replies or [Fault(f"{model.name} gave no answer")] * query.num_last
                    self._take(item, place, found)

            self._post(take)

        self._guarded(item, lambda: model.start(query, deliver), deliver)

    def _start_stream(self, item: Running, extend: Extend) -> None:
        model = self.models[extend.model]
        assert isinstance(model, StreamingModel)
        stream = item.stream = Stream()
        item.forward_passes[extend.model] += 1
        item.asked = self._clock()

        def deliver(replies: list[Reply] | None) -> None:
            def take() -> None:
                if item.done or item.stream is not stream:
                    return
                if replies is None:
                    stream.ended = True
                else:
                    stream.ready.extend([reply] for reply in replies)
                if item.left and not item.advancing and (found := self._from_stream(item)) is not None:
                    self._advance(item, found)

            self._post(take)

        item.left = 1
        left = extend.max_tokens - (len(extend.view) - item.extended_from)
        request = extend._replace(max_tokens=max(1, left))
        stream.cancel = self._guarded(item, lambda: model.start(request, deliver), deliver)

    def _guarded(
        self, item: Running, start: Callable[[], Callable[[], None]], deliver: Callable[[list[Reply] | None], None]
    ) -> Callable[[], None] | None:
        try:
            return start()
        except Exception as error:
            _log.exception("text %d: a request failed", item.number)
            deliver([Fault(f"{type(error).__name__}: {error}")])
            return None

    def _from_stream(self, item: Running) -> Replies | None:
        """The next answer of the extension that runs, if it is there; one that has ended is forgotten."""
        stream = item.stream
        if stream is None:
            return None
        if stream.ready:
            item.left = 0
            return [stream.ready.popleft()]
        if stream.ended:
            item.stream = None
            if item.left and item.extend is not None and not item.advancing:
                # It ended before it said what its flow waits for: this one answer is asked for by itself.
                extend = item.extend
                query = Query(
                    extend.model, extend.view, len(extend.view.token_ids), 1, extend.draw, None, extend.num_top
                )
                replies = self._ask(item, (query,))
                return replies
        return None

    def _stop_stream(self, item: Running) -> None:
        stream, item.stream = item.stream, None
        if stream is not None and stream.cancel is not None and not stream.ended:
            try:
                stream.cancel()
            except Exception:
                _log.exception("a request could not be cancelled")


def lengths_of(text: Text, max_tokens: int) -> tuple[int, ...]:
    """Tokens that each model may have to hold of a text: the last one written is never read."""
    return tuple(len(view) + max_tokens - 1 for view in text.views)


def answers(model: LanguageModel, queries: Sequence[Query]) -> Replies:
    """The model's answers. If it fails, each text is asked for alone, so that only those that fail have a fault."""
    try:
        replies = model.predict(queries)
        told = [len(each) for each in replies]
        # What is only read is not answered, unless by a fault.
        if len(told) != len(queries) or any(
            n != q.num_last and (n, q.num_last) != (1, 0) for n, q in zip(told, queries, strict=True)
        ):
            raise CollmError(f"{model.name} does not answer what it is asked: a fault of this model")
        return replies
    except Exception as error:
        if len(queries) > 1:
            return [found for query in queries for found in answers(model, [query])]
        if not isinstance(error, CollmError):
            _log.warning("%s failed", model.name, exc_info=error)
        reason = str(error) if isinstance(error, CollmError) else f"{model.name}: {type(error).__name__}: {error}"
        return [[Fault(reason)] * max(1, queries[0].num_last)]
