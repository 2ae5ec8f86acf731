"""The one engine of a system: made when it is first needed, and shared by all callers."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock

from collm.engine import Engine
from collm.engine.engine import CLOSED
from collm.errors import CollmError
from collm.models.local import LocalModel
from collm.values import LanguageModel


class SharedEngine:
    """It lives as long as the system; see `CollaborativeLM` for the arguments."""

    def __init__(self, models: Sequence[LanguageModel], max_num_seqs: int, timeout: float | None) -> None:
        self._models, self._max_num_seqs, self._timeout = models, max_num_seqs, timeout
        self._engine: Engine | None = None
        self._making = Lock()
        self._closed = False

    def ready(self, num_texts: int = 1) -> Engine:
        """The engine, ready to write so many texts at a time. From any thread.

        Raises:
            CollmError: it was closed before it was made.
        """
        with self._making:
            if self._engine is None:
                if self._closed:
                    raise CollmError(CLOSED)
                self.warm_up()  # the engine wants to know what passes cost
                self._engine = Engine(self._models, max_num_seqs=self._max_num_seqs, timeout=self._timeout)
            if num_texts > self._max_num_seqs:
                self._max_num_seqs = num_texts
                self._reserve(num_texts)
                self._engine.grow(num_texts)
            return self._engine

    def close(self) -> None:
        """See `CollaborativeLM.close`. An engine that nobody has needed is not made for it."""
        with self._making:
            self._closed = True
            engine = self._engine
        if engine is not None:
            engine.close()

    def warm_up(self) -> float:
        """See `CollaborativeLM.warm_up`."""
        self._reserve(self._max_num_seqs)
        return sum(model.warm_up() for model in self._models if isinstance(model, LocalModel))

    def _reserve(self, num_texts: int) -> None:
        for model in self._models:
            if isinstance(model, LocalModel):
                model.reserve(num_texts)
