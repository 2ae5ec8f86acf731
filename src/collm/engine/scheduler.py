"""Texts on their way: the engine without threads and without a clock of its own.

Flows are admitted, asked, answered and ended here. What runs the passes (threads, a simulation, a test) takes a `Batch`
from `next_pass` for each device that is idle, and brings it back with its replies to `finish`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from contextlib import AbstractContextManager

from collm.decoding.collaborative import Flow, ModelFailed, More, Request
from collm.decoding.experience import Experience
from collm.engine.passes import Batch, Waiting, answers, written_on
from collm.engine.queues import Queues
from collm.engine.running import Finished, Running, Sink
from collm.engine.streams import Streams
from collm.errors import CollmError
from collm.types import FinishReason, Step
from collm.values import Extend, LanguageModel, Query, Replies, Reply, WriteOn
from collm.views import Text

_log = logging.getLogger(__name__)


class Scheduler:
    """Flows that share models. What a flow gets does not depend on the others, whose failures cost it nothing.

    Args:
        models: the base first.
        max_num_seqs: texts that run at a time; further ones wait, first come, first served.
        experience: where pass costs are noted, for the pace of speculation and the size of pieces.
        patience: how long a text that waits for an assistant may be kept waiting for others to join it, in passes of
            that assistant; see `whose_turn`. 0 serves assistants at once.
        timeout: seconds after which a pass that has not come back is given up; its texts get a fault.
        post: runs a call in the thread that owns the scheduler: what streaming models deliver comes through it.
        heard: whether something has come up meanwhile, so that nobody should write on by himself any longer. From any
            thread.
        during: entered by the thread of a pass that hands out answers while it runs; None: none may.
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
        post: Callable[[Callable[[], None]], None],
        heard: Callable[[], bool] = lambda: False,
        during: AbstractContextManager[object] | None = None,
    ) -> None:
        self.models, self.max_num_seqs = tuple(models), max_num_seqs
        self.experience = experience or Experience()
        self.timeout = timeout
        self.on_pass: Callable[[int, int], None] | None = None
        """Told the model and the tokens of each pass, in the driver's thread."""
        self.running: dict[int, Running] = {}
        self.waiting: deque[Running] = deque()
        self._clock = clock
        self._queues = Queues(
            self.models,
            experience=self.experience,
            patience=patience,
            timeout=timeout,
            clock=clock,
            take=self._take,
            go_on=self._go_on,
            heard=heard,
            during=during,
        )
        self._streams = Streams(self.models, clock=clock, post=post, take=self._take, go_on=self._advance)

    @property
    def devices(self) -> Collection[Hashable]:
        return self._queues.devices.keys()

    def next_pass(self, device: Hashable) -> Batch | None:
        """The pass that a device is to run, if it is idle and anybody wants one."""
        return self._queues.next_pass(device, len(self.running), bool(self.waiting))

    def finish(self, device: Hashable, batch: Batch, replies: Replies, seconds: float) -> None:
        """A pass is done, or some passes in which texts wrote on: they go on."""
        tokens = (batch.tokens, *written_on(batch, replies))
        if self.on_pass is not None:
            for each in tokens:
                self.on_pass(batch.model, each)
        self._queues.finish(device, batch, replies, seconds, tokens)

    def expire(self) -> None:
        """Give up what has not been answered for too long; what is asked of such a model meanwhile fails at once."""
        if self.timeout is not None:
            self._queues.expire()
            self._streams.expire(self.running.values(), self.timeout)

    def deadline(self) -> float | None:
        """When `expire` is to be called next."""
        if self.timeout is None:
            return None
        since = self._queues.since() + self._streams.since(self.running.values())
        return min(since) + self.timeout if since else None

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
        self._queues.some_ended |= item.left > 0
        self.running.pop(item.number, None)
        self._streams.stop(item)
        try:
            item.flow.close()
        except Exception:  # a flow that does not let go
            _log.warning("a flow failed while it was closed", exc_info=True)
        cached = [0] * len(self.models)
        for number, (model, view) in enumerate(zip(self.models, item.text.views, strict=True)):
            try:
                cached[number] = model.reused(view)
                model.release(view)
            except Exception:
                _log.warning("%s failed to let go of a text", model.name, exc_info=True)
        try:
            item.sink(Finished(reason, item.usage(self._clock(), cached), error))
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
                    if not item.first_token:
                        item.first_token = self._clock() - item.started
                    item.count(event)
                    item.sink(event)
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

    def _ask(self, item: Running, request: Request) -> Replies | None:
        """Queue what a flow asks for; its replies, if they are there at once."""
        if isinstance(request, Extend):
            item.extend, item.extended_from = request, len(request.view.token_ids)
        elif not isinstance(request, More):
            return self._queue(item, request)
        elif item.call is not None:
            item.more = request
            return None
        extend = item.extend
        assert extend is not None, "MORE goes on with an Extend"
        if extend.model in self._streams:
            return self._write_on(item, extend, anew=request is extend)
        view = extend.view
        length = len(view.token_ids)
        more = extend.max_tokens - 1 - (length - item.extended_from)
        leave = None
        if more > 0 and self._queues.writes_on[extend.model]:
            changed = request.passing if isinstance(request, More) else None
            leave = WriteOn(more, extend.until, extend.passing if changed is None else changed())
        query = Query(extend.model, view, length, 1, extend.draw, None, extend.num_top, write_on=leave)
        return self._queue(item, (query,))

    def _queue(self, item: Running, queries: tuple[Query, ...]) -> Replies | None:
        if item.stream is not None:
            self._streams.stop(item)
        item.call = None
        # Whose model went on for others has waited since it stopped for him.
        item.asked, item.stopped = self._clock() if item.stopped is None else item.stopped, None
        item.left, item.replies = len(queries), [[]] if len(queries) == 1 else [[] for _ in queries]
        item.ticket += 1
        if item.remote:
            item.remote = {}
        for place, query in enumerate(queries):
            queue = self._queues.of_model[query.model]
            if queue is not None:
                queue.append(Waiting(item, place, query))
            else:
                self._ask_at_once(item, place, query)
        return None if item.left else item.replies

    def _ask_at_once(self, item: Running, place: int, query: Query) -> None:
        if query.model in self._streams:
            self._streams.query(item, place, query)
            return
        item.forward_passes[query.model] += 1
        [item.replies[place]] = answers(self.models[query.model], [query])
        item.left -= 1

    def _write_on(self, item: Running, extend: Extend, *, anew: bool) -> Replies | None:
        """The next answer of a model that writes on by itself, if it is there."""
        found = None if anew else self._streams.next_answer(item)
        if found is None and (anew or item.stream is None):
            self._streams.stop(item)
            self._streams.extend(item, extend)
        elif found is None:
            item.asked, item.left = self._clock(), 1
        return found

    def _go_on(self, item: Running, replies: list[Reply]) -> None:
        """A text that writes on by itself takes what is there; without replies, its passes have ended."""
        if replies:
            self._advance(item, [replies])
        else:
            self._ask(item, item.more)

    def _take(self, item: Running, place: int, replies: list[Reply]) -> None:
        item.replies[place] = replies
        item.left -= 1
        if not item.left:
            self._advance(item, item.replies)


def lengths_of(text: Text, max_tokens: int) -> tuple[int, ...]:
    """Tokens that each model may have to hold of a text: the last one written is never read."""
    return text.longest(max_tokens)
