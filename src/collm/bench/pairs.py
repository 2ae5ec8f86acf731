"""The pairs that are timed: synthetic ones, the first layers of a model with all of them, and any two models."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from collm.bench.synthetic import SHAPES, Dial, Shape, find_dial, make_model, make_tokenizer
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models.checkpoint import load_base
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.models.loading import load_model, load_tokenizer
from collm.models.local import LocalModel
from collm.models.shortened import first_layers
from collm.models.specs import is_tool
from collm.models.tokenizers import difference, shared_vocab_size
from collm.models.tools import make_tool
from collm.types import Message
from collm.values import LanguageModel

SHARE_OF_CARD = 0.05
"""Of its free memory: for the caches of one model of one system."""
TINY = "tiny"
"""The assistant that is a random model far smaller than any base."""
WORDS = (
    "Anna buys 12 apples and 30 pears, which cost 2 dollars each. The train to the coast leaves at 9 and carries 56 "
    "people in each of its 8 carriages. How many books are left on the shelf, if every child takes three of them home "
    "and brings one back? First we add what was sold in the morning, then we take away what was broken on the way. "
).split()


class Endless(LocalModel):
    """A model that no token stops: every text has as many tokens as were asked for."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return frozenset()


class Verbatim(Formatter):
    """Prompts are token ids written as text, so that their lengths are exact, and no token ends a turn."""

    def prompt(self, question: Sequence[Message] | str) -> tuple[int, ...]:
        assert isinstance(question, str)
        return tuple(int(token_id) for token_id in question.split())

    @cached_property
    def end_ids(self) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class Pair:
    """A base, an assistant, and what both are shown.

    `system` sets both up afresh, with nothing in their caches. `gated`: a gate decides, and rates are calibrated.
    `networks`: base and assistant as transformers models; None for a tool. `details`: sizes and dials, for the record.
    `words`: what prompts are made of, token ids of one piece of text each.
    """

    name: str
    system: Callable[[], CollaborativeLM]
    networks: tuple[PreTrainedModel, PreTrainedModel | None]
    words: tuple[tuple[int, ...], ...]
    details: dict[str, Any]
    gated: bool = False

    def prompts(self, number: int, length: int, seed: int) -> list[tuple[int, ...]]:
        """`number` different prompts of `length` tokens, made up of random words."""
        prompts = []
        for row in range(number):
            rng = random.Random(f"{seed} {row}")
            token_ids: list[int] = []
            while len(token_ids) < length:
                token_ids += rng.choice(self.words)
            prompts.append(tuple(token_ids[:length]))
        return prompts


def synthetic_name(cost_ratio: float, agreement: float) -> str:
    return f"synthetic, cost {cost_ratio:g}, agreement {agreement:g}"


def truncated_name(spec: str, num_layers: int) -> str:
    return f"{_short(spec)}, {num_layers} layers + all"


def models_name(base: str, assistant: str) -> str:
    return f"{_short(base)} + {_short(assistant)}"


def synthetic(
    shape: str | Shape,
    cost_ratio: float,
    agreement: float,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Pair:
    """A random base and an assistant with more layers; see `collm.bench.synthetic`."""
    found = SHAPES[shape] if isinstance(shape, str) else shape
    extra = found.extra_layers(cost_ratio)
    base = make_model(found, dtype=dtype, device=device, seed=seed)
    assistant = make_model(found, extra, dtype=dtype, device=device, seed=seed)
    dial = Dial(assistant, found.num_layers)
    probed = find_dial(base, dial, agreement, seed)
    tokenizer = make_tokenizer(found.vocab_size)
    words = tuple((token_id,) for token_id in range(found.vocab_size))
    details = {"agreement_asked": agreement, "agreement_probed": probed, "dial": dial.value, "cost_ratio": cost_ratio}
    return _pair(synthetic_name(cost_ratio, agreement), (base, tokenizer, None), (assistant, tokenizer), words, details)


def truncated(spec: str, num_layers: int, *, dtype: str = "float32", device: str = "cpu") -> Pair:
    """The first layers of a model with its own norm and head, and all of it.

    Raises:
        CollmError: the model has not more layers than that.
    """
    network, tokenizer = load_model(spec, dtype=dtype, device=device), load_tokenizer(spec)
    short = first_layers(network, num_layers)
    details = {"model": spec, "layers": num_layers}
    return _pair(
        truncated_name(spec, num_layers), (short, tokenizer, None), (network, tokenizer), _words(tokenizer), details
    )


def models(base: str, assistant: str, *, dtype: str = "float32", device: str = "cpu") -> Pair:
    """Any base (a checkpoint brings its gate) and any assistant: a spec, a tool, or `tiny`.

    Raises:
        CollmError: no such model, or another tokenizer.
    """
    network, head, tokenizer, info = load_base(base, dtype=dtype, device=device)
    words = _words(tokenizer)
    details = {"base": base, "assistant": assistant}
    name = models_name(base, assistant)
    if is_tool(assistant):
        return _pair(name, (network, tokenizer, head), make_tool(assistant, tokenizer), words, details, info)
    if assistant == TINY:
        shape = Shape(64, 176, 1, 4, 4, network.get_output_embeddings().weight.shape[0])
        other: PreTrainedModel = make_model(shape, dtype=dtype, device=device)
        return _pair(name, (network, tokenizer, head), (other, tokenizer), words, details, info)
    theirs = load_tokenizer(assistant)
    found = difference(tokenizer, theirs)
    if found is not None:
        raise CollmError(
            f"{assistant} has another tokenizer than {base} ({found}), and collm bench times tokens that both share: "
            "collm eval tells tokens/s and each model's passes per token on your text (--limit 20), and collm "
            "pair-info in what pieces the two can write"
        )
    other = load_model(assistant, dtype=dtype, device=device)
    return _pair(name, (network, tokenizer, head), (other, theirs), words, details, info)


def _pair(
    name: str,
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase, DeferralHead | None],
    assistant: tuple[PreTrainedModel, PreTrainedTokenizerBase] | LanguageModel,
    words: tuple[tuple[int, ...], ...],
    details: dict[str, Any],
    info: CheckpointInfo | None = None,
) -> Pair:
    network, tokenizer, head = base
    other = assistant[0] if isinstance(assistant, tuple) else None
    formatter = Verbatim(tokenizer)
    for each in filter(None, (network, other)):
        # Greedy and without end for transformers' own `generate`, too, whatever the model's folder says.
        each.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    # Several systems stand beside one another; each would take what is free of a card.
    room: dict[str, Any] = {"max_cache_tokens": SHARE_OF_CARD} if network.device.type == "cuda" else {}

    def system() -> CollaborativeLM:
        helper: LanguageModel
        if isinstance(assistant, tuple):
            helper = Endless(*assistant, name="assistant", vocab_size=shared_vocab_size(tokenizer), **room)
        else:
            helper = assistant
        models = [Endless(network, tokenizer, head, **room), helper]
        return CollaborativeLM(models, [formatter, formatter], info, has_gate=head is not None)

    sizes = {
        "base_parameters": network.num_parameters(),
        "assistant_parameters": 0 if other is None else other.num_parameters(),
        "layers": [0 if n is None else n.config.get_text_config().num_hidden_layers for n in (network, other)],
    }
    gated = head is not None and info is not None and bool(info.calibration)
    return Pair(name, system, (network, other), words, {**details, **sizes}, gated)


def _words(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tokenizer.encode(f" {word}", add_special_tokens=False)) for word in WORDS)


def _short(spec: str) -> str:
    return spec.rstrip("/").rpartition("/")[2]
