"""Who waits for which model, and the passes that serve them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial

from collm.decoding.experience import Experience
from collm.engine.passes import Batch, Waiting, plan_pass
from collm.engine.running import Running
from collm.engine.turns import ON_THEIR_OWN, TOLD, Device, Turn, dear_seconds, whose_turn
from collm.types import BASE
from collm.values import Chosen, Fault, Foreseen, LanguageModel, Query, Replies, Reply, StreamingModel

_log = logging.getLogger(__name__)


class Queues:
    """A queue for each model that answers in passes; models of one device take turns.

    Args:
        patience, timeout: see `Scheduler`.
        take: what becomes of the answers to a query: the text, the query's place, its answers.
        go_on: what becomes of those that are found while the text writes on by itself; of none, once it does no longer.
        heard, during: see `Scheduler`.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        *,
        experience: Experience,
        patience: float,
        timeout: float | None,
        clock: Callable[[], float],
        take: Callable[[Running, int, list[Reply]], None],
        go_on: Callable[[Running, list[Reply]], None],
        heard: Callable[[], bool],
        during: AbstractContextManager[object] | None,
    ) -> None:
        for number, model in enumerate(models):
            experience.expect(number, model.pass_curve)
        self.devices: dict[Hashable, Device] = {}
        self.of_model: list[list[Waiting] | None] = []
        """None for models that are asked at once."""
        for number, model in enumerate(models):
            in_passes = not (model.instant or isinstance(model, StreamingModel))
            self.of_model.append([] if in_passes else None)
            if in_passes:
                self.devices.setdefault(model.device, Device()).models.append(number)
        beside = next((device.models for device in self.devices.values() if BASE in device.models), [])
        experience.share_device(number for number in beside if number != BASE)
        self.some_ended = False
        """A text that may stand in a queue has ended."""
        self._models, self._experience = models, experience
        self.writes_on = [model.writes_on for model in models]
        self._before_base = {number for number in beside if number != BASE and self.writes_on[number]}
        """Those behind whose passes the base may begin before it is asked."""
        if during is None or not self.writes_on[BASE]:
            self._before_base.clear()
        self._patience, self._timeout = patience, timeout
        self._clock, self._take, self._go_on, self._heard, self._during = clock, take, go_on, heard, during

    def next_pass(self, key: Hashable, num_running: int, more_wait: bool) -> Batch | None:
        """The pass that a device is to run, if it is idle and anybody wants one; of `num_running` texts, while others
        (`more_wait`) wait for one of them to end."""
        device = self.devices[key]
        if device.batch is not None:
            return None
        if self.some_ended:
            self.some_ended = False
            self.of_model = [queue and [each for each in queue if not each.item.done] for queue in self.of_model]
        while wanted := {number: queue for number in device.models if (queue := self.of_model[number])}:
            now = self._clock()
            number = next(iter(wanted))
            try:
                if len(wanted) > 1:
                    dear = partial(dear_seconds, experience=self._experience)
                    number = whose_turn(wanted, device.served, dear, now, self._patience)
                others = num_running - len(wanted[number])
                batch = plan_pass(number, self._models[number], wanted[number], others, self._experience, self._timeout)
            except Exception as error:  # what a model says of itself
                _log.warning("%s failed", self._models[number].name, exc_info=True)
                self._fail(number, f"{self._models[number].name}: {type(error).__name__}: {error}")
                continue
            self.of_model[number] = batch.left
            batch.started = now
            if self.writes_on[number] and all(query.write_on is not None for query in batch.queries):
                batch.keep_on = self._turn(batch, device, wanted, more_wait)
                batch.tell = None if self._during is None else partial(self._tell, batch, self._during)
            elif number != BASE and len(wanted) == 1 + (BASE in wanted) and not batch.left:
                batch.chosen = self._chosen(number, more_wait)
            device.begins(batch)
            return batch
        return None

    def _chosen(self, number: int, more_wait: bool) -> Chosen | None:
        """Who is told what an assistant chooses: the base of the same device, whose turn probably comes next."""
        during = self._during
        if during is None or number not in self._before_base:
            return None
        return partial(self._foresee, self._models[BASE], more_wait, during)

    def _foresee(
        self,
        base: LanguageModel,
        more_wait: bool,
        during: AbstractContextManager[object],
        found: list[tuple[Query, Sequence[int]]],
    ) -> None:
        """Let the base begin with what it will be asked while the answers are put together from which that follows."""
        try:
            with during:
                coming = self._coming(found, more_wait)
            if coming:
                base.foresee(coming)
        except Exception:  # whatever it is, the answers are there, and whoever asks the base next is told
            _log.warning("%s could not begin early, and will not any more", base.name, exc_info=True)
            self._before_base.clear()

    def _coming(self, found: list[tuple[Query, Sequence[int]]], more_wait: bool) -> list[Foreseen]:
        """What the base's next pass will be of, if all of it can be told."""
        coming: list[Foreseen] = []
        for query, tokens in found:
            if query.then is not None:
                then = query.then(tokens)
                if then is not None:
                    coming.append(then)
                elif more_wait:
                    return []  # the prompt of one that waits is read with the next pass
            elif query.write_on is None:
                return []  # nobody knows what it will ask
        for item, _, query, _ in self.of_model[BASE] or ():
            if query.write_on is None or query.num_top:
                return []  # not a pass in which all go on
            if not item.done:
                last = query.length - 1
                coming.append(Foreseen(query.view, last, query.view.token_ids[last], query.draw))
        return coming

    def _turn(self, batch: Batch, device: Device, wanted: Mapping[int, Sequence[Waiting]], more_wait: bool) -> Turn:
        """How long texts may write on in a pass that begins now."""
        number = batch.model
        others = [each.item.asked for model, queue in wanted.items() if model != number for each in queue]
        dear = 0.0
        if number == BASE and not more_wait and len(device.models) == len(self._models):
            dear = min([dear_seconds(n, self._experience) for n in device.models if n != BASE], default=0.0)
        may_defer = any(query.write_on is None or query.write_on.until is not None for query in batch.queries)
        # Who waits for the place of a text that ends is not heard.
        longest = ON_THEIR_OWN if may_defer or more_wait or self._during is None else TOLD
        return Turn(self._clock, batch.started, others, dear, self._patience, self._heard, longest)

    def _tell(self, batch: Batch, during: AbstractContextManager[object], found: list[tuple[int, list[Reply]]]) -> None:
        """Hand out answers of passes that run. A text that has asked for something else since gets no more of them."""
        with during:
            for at, replies in found:
                item = batch.waiting[at].item
                if batch.expired or item.done or (batch.told[at] and item.call is not batch):
                    continue
                batch.told[at] += len(replies)
                item.forward_passes[batch.model] += len(replies)
                item.call = batch
                self._go_on(item, replies)

    def _fail(self, number: int, reason: str) -> None:
        """Faults for all who wait for a model."""
        waiting, self.of_model[number] = self.of_model[number] or (), []
        for item, place, query, _ in waiting:
            if not item.done:
                self._take(item, place, [Fault(reason)] * max(1, query.num_last))

    def finish(self, key: Hashable, batch: Batch, replies: Replies, seconds: float, tokens: Sequence[int]) -> None:
        """A pass is done, or some passes of so many `tokens` each: its texts go on."""
        device, number = self.devices[key], batch.model
        assert device.batch is batch
        device.batch = None
        if batch.expired:
            return
        each = seconds / len(tokens)
        if batch.reading:
            self._experience.observe_reading(number, batch.decoding, batch.reading, seconds)
        else:
            self._experience.observe_pass(number, len(batch.queries), sum(tokens) / len(tokens), each, len(tokens))
        unfinished = []
        for (item, place, query, _), asked, reply, is_piece, before in zip(
            batch.waiting, batch.queries, replies, batch.unfinished, batch.told, strict=True
        ):
            if item.done or (before and item.call is not batch):
                continue
            item.call = None
            passes = 1
            if batch.keep_on is not None:
                passes += len(reply) - query.num_last
                item.stopped = batch.started + each * passes
            item.forward_passes[number] += passes - before
            if before:
                self._go_on(item, reply[before:])
            elif not is_piece:
                self._take(item, place, reply)
            elif any(isinstance(each, Fault) for each in reply):
                self._take(item, place, reply[:1] * max(1, query.num_last))
            else:
                unfinished.append(Waiting(item, place, query, query.length - asked.length))
        if unfinished:
            self.of_model[number] = unfinished + (self.of_model[number] or [])
        if any(batch.unfinished) or batch.left:
            # A piece is read so that others have their turn before the next.
            now = self._clock()
            for waiting in self.of_model[number] or ():
                waiting.item.asked = now

    def expire(self) -> None:
        """Give up passes that have run for too long; what is asked of such a model meanwhile fails at once."""
        timeout, now = self._timeout, self._clock()
        assert timeout is not None
        for device in self.devices.values():
            batch = device.batch
            if batch is None or now - batch.started < timeout:
                continue
            if not batch.expired:
                batch.expired = True
                self.of_model[batch.model] = [*batch.waiting, *(self.of_model[batch.model] or ())]
            for number in device.models:
                self._fail(number, f"{self._models[number].name} has not answered within {timeout:g} seconds")

    def since(self) -> list[float]:
        """When the passes began that `expire` may have to give up; long ago where it has something to do now."""
        found: list[float] = []
        for device in self.devices.values():
            if device.batch is None:
                continue
            if not device.batch.expired:
                found.append(device.batch.started)
            elif any(self.of_model[number] for number in device.models):
                found.append(-math.inf)
        return found
