"""What users import: a base model and its assistants that write one text together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.data.formatting import Formatter, PromptFormat
from collm.decoding.collaborative import single
from collm.decoding.pace import AdaptivePace
from collm.decoding.text import Transcript, stopping
from collm.engine import Engine, Event, Finished
from collm.errors import CollmError
from collm.llm.assistants import AssistantSource, load_assistants
from collm.llm.methods import Method, make_flow, make_method, require_defined
from collm.llm.prompt import Prompt, TokenPrompt, require_prompt
from collm.llm.writing import Chunk, Writing
from collm.models.adapters import ModelStore
from collm.models.checkpoint import load_base
from collm.models.hub import copy_checkpoint, push_to_hub
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.models.placement import Placement
from collm.models.specs import adapter_config
from collm.sampling_params import SamplingParams
from collm.types import BASE, Generation
from collm.values import LanguageModel
from collm.views import Text

TokenIds = tuple[int, ...]
GREEDY = SamplingParams()


class GenerationFailed(CollmError):
    """A model failed in the middle of a text; `generation` holds what was written until then."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(f"{generation.error} (after {generation.completion_tokens} tokens)")
        self.generation = generation


class CollaborativeLM:
    """A base with a gate, and assistants 1..K, deciding token by token who writes.

    Args:
        models: the base first.
        formatters: how each model is shown its prompts.
        info: the checkpoint's description; its calibration turns deferral rates into thresholds.
        has_gate: whether the base's answers carry a gate.
        path: the checkpoint it was loaded from.
        max_num_seqs: texts that are written at a time, and whose caches are kept; larger batches raise it.
        max_model_len: bounds a text, prompt included, where the contexts of the models are longer.
        timeout: seconds after which a forward pass is given up and its texts end with an error.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        formatters: Sequence[Formatter],
        info: CheckpointInfo | None = None,
        *,
        has_gate: bool = True,
        path: Path | None = None,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        timeout: float | None = None,
    ) -> None:
        assert len(models) == len(formatters) >= 1
        self.models = tuple(models)
        self.formatters = tuple(formatters)
        self.info = info or CheckpointInfo()
        self.has_gate = has_gate
        self.path = path
        self._max_num_seqs, self._max_model_len, self._timeout = max_num_seqs, max_model_len, timeout
        self._engine: Engine | None = None
        self._making = Lock()
        # What ends a turn in a model's template ends its text, whether or not its tokenizer calls that EOS.
        self._eos = tuple(m.eos_token_ids | f.end_ids for m, f in zip(models, formatters, strict=True))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        assistants: Sequence[AssistantSource] = (),
        *,
        base: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        cache: bool = True,
        max_cache_tokens: int | float | None = None,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        timeout: float | None = None,
    ) -> CollaborativeLM:
        """Load a checkpoint and its assistants.

        Args:
            path: a checkpoint, or a plain model, which has no gate and can only defer never, always or at random.
                It, `base` and the assistants may say how they are loaded: `SPEC?device_map=auto&quantization=nf4`
                (`models.placement`).
            assistants: in the order of training, or by name as `"NAME=SPEC"`; a spec, or a `LanguageModel` of one's
                own. Tools that the checkpoint was trained with need not be given.
            base: where the base model lies, for a checkpoint that holds an adapter or a gate alone.
            cache: False recomputes every token from the start: the plain twin, for tests.
            max_cache_tokens: bounds the KV cache of each model (texts at a time x their length), in tokens, or as a
                share below 1 of the memory that is free once it is loaded. Texts wait until there is room; one that
                cannot fit at all is refused. None: as much as is asked for.
            max_num_seqs, max_model_len, timeout: see the class.

        Raises:
            CollmError: an assistant is missing, has another tokenizer, or is one too many.
        """
        model, head, tokenizer, info = load_base(path, base=base, dtype=dtype, device=device)
        formatter = Formatter(tokenizer, PromptFormat(**info.base_format))
        own: dict[str, Any] = {"cache": cache, "max_cache_tokens": max_cache_tokens}
        folder, placement = Placement(dtype, device).of(str(path))
        store = ModelStore()
        # What the base was before training, if it still is that: assistants that are adapters of it share its weights.
        untrained = {"gate": base or info.base_model, "full": None if head else folder}.get(info.kind)
        shared = None
        if untrained is not None and adapter_config(untrained) is None:
            shared = store.put(untrained, model, placement)
        found = load_assistants(assistants, info.assistants, formatter, store=store, dtype=dtype, device=device, **own)
        if head is not None and head.num_assistants != len(found):
            raise CollmError(f"the gate of {path} is for {head.num_assistants} assistants, {len(found)} were given")
        local = LocalModel(
            model,
            tokenizer,
            head,
            name="base",
            cache=cache,
            max_cache_tokens=max_cache_tokens,
            activate=None if shared is None else shared.activate,
        )
        models, formatters = [m for m, _ in found], [f for _, f in found]
        return cls(
            [local, *models],
            [formatter, *formatters],
            info,
            has_gate=head is not None,
            path=Path(folder),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            timeout=timeout,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the checkpoint it was loaded from, calibration included; assistants keep their own places."""
        copy_checkpoint(self._checkpoint(), folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload the checkpoint it was loaded from, with a model card."""
        return push_to_hub(self._checkpoint(), repo_id, private=private, token=token)

    def _checkpoint(self) -> Path:
        if self.path is None:
            raise CollmError("this system was not loaded from a checkpoint; load it with from_pretrained")
        return self.path

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.formatters[BASE].tokenizer

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(model.name for model in self.models)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of some tokens by themselves, special tokens shown."""
        text = self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> Generation:
        """Write one text; see `generate_batch`.

        Raises:
            GenerationFailed: a model failed in the middle.
        """
        [generation] = self.generate_batch([prompt], params, policy=policy, alone=alone)
        if generation.error is not None:
            raise GenerationFailed(generation)
        return generation

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        batch_size: int = 16,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> list[Generation]:
        """Write a text for each prompt, at most `batch_size` at a time. A text does not depend on its batch-mates.

        A text whose model fails in the middle ends there, with `finish_reason` and `error` telling; the others go on.

        Args:
            params: for all, or one for each prompt.
            policy: who writes, instead of what `params` says: a policy, or another way of decoding.
            alone: name or number of the only model to be used, the base being 0: the baselines.

        Raises:
            CollmError: a prompt is longer than the context of a model; the checkpoint has no gate or no calibration
                for what `params` asks.
        """
        done = dict(self.generate_each(prompts, params, batch_size, policy=policy, alone=alone))
        return [done[i] for i in range(len(prompts))]

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        batch_size: int = 16,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> Iterator[tuple[int, Generation]]:
        """As `generate_batch`, each text with its number as soon as it is finished."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise CollmError("generate_batch takes a list of prompts; for a single one there is generate")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise CollmError(
                f"{len(prompts)} prompts but {len(each)} sampling params; give one for each, or one for all"
            )
        ids = [self._prompt_ids(prompt, i) for i, prompt in enumerate(prompts)]
        # The same prompt under the same settings again is another sample.
        again = Counter[tuple[object, SamplingParams]]()
        writings = []
        for i, (own, asked) in enumerate(zip(ids, each, strict=True)):
            number = again[own, asked]
            again[own, asked] += 1
            numbered = replace(asked, sample=asked.sample + number) if number else asked
            writings.append((i, self._writing(own, numbered, policy, alone)))
        return self._finished(writings, min(batch_size, len(prompts)))

    def _finished(self, writings: Sequence[tuple[int, Writing]], at_a_time: int) -> Iterator[tuple[int, Generation]]:
        engine = self._engine_for(at_a_time)
        done: SimpleQueue[tuple[int, Writing]] = SimpleQueue()
        waiting, running = iter(writings), set[int]()
        try:
            for _ in writings:
                for i, writing in islice(waiting, max(1, at_a_time) - len(running)):
                    running.add(writing.start(engine, partial(_when_finished, done, (i, writing))))
                i, writing = done.get()
                running.discard(writing.number)
                yield i, writing.generation()
        finally:
            for number in running:
                engine.cancel(number)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> Iterator[Chunk]:
        """As `generate`, token by token; the last chunk carries the same `Generation`."""
        engine, writing = self._engine_for(1), self._writing(self._prompt_ids(prompt, 0), params, policy, alone)
        events: SimpleQueue[Event] = SimpleQueue()
        writing.start(engine, events.put)
        try:
            last = False
            while not last:
                chunk = writing.chunk(events.get())
                last = chunk.generation is not None
                yield chunk
        finally:
            engine.cancel(writing.number)

    async def astream(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> AsyncIterator[Chunk]:
        """As `stream`, for asyncio. The text is cancelled where the iterator is closed, or its task cancelled."""
        engine, writing = self._engine_for(1), self._writing(self._prompt_ids(prompt, 0), params, policy, alone)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        writing.start(engine, partial(_tell_loop, loop, events))
        try:
            last = False
            while not last:
                chunk = writing.chunk(await events.get())
                last = chunk.generation is not None
                yield chunk
        finally:
            engine.cancel(writing.number)

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> Generation:
        """As `generate`, for asyncio.

        Raises:
            GenerationFailed: a model failed in the middle.
        """
        engine, writing = self._engine_for(1), self._writing(self._prompt_ids(prompt, 0), params, policy, alone)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def told(event: Event) -> None:
            if isinstance(event, Finished):
                loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(None))

        writing.start(engine, told)
        try:
            await done
        finally:
            engine.cancel(writing.number)
        generation = writing.generation()
        if generation.error is not None:
            raise GenerationFailed(generation)
        return generation

    @property
    def engine(self) -> Engine:
        """What all callers share; it lives as long as this system."""
        return self._engine_for(1)

    def close(self) -> None:
        """End what is being written and stop the engine's threads. Nothing can be written afterwards."""
        self._engine_for(1).close()

    def _engine_for(self, num_texts: int) -> Engine:
        with self._making:
            if self._engine is None:
                self._engine = Engine(self.models, max_num_seqs=self._max_num_seqs, timeout=self._timeout)
                self._reserve(self._max_num_seqs)
            if num_texts > self._max_num_seqs:
                self._max_num_seqs = num_texts
                self._reserve(num_texts)
                self._engine.grow(num_texts)
            return self._engine

    def _reserve(self, num_texts: int) -> None:
        for model in self.models:
            if isinstance(model, LocalModel):
                model.reserve(num_texts)

    def _prompt_ids(self, prompt: Prompt, number: int) -> tuple[TokenIds, ...]:
        """The prompt as each model sees it."""
        require_prompt(prompt, self.formatters)
        if not isinstance(prompt, TokenPrompt):
            ids = tuple(formatter.prompt(prompt) for formatter in self.formatters)
        elif len(prompt.token_ids) == len(self.models):
            ids = prompt.token_ids
        else:
            raise CollmError(f"prompt {number + 1} is given for {len(prompt.token_ids)} of {len(self.models)} models")
        for z, (model, own) in enumerate(zip(self.models, ids, strict=True)):
            context = self.context_lengths[z]
            if context is not None and len(own) > context:
                raise CollmError(
                    f"prompt {number + 1} has {len(own)} tokens, more than the context of {context} tokens of "
                    f"{model.name}; shorten it"
                )
        return ids

    def _writing(
        self, ids: tuple[TokenIds, ...], params: SamplingParams, policy: Method | None, alone: int | str | None
    ) -> Writing:
        """A text that is ready to be written."""
        # A text that reaches the end of a context ends there ("length"), instead of failing with its batch.
        room = [
            context - len(own) + 1
            for own, context in zip(ids, self.context_lengths, strict=True)
            if context is not None
        ]
        own = replace(params, max_tokens=min([params.max_tokens, *room]))
        text = Text(ids)
        self.engine.require_room(text, own.max_tokens)
        eos = tuple(ends | frozenset(params.stop_token_ids) for ends in self._eos)
        if alone is not None:
            flow = single(self._number(alone), text, own, eos)
        else:
            found = policy or make_method(params, self.models, self.tokenizer, self.has_gate, self.info.calibration)
            require_defined(found, params, self.models, self.has_gate)
            flow = make_flow(found, text, own, eos, AdaptivePace(self.engine.experience))
        transcript = Transcript(self.tokenizer, ids[BASE], params.stop, eos)
        if params.stop:
            flow = stopping(flow, transcript)
        return Writing(flow, text, own.max_tokens, transcript, self.model_names)

    @property
    def context_lengths(self) -> tuple[int | None, ...]:
        """Tokens that a text may come to for each model; None: no bound."""
        bounds = [(model.context_length, self._max_model_len) for model in self.models]
        return tuple(min((each for each in bound if each is not None), default=None) for bound in bounds)

    def _number(self, model: int | str) -> int:
        if isinstance(model, int) and 0 <= model < len(self.models):
            return model
        if model in self.model_names:
            return self.model_names.index(str(model))
        raise CollmError(f"there is no model {model!r}; the models are {', '.join(self.model_names)}")


def _when_finished(done: SimpleQueue[tuple[int, Writing]], end: tuple[int, Writing], event: Event) -> None:
    if isinstance(event, Finished):
        done.put(end)


def _tell_loop(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)
