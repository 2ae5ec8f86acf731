"""A system whose models have different tokenizers: what they share are chunks (`collm.cuts`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from collm.cuts import Cuts
from collm.data.chunks import Reader
from collm.data.formatting import Formatter
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunk_writing import draw_of
from collm.decoding.chunked import chunked, nudged
from collm.decoding.collaborative import Flow, single
from collm.decoding.nudging import Nudging
from collm.decoding.policies import Policy
from collm.decoding.text import Transcript
from collm.errors import CollmError
from collm.llm.methods import NAMES, Method
from collm.models.codec import ByteCodec
from collm.models.info import CheckpointInfo
from collm.models.pairing import SAMPLES, chunking, cuts_between, require_free_tools, tell_chunking
from collm.models.tools import Tool
from collm.sampling_params import SamplingParams
from collm.types import BASE
from collm.values import LanguageModel
from collm.views import Text

CLOSING = (
    "a server does not tell how probable it is that a chunk closes, so that it is taken for certain: nearly right in "
    "prose and sums, wrong in code (docs/method.md)"
)
ASKED = "load it here, or add closing=approximate to its URL to go on all the same"


@dataclass(frozen=True)
class Sharing:
    """`codecs`: of all models, base first. `end_id`, `end`: the base's token for an end that another has written."""

    cuts: Cuts
    codecs: tuple[ByteCodec, ...]
    end_id: int
    end: str

    def has_own_tokens(self, model: int) -> bool:
        """Are its tokens others than the base's?"""
        return self.codecs[model].tokenizer is not self.codecs[BASE].tokenizer

    def refuse(self, what: str) -> CollmError:
        return CollmError(f"{what}: these have different tokenizers, and take turns between chunks")

    def text(self, prompts: Sequence[Sequence[int]], limits: Sequence[int | None]) -> ChunkText:
        return ChunkText(prompts, self.codecs, self.cuts, limits)

    def readers(self, formatters: Sequence[Formatter]) -> list[Reader]:
        """How the models read given texts."""
        base = Reader(formatters[BASE], self.codecs[BASE])
        same = [formatter.tokenizer is formatters[BASE].tokenizer for formatter in formatters]
        return [
            base if own else Reader(formatter, codec, base)
            for formatter, codec, own in zip(formatters, self.codecs, same, strict=True)
        ]

    def require_defined(self, method: Method, params: SamplingParams) -> None:
        """Refuse a method or a setting that needs tokens which all models share.

        Raises:
            CollmError: naming what there is instead.
        """
        if isinstance(method, tuple(NAMES)) and not isinstance(method, Nudging):
            raise CollmError(
                f"{NAMES[type(method)]} needs models with one tokenizer, and these have different ones, so that they "
                "take turns between chunks; take threshold, expected_gain, sampled, entropy, top_probability, random, "
                "nudging, never or always"
            )
        if params.stop_token_ids:
            raise CollmError(
                "stop_token_ids are not defined for models with different tokenizers: give stop, the text that ends it"
            )
        if params.speculative:
            raise CollmError(
                "speculative drafts tokens for another model to judge, and these have different tokenizers, and "
                "write in chunks: leave it out (the text is the same), or take models with one tokenizer"
            )

    def writing(
        self, text: Text, params: SamplingParams, method: Method | None, alone: int, *, ahead: bool = False
    ) -> tuple[Flow, Transcript]:
        """The flow of a text, and how its steps read.

        Args:
            method: None: the model of the number `alone` writes by itself, in its own tokens. Else one that
                `require_defined` lets pass.
            ahead: steps may be held back (`chunked`).
        """
        if method is None:
            codec = self.codecs[alone]
            ends = [codec.ends | frozenset(params.stop_token_ids)] * len(self.codecs)
            prompt = text.views[alone].token_ids[: text.views[alone].prompt_length]
            flow = single(alone, text, params, ends, draw_of(params.draw, alone))
            return flow, Transcript.of_tokens(codec.tokenizer, prompt, params.stop, ends)
        assert isinstance(text, ChunkText)
        transcript = Transcript.of_chunks(self.end, params.stop)
        if isinstance(method, Nudging):
            return nudged(text, params, method, self.end_id), transcript
        policy: Policy = method  # type: ignore[assignment]
        return chunked(text, params, policy, self.end_id, ahead=ahead), transcript


def share(
    models: Sequence[LanguageModel], formatters: Sequence[Formatter], info: CheckpointInfo, has_gate: bool
) -> Sharing | None:
    """Make models with different tokenizers write chunks together; None where all have one tokenizer.

    Raises:
        CollmError: a tokenizer does not keep texts as they are, a model cannot write chunks, or the gate was trained
            with other tokenizers.

    Warns:
        UserWarning: there are few cuts; or a model behind a server does not tell its closing factors.
    """
    names = [model.name for model in models]
    cuts = cuts_between([formatter.tokenizer for formatter in formatters], names)
    found = None if cuts is None else cuts.fingerprint
    if has_gate and info.cuts != found:
        raise CollmError(
            "the gate was trained for models that take turns "
            + ("at every token" if info.cuts is None else f"at other places (cuts {info.cuts})")
            + (", and these have one tokenizer" if found is None else f", and these do so at cuts {found}")
            + ": their tokenizers are not those of training; give the models of training, or train again"
        )
    if cuts is None:
        return None
    codecs = tuple(
        ByteCodec(formatter.tokenizer, cuts, model.eos_token_ids | formatter.end_ids, name=model.name)
        for model, formatter in zip(models, formatters, strict=True)
    )
    require_free_tools(cuts, [model for model in models if isinstance(model, Tool)])
    for model, codec in zip(models, codecs, strict=True):
        if not isinstance(model, Tool):
            model.share_chunks(cuts, codec.first_bytes)
    _tell_closing(models)
    own = [codec for codec, model in zip(codecs, models, strict=True) if not isinstance(model, Tool)]
    tell_chunking(chunking(own, cuts, SAMPLES.values()), [codec.name for codec in own])
    base = formatters[BASE].tokenizer
    end_id = int(base.eos_token_id)
    return Sharing(cuts, codecs, end_id, str(base.convert_ids_to_tokens(end_id)))


def _tell_closing(models: Sequence[LanguageModel]) -> None:
    """Raises:
    CollmError: the base is behind a server: its doubt and its closing factors are what the others are weighed by.

    Warns:
        UserWarning: an assistant is.
    """
    if not models[BASE].closing_told:
        raise CollmError(
            f"{models[BASE].name} is behind a server, which tells neither its doubt nor what closes a chunk: between "
            "models with different tokenizers, load the base here"
        )
    for model in models:
        if not model.closing_told:
            warnings.warn(f"{model.name}: {CLOSING}", stacklevel=4)


def require_closing(models: Sequence[LanguageModel], what: str) -> None:
    """Refuse code where models share chunks and one does not tell closing factors, unless the user asked for it.

    Raises:
        CollmError: naming the model, and how to ask.
    """
    for model in models:
        if not model.closing_told and not model.closing_approximated:
            raise CollmError(f"{what} is code, and {model.name}: {CLOSING}; {ASKED}")
