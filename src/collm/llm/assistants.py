"""Load the assistants of a system."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.llm.sources import Assistants, AssistantSource, matched
from collm.models.adapters import ModelStore
from collm.models.checkpoint import warn_of_other_weights
from collm.models.info import AssistantInfo
from collm.models.loading import load_tokenizer, weights_fingerprint
from collm.models.local import LocalModel
from collm.models.specs import is_tool, is_url, split_spec
from collm.models.tokenizers import difference, shared_vocab_size
from collm.models.tools import make_tool
from collm.values import LanguageModel

__all__ = ["AssistantSource", "Assistants", "load_assistants"]


def load_assistants(
    given: Assistants,
    trained: Sequence[AssistantInfo],
    base: Formatter,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache: bool = True,
    max_cache_tokens: int | float | None = None,
    compiled: bool = False,
    store: ModelStore | None = None,
    vocab_size: int | None = None,
) -> list[tuple[LanguageModel, Formatter]]:
    """The assistants in the order of the gate, each with its prompt format.

    Args:
        given: specs; `SPEC?dtype=bfloat16&device=cuda:1` loads one otherwise than the rest (`models.placement`), and
            `vllm+http://host:8000` is asked over the network (`remote.address`).
        trained: those of the checkpoint; none for a plain model, which takes whatever is given.
        base: the base's formatter; tools and models of one's own see the prompt as the base does.
        store: what is in memory already; adapters of one model share its weights.
        vocab_size: tokens that the base can write, where its tokenizer has more.

    Raises:
        CollmError: one is missing, one too many, or two have one name.

    Warns:
        UserWarning: an assistant has other weights than the one of training.
    """
    infos, sources = matched(given, trained)
    placed: dict[str, Any] = {"dtype": dtype, "device": device, "store": store or ModelStore()}
    cached: dict[str, Any] = {"cache": cache, "max_cache_tokens": max_cache_tokens, "compiled": compiled}
    tokens = vocab_size or shared_vocab_size(base.tokenizer)
    return [_load(source, info, base, tokens, cached, **placed) for source, info in zip(sources, infos, strict=True)]


def _load(
    source: AssistantSource,
    info: AssistantInfo,
    base: Formatter,
    vocab_size: int,
    cached: dict[str, Any],
    *,
    dtype: str,
    device: str,
    store: ModelStore,
) -> tuple[LanguageModel, Formatter]:
    if isinstance(source, PreTrainedModel):
        return _own_network(source, info, base, cached)
    if isinstance(source, LanguageModel):
        return source, base
    source = str(source)
    if is_url(source):
        from collm.llm.connecting import connect_assistant

        return connect_assistant(source, info, base, vocab_size)
    if is_tool(split_spec(source)[0]):
        return make_tool(split_spec(source)[0], base.tokenizer, info.name), base
    tokenizer = load_tokenizer(source)
    variant = store.load(source, dtype=dtype, device=device)
    warn_of_other_weights(
        variant.fingerprint,
        info.weights_fingerprint,
        f"{source} does not hold the weights that the gate was trained with as assistant {info.name!r}",
    )
    model = LocalModel(
        variant.model,
        tokenizer,
        name=info.name,
        vocab_size=vocab_size if difference(base.tokenizer, tokenizer) is None else shared_vocab_size(tokenizer),
        activate=variant.activate,
        **cached,
    )
    return model, Formatter(tokenizer, PromptFormat(**info.format))


def _own_network(
    network: PreTrainedModel, info: AssistantInfo, base: Formatter, cached: dict[str, Any]
) -> tuple[LanguageModel, Formatter]:
    """A transformers model that the caller has loaded; it is read by the base's tokenizer."""
    tokenizer = base.tokenizer
    wanted, there = shared_vocab_size(tokenizer), network.config.get_text_config().vocab_size
    if there < wanted:
        raise CollmError(
            f"assistant {info.name!r}: the model has {there} tokens, the base's tokenizer {wanted}: it is to be one "
            "of the base's tokenizer"
        )
    warn_of_other_weights(
        partial(weights_fingerprint, network),
        info.weights_fingerprint,
        f"the model does not hold the weights that the gate was trained with as assistant {info.name!r}",
    )
    model = LocalModel(network.eval(), tokenizer, name=info.name, vocab_size=wanted, **cached)
    return model, Formatter(tokenizer, PromptFormat(**info.format))
