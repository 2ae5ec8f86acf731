"""From prompts and settings to texts that are ready to be written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from collm.decoding.collaborative import single
from collm.decoding.pace import AdaptivePace
from collm.decoding.text import Transcript, stopping
from collm.errors import CollmError
from collm.llm.deferral import settled
from collm.llm.methods import Method, make_flow, make_method, require_defined
from collm.llm.prompt import TokenIds
from collm.llm.shared_engine import SharedEngine
from collm.llm.sharing import Sharing
from collm.llm.writing import Writing
from collm.models.info import CheckpointInfo
from collm.models.tokenizers import QuickDecoder
from collm.sampling_params import SamplingParams
from collm.types import BASE
from collm.values import LanguageModel, StreamingModel
from collm.views import Text


@dataclass(frozen=True)
class Preparation:
    """Of texts by the models of a system, the base first.

    `tokenizer`: the base's. `eos`: of each model what ends a text. The others: see `CollaborativeLM`.
    """

    models: tuple[LanguageModel, ...]
    tokenizer: PreTrainedTokenizerBase
    eos: tuple[frozenset[int], ...]
    has_gate: bool
    sharing: Sharing | None
    max_model_len: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    @property
    def context_lengths(self) -> tuple[int | None, ...]:
        """Tokens that a text may come to for each model; None: no bound."""
        bounds = [(model.context_length, self.max_model_len) for model in self.models]
        return tuple(min((each for each in bound if each is not None), default=None) for bound in bounds)

    def contexts(self, alone: int | str | None) -> tuple[int | None, ...]:
        """As `context_lengths`, of the models that are to read a text: none but the one that is to write it `alone`."""
        number = None if alone is None else self.number(alone)
        return tuple(bound if number in (None, n) else None for n, bound in enumerate(self.context_lengths))

    def writing(
        self,
        shared: SharedEngine,
        ids: tuple[TokenIds, ...],
        params: SamplingParams,
        info: CheckpointInfo,
        policy: Method | None,
        alone: int | str | None,
        *,
        ahead: bool = False,
    ) -> Writing:
        """A text that is ready to be written.

        Args:
            shared: whose engine it will be handed to. It is not made for what is refused, but for a text that fits no
                cache, which it alone can tell.
            ids: its prompt, for each model.
            info: of the checkpoint, which says what `params` leave open.
            policy, alone: see `CollaborativeLM.generate_batch`.
            ahead: nobody reads along, so that steps may be held back.

        Raises:
            CollmError: what is asked needs what is not there, or the text can never fit into the caches.
        """
        sole = None if alone is None else self.number(alone)
        number = BASE if sole is None else sole
        # A text that reaches the end of a context ends there ("length"), instead of failing with its batch.
        bounds = list(zip(ids, self.contexts(sole), strict=True))
        if self.sharing is not None and alone is None:
            del bounds[1:]  # an assistant's tokens are not the base's: its own context is watched
        room = [context - len(own) + 1 for own, context in bounds if context is not None]
        own = replace(params, max_tokens=min([params.max_tokens, *room]))
        found = None
        if alone is None:
            params = settled(params, info.chosen)
            found = policy or make_method(params, self.models, self.tokenizer, self.has_gate, info.calibration)
            require_defined(found, params, self.models, self.has_gate)
            if self.sharing is not None:
                self.sharing.require_defined(found, own)
        eos = tuple(ends | frozenset(params.stop_token_ids) for ends in self.eos)
        if self.sharing is None or found is None:
            text = Text(ids, sole)
        else:
            text = self.sharing.text(ids, self.context_lengths)
        engine = shared.ready()
        engine.require_room(text, own.max_tokens)
        if self.sharing is not None:
            # A server reads a text again for each answer about it: two at a time would save nothing.
            ahead = ahead and not any(isinstance(model, StreamingModel) for model in self.models)
            flow, transcript = self.sharing.writing(text, own, found, number, ahead=ahead)
        else:
            if found is None:
                flow = single(number, text, own, eos)
            else:
                flow = make_flow(found, text, own, eos, AdaptivePace(engine.experience), self.models[BASE])
            transcript = Transcript.of_tokens(self._decoder, ids[BASE], params.stop, eos)
        if params.stop:
            flow = stopping(flow, transcript)
        return Writing(flow, text, own.max_tokens, transcript, self.names, len(ids[number]))

    @cached_property
    def _decoder(self) -> QuickDecoder:
        return QuickDecoder(self.tokenizer)

    def number(self, model: int | str) -> int:
        """Of a model.

        Raises:
            CollmError: there is no such one.
        """
        if isinstance(model, int) and 0 <= model < len(self.models):
            return model
        if model in self.names:
            return self.names.index(str(model))
        raise CollmError(f"there is no model {model!r}; the models are {', '.join(self.names)}")
