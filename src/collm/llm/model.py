"""What users import: a base model and its assistants that write one text together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from collm.data.formatting import Formatter, PromptFormat
from collm.decoding.collaborative import Flow, TokenIds, single
from collm.decoding.pace import AdaptivePace, Experience
from collm.decoding.run import Finished, Lengths, run
from collm.decoding.text import Detokenizer, TextStream, stopping
from collm.errors import CollmError
from collm.llm.assistants import AssistantSource, load_assistants
from collm.llm.methods import Method, make_flow, make_method, require_defined
from collm.llm.prompt import Prompt, TokenPrompt, require_prompt
from collm.models.adapters import ModelStore
from collm.models.checkpoint import load_base
from collm.models.devices import may_cache
from collm.models.hub import copy_checkpoint, push_to_hub
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.models.placement import Placement
from collm.models.specs import adapter_config
from collm.sampling_params import SamplingParams
from collm.types import BASE, Generation, LanguageModel, Step

GREEDY = SamplingParams()


class GenerationFailed(CollmError):
    """A model failed in the middle of a text; `generation` holds what was written until then."""

    def __init__(self, generation: Generation) -> None:
        super().__init__(f"{generation.error} (after {generation.completion_tokens} tokens)")
        self.generation = generation


@dataclass(frozen=True, slots=True)
class Chunk:
    """What `stream` yields: a written token and the text that has become certain with it.

    `text` lags behind `step` where a character or a possible stop string is not complete; joined over all chunks it
    is `Generation.text`. `piece` is the token's own text, special tokens shown (empty while its character is not
    complete). The last chunk has no step but the whole `generation`.
    """

    text: str
    piece: str
    step: Step | None = None
    generation: Generation | None = None


class CollaborativeLM:
    """A base with a gate, and assistants 1..K, deciding token by token who writes.

    Args:
        models: the base first.
        formatters: how each model is shown its prompts.
        info: the checkpoint's description; its calibration turns deferral rates into thresholds.
        has_gate: whether the base's predictions carry a gate.
        path: the checkpoint it was loaded from.
    """

    def __init__(
        self,
        models: Sequence[LanguageModel],
        formatters: Sequence[Formatter],
        info: CheckpointInfo | None = None,
        *,
        has_gate: bool = True,
        path: Path | None = None,
    ) -> None:
        assert len(models) == len(formatters) >= 1
        self.models = tuple(models)
        self.formatters = tuple(formatters)
        self.info = info or CheckpointInfo()
        self.has_gate = has_gate
        self.path = path
        self._experience = Experience()
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
        max_cache_tokens: int | None = None,
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
            max_cache_tokens: bounds the KV cache of each model (texts at a time x their length). Texts wait until
                there is room; one that cannot fit at all is refused. None: as much as is asked for.

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
            cache=may_cache(model, "base", cache),
            max_cache_tokens=max_cache_tokens,
            activate=None if shared is None else shared.activate,
        )
        models, formatters = [m for m, _ in found], [f for _, f in found]
        return cls([local, *models], [formatter, *formatters], info, has_gate=head is not None, path=Path(folder))

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
        flows = [self._flow(own, p, policy, alone) for own, p in zip(ids, each, strict=True)]
        steps: list[list[Step]] = [[] for _ in prompts]
        for i, event in self._run(flows, max(1, min(batch_size, len(prompts)))):
            if isinstance(event, Step):
                steps[i].append(event)
            else:
                yield i, self._generation(ids[i], each[i], steps[i], event)

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams = GREEDY,
        *,
        policy: Method | None = None,
        alone: int | str | None = None,
    ) -> Iterator[Chunk]:
        """As `generate`, token by token; the last chunk carries the same `Generation`."""
        ids = self._prompt_ids(prompt, 0)
        text = TextStream(self.tokenizer, ids[BASE], params.stop, self._eos)
        pieces = Detokenizer(self.tokenizer, ids[BASE], skip_special_tokens=False)
        steps: list[Step] = []
        for _, event in self._run([self._flow(ids, params, policy, alone)], 1):
            if isinstance(event, Step):
                steps.append(event)
                yield Chunk(text.push(event), pieces.push(event.token_id), event)
            else:
                whole = self._generation(ids, params, steps, event)
                yield Chunk(text.finish(), pieces.flush(), None, whole)

    def _prompt_ids(self, prompt: Prompt, number: int) -> tuple[TokenIds, ...]:
        """The prompt as each model sees it."""
        require_prompt(prompt, self.formatters)
        if not isinstance(prompt, TokenPrompt):
            ids = tuple(formatter.prompt(prompt) for formatter in self.formatters)
        elif len(prompt.token_ids) == len(self.models):
            ids = prompt.token_ids
        else:
            raise CollmError(f"prompt {number + 1} is given for {len(prompt.token_ids)} of {len(self.models)} models")
        for model, own in zip(self.models, ids, strict=True):
            context = _context(model)
            if context is not None and len(own) > context:
                raise CollmError(
                    f"prompt {number + 1} has {len(own)} tokens, more than the context of {context} tokens of "
                    f"{model.name}; shorten it"
                )
        return ids

    def _flow(
        self, ids: tuple[TokenIds, ...], params: SamplingParams, policy: Method | None, alone: int | str | None
    ) -> tuple[Flow, Lengths]:
        """The flow of a text, and how long it may get for each model."""
        # A text that reaches the end of a context ends there ("length"), instead of failing with its batch.
        room = [c - len(own) + 1 for own, m in zip(ids, self.models, strict=True) if (c := _context(m)) is not None]
        own = replace(params, max_tokens=min([params.max_tokens, *room]))
        lengths = tuple(len(prompt) + own.max_tokens - 1 for prompt in ids)
        if not self._fits([lengths]):
            raise CollmError(
                f"a prompt of {max(map(len, ids))} tokens and max_tokens={own.max_tokens} do not fit into "
                f"max_cache_tokens; raise it to at least {max(lengths)}, or lower max_tokens"
            )
        if alone is not None:
            flow = single(self._number(alone), ids, own, self._eos)
        else:
            found = policy or make_method(params, self.models, self.tokenizer, self.has_gate, self.info.calibration)
            require_defined(found, params, self.models, self.has_gate)
            flow = make_flow(found, ids, own, self._eos, AdaptivePace(self._experience))
        if params.stop:
            flow = stopping(flow, TextStream(self.tokenizer, ids[BASE], params.stop, self._eos))
        return flow, lengths

    def _run(self, flows: Iterable[tuple[Flow, Lengths]], batch_size: int) -> Iterator[tuple[int, Step | Finished]]:
        for model in self.models:
            if isinstance(model, LocalModel):
                model.reserve(batch_size)
        return run(flows, self.models, batch_size, fits=self._fits, experience=self._experience)

    def _fits(self, lengths: Sequence[Lengths]) -> bool:
        return all(
            model.fits([each[number] for each in lengths])
            for number, model in enumerate(self.models)
            if isinstance(model, LocalModel)
        )

    def _generation(
        self,
        ids: tuple[TokenIds, ...],
        params: SamplingParams,
        steps: Sequence[Step],
        finished: Finished,
    ) -> Generation:
        text = TextStream(self.tokenizer, ids[BASE], params.stop, self._eos)
        detokenizer = Detokenizer(self.tokenizer, ids[BASE], skip_special_tokens=False)
        parts = [text.push(step) for step in steps] + [text.finish()]
        pieces = [detokenizer.push(step.token_id) for step in steps]
        if pieces:
            pieces[-1] += detokenizer.flush()
        return Generation(
            text="".join(parts),
            steps=tuple(steps),
            pieces=tuple(pieces),
            finish_reason=finished.finish_reason,
            prompt_tokens=len(ids[BASE]),
            model_names=self.model_names,
            usage=finished.usage,
            error=finished.error,
        )

    def _number(self, model: int | str) -> int:
        if isinstance(model, int) and 0 <= model < len(self.models):
            return model
        if model in self.model_names:
            return self.model_names.index(str(model))
        raise CollmError(f"there is no model {model!r}; the models are {', '.join(self.model_names)}")


def _context(model: LanguageModel) -> int | None:
    return model.context_length if isinstance(model, LocalModel) else None
