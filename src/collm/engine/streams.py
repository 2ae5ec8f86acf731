"""What streaming models are asked, and what becomes of it: they serve many requests at a time, and write on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from collm.engine.running import Asked, Running, Stream
from collm.values import Extend, Fault, LanguageModel, Query, Replies, Reply, StreamingModel

_log = logging.getLogger(__name__)


class Streams:
    """The requests of a scheduler's texts to streaming models.

    Args:
        take: what becomes of the answers to a query of a text: the text, the query's place, its answers.
        go_on: what becomes of the next answer of an `Extend` that a text waits for.
        post: runs a call in the thread that owns the scheduler; models deliver from any.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        clock: Callable[[], float],
        post: Callable[[Callable[[], None]], None],
        take: Callable[[Running, int, list[Reply]], None],
        go_on: Callable[[Running, Replies], None],
    ) -> None:
        self._models = {n: model for n, model in enumerate(models) if isinstance(model, StreamingModel)}
        self._clock, self._post, self._take, self._go_on = clock, post, take, go_on

    def __bool__(self) -> bool:
        return bool(self._models)

    def __contains__(self, model: int) -> bool:
        return model in self._models

    def query(self, item: Running, place: int, query: Query) -> None:
        """Ask for the `place`-th of what a text waits for."""
        ticket, model = item.ticket, self._models[query.model]
        asked = item.remote[place] = Asked(query.num_last)
        item.forward_passes[query.model] += 1

        def deliver(replies: list[Reply] | None) -> None:
            def take() -> None:
                if not item.done and item.ticket == ticket and item.remote.pop(place, None) is not None:
                    self._take(item, place, replies or [Fault(f"{model.name} gave no answer")] * query.num_last)

            self._post(take)

        asked.cancel = self._guarded(item, lambda: model.start(query, deliver), deliver)

    def extend(self, item: Running, extend: Extend) -> None:
        """Let a model write on by itself; the text waits for its first answer."""
        stream = item.stream = Stream()
        item.forward_passes[extend.model] += 1
        item.asked, item.left, item.replies = self._clock(), 1, [[]]

        def deliver(replies: list[Reply] | None) -> None:
            def take() -> None:
                if item.done or item.stream is not stream:
                    return
                if replies is None:
                    stream.ended = True
                else:
                    stream.ready.extend([reply] for reply in replies)
                if item.left and not item.advancing:
                    self._wake(item)

            self._post(take)

        written = len(extend.view) - item.extended_from
        request = extend._replace(max_tokens=max(1, extend.max_tokens - written))
        start = self._models[extend.model].start
        stream.cancel = self._guarded(item, lambda: start(request, deliver), deliver)

    def next_answer(self, item: Running) -> Replies | None:
        """The next answer of the extension that runs, if it is there; one that has ended is forgotten."""
        stream = item.stream
        if stream is not None and stream.ready:
            item.left = 0
            return [stream.ready.popleft()]
        if stream is not None and stream.ended:
            item.stream = None
        return None

    def _wake(self, item: Running) -> None:
        found = self.next_answer(item)
        if found is not None:
            self._go_on(item, found)
        elif item.stream is None:
            # It ended before it said what its flow waits for: this one answer is asked for by itself.
            extend = item.extend
            assert extend is not None
            length = len(extend.view.token_ids)
            item.asked, item.remote = self._clock(), {}
            item.ticket += 1
            self.query(item, 0, Query(extend.model, extend.view, length, 1, extend.draw, None, extend.num_top))

    def stop(self, item: Running) -> None:
        """Cancel what is being written or answered for a text."""
        stream, item.stream = item.stream, None
        if stream is not None and not stream.ended:
            self._cancel(stream.cancel)
        asked, item.remote = item.remote, {}
        for each in asked.values():
            self._cancel(each.cancel)

    def _cancel(self, cancel: Callable[[], None] | None) -> None:
        try:
            if cancel is not None:
                cancel()
        except Exception:
            _log.exception("a request could not be cancelled")

    def since(self, running: Iterable[Running]) -> list[float]:
        """When what texts wait for was asked."""
        return [item.asked for item in running if _waits(item)] if self._models else []

    def expire(self, running: Iterable[Running], timeout: float) -> None:
        """Faults in place of what has not been answered in time."""
        if not self._models:
            return
        now = self._clock()
        for item in [each for each in running if _waits(each)]:
            if now - item.asked >= timeout and not item.done:
                self._give_up(item, timeout)

    def _give_up(self, item: Running, timeout: float) -> None:
        if item.stream is not None:
            assert item.extend is not None
            name = self._models[item.extend.model].name
            self.stop(item)
            item.left = 0
            self._go_on(item, [[Fault(f"{name} has not answered within {timeout:g} seconds")]])
            return
        names = ", ".join(model.name for model in self._models.values())
        late = dict(item.remote)
        self.stop(item)
        for place, asked in late.items():
            self._take(item, place, [Fault(f"{names}: no answer within {timeout:g} seconds")] * asked.num_last)

    def _guarded(
        self, item: Running, start: Callable[[], Callable[[], None]], deliver: Callable[[list[Reply] | None], None]
    ) -> Callable[[], None] | None:
        try:
            return start()
        except Exception as error:
            _log.exception("text %d: a request failed", item.number)
            deliver([Fault(f"{type(error).__name__}: {error}")])
            return None


def _waits(item: Running) -> bool:
    return item.left > 0 and (item.stream is not None or bool(item.remote))
