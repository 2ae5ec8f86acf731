"""What users import: a base model and its assistants that write one text together."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Unpack

import torch
from transformers import PreTrainedTokenizerBase

from collm.data.formatting import Formatter
from collm.engine import Engine
from collm.errors import CollmError
from collm.llm.asking import Settings, asked, asked_each
from collm.llm.assistants import Assistants
from collm.llm.loading import load
from collm.llm.methods import Method
from collm.llm.preparing import Preparation
from collm.llm.prompt import Prompt, TokenIds, prompt_ids
from collm.llm.reading import achunks, chunks, finished, merged
from collm.llm.samples import numbered
from collm.llm.shared_engine import SharedEngine
from collm.llm.sharing import Sharing
from collm.llm.writing import Chunk, Writing, whole
from collm.models.hub import copy_checkpoint, push_to_hub
from collm.models.info import CheckpointInfo
from collm.models.placement import dtype_name
from collm.sampling_params import SamplingParams
from collm.types import BASE, Generation
from collm.values import LanguageModel

GREEDY = SamplingParams()


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
        sharing: how models with different tokenizers share a text (`share`); None: they have one.
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
        sharing: Sharing | None = None,
    ) -> None:
        assert len(models) == len(formatters) >= 1
        self.formatters = tuple(formatters)
        self.info = info or CheckpointInfo()
        self.path = path
        # What ends a turn in a model's template ends its text, whether or not its tokenizer calls that EOS.
        eos = tuple(m.eos_token_ids | f.end_ids for m, f in zip(models, formatters, strict=True))
        self._preparation = Preparation(tuple(models), self.tokenizer, eos, has_gate, sharing, max_model_len)
        self._engine = SharedEngine(self.models, max_num_seqs, timeout)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        assistants: Assistants = (),
        *,
        base: str | Path | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        cache: bool = True,
        max_cache_tokens: int | float | None = None,
        compiled: bool = False,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        timeout: float | None = None,
    ) -> CollaborativeLM:
        """Load a checkpoint and its assistants.

        Args:
            path: a checkpoint, or a plain model, which has no gate and can only defer never, always or at random.
                It, `base` and the assistants may say how they are loaded: `SPEC?device_map=auto&quantization=nf4`
                (`models.placement`); or be models behind servers, `vllm+http://host:8000` (`remote.address`).
            assistants: in the order of training, or by name: `{"expert": ...}`, or `"expert=SPEC"`. Each a path or
                another spec, a tool, a transformers model with the base's tokenizer, or a `LanguageModel` of one's
                own. Those that lie where they lay in training, and tools, need not be given.
            base: where the base model lies, for a checkpoint that holds an adapter or a gate alone; for an export
                (`collm export`) the vLLM that serves it.
            dtype: of the weights: float32, bfloat16 or float16, or as torch has it.
            device: cpu, cuda, cuda:1, mps; or auto, the GPU if there is one.
            cache: False recomputes every token from the start: the plain twin, for tests.
            max_cache_tokens: bounds the KV cache of each model (texts at a time x their length), in tokens, or as a
                share below 1 of the memory that is free once it is loaded. Texts wait until there is room; one that
                cannot fit at all is refused. None: as much as is asked for.
            compiled: on a GPU, compile the modules of models that have no forward pass of their own here; see
                `LocalModel`.
            max_num_seqs: see the class, as `max_model_len` and `timeout`.

        Raises:
            CollmError: an assistant is missing, cannot share a text with the base, or is one too many.
        """
        found = load(
            path,
            assistants,
            base=None if base is None else str(base),
            dtype=dtype_name(dtype),
            device=str(device),
            cache=cache,
            max_cache_tokens=max_cache_tokens,
            compiled=compiled,
        )
        return cls(
            found.models,
            found.formatters,
            found.info,
            has_gate=found.has_gate,
            path=found.path,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            timeout=timeout,
            sharing=found.sharing,
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
    def models(self) -> tuple[LanguageModel, ...]:
        return self._preparation.models

    @property
    def has_gate(self) -> bool:
        return self._preparation.has_gate

    @property
    def sharing(self) -> Sharing | None:
        return self._preparation.sharing

    @property
    def model_names(self) -> tuple[str, ...]:
        return self._preparation.names

    @property
    def context_lengths(self) -> tuple[int | None, ...]:
        """Tokens that a text may come to for each model; None: no bound."""
        return self._preparation.context_lengths

    def contexts(self, alone: int | str | None) -> tuple[int | None, ...]:
        """As `context_lengths`; for a text that one model is to write `alone`, no other bounds it."""
        return self._preparation.contexts(alone)

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
        **settings: Unpack[Settings],
    ) -> Generation:
        """Write one text: `generate("Once", max_tokens=40)`; see `generate_batch`.

        Raises:
            GenerationFailed: a model failed in the middle.
        """
        [generation] = self.generate_batch([prompt], params, policy=policy, alone=alone, **settings)
        return whole(generation)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        batch_size: int = 16,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
        **settings: Unpack[Settings],
    ) -> list[Generation]:
        """Write a text for each prompt, at most `batch_size` at a time. A text does not depend on its batch-mates.

        A text whose model fails in the middle ends there, with `finish_reason` and `error` telling; the others go on.

        Args:
            params: for all, or one for each prompt.
            settings: fields of `SamplingParams` by name, set in all of them: `max_tokens=64, temperature=0.7`.
            policy: who writes, instead of what `params` says: a policy, or another way of decoding.
            alone: name or number of the only model to be used, the base being 0: the baselines.

        Raises:
            CollmError: a prompt is longer than the context of a model; the checkpoint has no gate or no calibration
                for what `params` asks.
        """
        done = dict(self.generate_each(prompts, params, batch_size, policy=policy, alone=alone, **settings))
        return [done[i] for i in range(len(prompts))]

    def generate_each(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        batch_size: int = 16,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[tuple[int, Generation]]:
        """As `generate_batch`, each text with its number as soon as it is finished."""
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise CollmError("generate_batch takes a list of prompts; for a single one there is generate")
        each = asked_each(params, settings, len(prompts))
        ids = [self._prompt_ids(prompt, i, alone) for i, prompt in enumerate(prompts)]
        each = numbered(list(zip(ids, each, strict=True)))
        writings = [
            (i, self._writing(own, how, policy, alone, ahead=True))
            for i, (own, how) in enumerate(zip(ids, each, strict=True))
        ]
        at_a_time = min(batch_size, len(prompts))
        return finished(self._engine.ready(at_a_time), writings, at_a_time)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
        **settings: Unpack[Settings],
    ) -> Iterator[Chunk]:
        """As `generate`, token by token; the last chunk carries the same `Generation`."""
        writing = self._single(prompt, params, settings, policy, alone)
        return chunks(self.engine, writing)

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
        **settings: Unpack[Settings],
    ) -> AsyncIterator[Chunk]:
        """As `stream`, for asyncio. The text is cancelled where the iterator is closed, or its task cancelled."""
        writing = self._single(prompt, params, settings, policy, alone)
        return achunks(self.engine, writing)

    def astream_each(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        *,
        alone: int | str | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[tuple[int, Chunk]]:
        """As `astream`, several texts as they come, each chunk with the number of its text.

        Args:
            params: one for each prompt.
            deadline: in the event loop's time.

        Raises:
            TimeoutError: while it is read, at the deadline.
        """
        ids = [self._prompt_ids(prompt, i, alone) for i, prompt in enumerate(prompts)]
        writings = [self._writing(own, how, None, alone) for own, how in zip(ids, params, strict=True)]
        return merged(self.engine, writings, deadline)

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
        **settings: Unpack[Settings],
    ) -> Generation:
        """As `generate`, for asyncio.

        Raises:
            GenerationFailed: a model failed in the middle.
        """
        generation = None
        async for chunk in self.astream(prompt, params, policy=policy, alone=alone, **settings):
            generation = chunk.generation
        assert generation is not None
        return whole(generation)

    @property
    def engine(self) -> Engine:
        """What all callers share; it lives as long as this system."""
        return self._engine.ready()

    def warm_up(self) -> float:
        """Take the memory of the caches and capture the graphs of all models on GPUs; seconds that it took.

        Otherwise that happens before the first texts.
        """
        return self._engine.warm_up()

    def close(self) -> None:
        """End what is being written and stop the engine's threads. Nothing can be written afterwards."""
        self._engine.close()

    def _prompt_ids(self, prompt: Prompt, number: int, alone: int | str | None) -> tuple[TokenIds, ...]:
        return prompt_ids(prompt, self.formatters, self.model_names, self.contexts(alone), f"prompt {number + 1}")

    def _single(
        self,
        prompt: Prompt,
        params: SamplingParams,
        settings: Settings,
        policy: Method | None,
        alone: int | str | None,
    ) -> Writing:
        return self._writing(self._prompt_ids(prompt, 0, alone), asked(params, settings), policy, alone)

    def _writing(
        self,
        ids: tuple[TokenIds, ...],
        params: SamplingParams,
        policy: Method | None,
        alone: int | str | None,
        *,
        ahead: bool = False,
    ) -> Writing:
        return self._preparation.writing(self._engine, ids, params, self.info, policy, alone, ahead=ahead)
