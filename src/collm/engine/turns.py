"""Whose turn it is on a device that several models share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from collm.decoding.experience import Experience
from collm.engine.passes import Batch, Waiting
from collm.types import BASE


@dataclass(slots=True, eq=False)
class Device:
    """The `models` (numbers) whose passes take turns, and the one that runs.

    `served`: the assistants that have had a pass since the base had one.
    """

    models: list[int] = field(default_factory=list)
    batch: Batch | None = None
    served: set[int] = field(default_factory=set)

    def begins(self, batch: Batch) -> None:
        self.batch = batch
        if batch.model == BASE:
            self.served.clear()
        else:
            self.served.add(batch.model)


def whose_turn(
    wanted: Mapping[int, Sequence[Waiting]],
    served: set[int],
    dear: Callable[[int], float],
    now: float,
    patience: float,
) -> int:
    """Which of the models that are `wanted` has its turn: an assistant, or else the base.

    A pass of an assistant that serves one text costs about as much as one that serves all. So, where it takes turns
    with the base, it is asked once the texts that wait for it have together waited as long as its pass would delay
    those that want the base, or once the first of them has waited for the time of `patience` passes (as in the
    ski-rental problem, that costs it at most twice the time); and at once where it is no dearer than the base, or
    nobody wants the base. An assistant that has been `served` since the base was comes after texts that have wanted the
    base for longer, so that nobody is kept waiting by those who want it again and again.

    Args:
        wanted: those who wait, by model.
        dear: seconds of an assistant's next pass, 0 where it is no dearer than the base.
    """
    since = {number: min([each.item.asked for each in queue]) for number, queue in wanted.items()}
    assistants = sorted((number for number in wanted if number != BASE), key=since.__getitem__)
    if BASE not in wanted:
        return assistants[0]
    for number in assistants:
        if number in served and since[BASE] <= since[number]:
            continue
        if not patience:
            return number
        seconds = dear(number)
        waited = [now - each.item.asked for each in wanted[number]]
        if sum(waited) >= len(wanted[BASE]) * seconds or max(waited) >= patience * seconds:
            return number
    return BASE


ON_THEIR_OWN = 0.025
"""Seconds for which texts write on by themselves at most, so that readers see a steady stream, and that nobody who
comes waits."""
TOLD = 0.1
"""The same of texts that never defer, where each answer is handed out while the next pass runs and whoever comes is
heard: a call costs the host as much as ten of its passes. Other engines that use the same network wait for its end."""


class Turn:
    """How long a model may write on by itself (`KeepOn`): as long as it would get its turn again (`whose_turn`), if
    nothing has come up (`heard`).

    Args:
        now: when its turn began.
        asked: since when those wait that want another model of this device.
        dear: as in `whose_turn`; 0 also where it would be better not to wait for other reasons.
        longest: seconds at most, whoever waits.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        now: float,
        asked: Sequence[float],
        dear: float,
        patience: float,
        heard: Callable[[], bool],
        longest: float,
    ) -> None:
        self._clock, self._until, self._heard = clock, now + longest, heard
        self._last, self._first = now, min(asked, default=now)
        self._others = self._waiting = len(asked)
        self._waited = sum([now - each for each in asked])
        self._dear, self._longest = dear, patience * dear

    def __call__(self, going: int, stopped: int) -> bool:
        now = self._clock()
        if not going or now >= self._until or self._heard():
            return False
        self._waited += self._waiting * (now - self._last)
        if not self._waiting:
            self._first = now
        self._last, self._waiting = now, self._others + stopped
        return not self._waiting or (self._waited < going * self._dear and now - self._first < self._longest)


def dear_seconds(number: int, experience: Experience) -> float:
    """Seconds of an assistant's pass as they have been lately if it is known to be dearer than one of the base, else 0.

    Not of the tokens that wait to be read: those cost the same whenever they are, and nobody shares that.
    """
    if not experience.knows(number):
        return 0.0
    seconds = experience.costs[number].usual(1)
    return seconds if seconds > 1.5 * experience.costs[BASE].pass_seconds(1) else 0.0
