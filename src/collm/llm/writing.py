"""One text that is written for a caller: from the engine's events to chunks and a `Generation`."""

from __future__ import annotations

from dataclasses import dataclass

from collm.decoding.collaborative import Flow
from collm.decoding.text import Piece, Transcript
from collm.engine import Engine, Event, Finished, Sink
from collm.errors import CollmError
from collm.types import Generation, Step
from collm.views import Text

CLOSED = "the system was closed while this text was written"


class GenerationFailed(CollmError):
    """A text did not come to its end: a model failed, or the system was closed. `generation` is what was written."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(f"{generation.error} (after {generation.completion_tokens} tokens)")
        self.generation = generation


@dataclass(frozen=True, slots=True)
class Chunk:
    """What `stream` yields: a written token and the text that has become certain with it.

    `text` lags behind `step` where a character or a possible stop string is not complete; joined over all chunks it
    is `Generation.text`. `piece` is the token's own text, special tokens shown (empty while its character is not
    complete). `brought` is what the token adds to the text: nothing if it is a special one, and of what stands behind
    a stop string all. The last chunk has no step but the whole `generation`.
    """

    text: str
    piece: str
    step: Step | None = None
    generation: Generation | None = None
    brought: str = ""


class Writing:
    """A text, its flow, and what has been written of it. `prompt_tokens`: as the base sees it, or who writes alone."""

    def __init__(
        self,
        flow: Flow,
        text: Text,
        max_tokens: int,
        transcript: Transcript,
        model_names: tuple[str, ...],
        prompt_tokens: int,
    ) -> None:
        self._flow, self._text, self._max_tokens = flow, text, max_tokens
        self._transcript, self._model_names = transcript, model_names
        self._prompt_tokens = prompt_tokens
        self.steps: list[Step] = []
        self.finished: Finished | None = None
        self.number = -1
        self._told = 0

    def start(self, engine: Engine, sink: Sink) -> int:
        """Hand it to the engine; `sink` is told each event after it has been noted here."""

        def noted(event: Event) -> None:
            if isinstance(event, Step):
                self.steps.append(event)
            else:
                self.finished = event
            sink(event)

        self.number = engine.submit(self._flow, self._text, self._max_tokens, noted)
        return self.number

    def chunk(self, event: Event) -> Chunk:
        """What one event brings to a reader, who takes them in order.

        Raises:
            GenerationFailed: the system was closed meanwhile.
        """
        if isinstance(event, Step):
            brought = self._transcript.at(self._told, event)
            self._told += 1
            return Chunk(brought.text, brought.piece, event, None, brought.brought)
        generation, last = self._end()
        return Chunk(last.text, last.piece, None, generation, last.brought)

    def generation(self) -> Generation:
        """The finished text.

        Raises:
            GenerationFailed: the system was closed meanwhile.
        """
        return self._end()[0]

    def _end(self) -> tuple[Generation, Piece]:
        assert self.finished is not None
        for number in range(self._told, len(self.steps)):
            self._transcript.at(number, self.steps[number])
        last, text, pieces = self._transcript.finish()
        # Whoever reads cancels no earlier than when nobody reads on.
        closed = self.finished.finish_reason == "cancelled"
        generation = Generation(
            text=text,
            steps=tuple(self.steps),
            pieces=pieces,
            finish_reason=self.finished.finish_reason,
            prompt_tokens=self._prompt_tokens,
            model_names=self._model_names,
            usage=self.finished.usage,
            error=CLOSED if closed else self.finished.error,
        )
        if closed:
            raise GenerationFailed(generation)
        return generation, last


def whole(generation: Generation) -> Generation:
    """A text as it is, unless a model failed in the middle.

    Raises:
        GenerationFailed: it did.
    """
    if generation.error is not None:
        raise GenerationFailed(generation)
    return generation
