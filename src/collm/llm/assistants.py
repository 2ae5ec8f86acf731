"""Match the assistants a user gives with those a checkpoint was trained with, and load them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import parse_qsl

from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.models.adapters import ModelStore
from collm.models.checkpoint import warn_of_other_weights
from collm.models.info import AssistantInfo, load_info
from collm.models.loading import load_tokenizer
from collm.models.local import LocalModel
from collm.models.specs import is_tool
from collm.models.tokenizers import require_same_tokenizer, shared_vocab_size
from collm.models.tools import make_tool
from collm.types import LanguageModel

AssistantSource = str | LanguageModel
"""A spec, `"NAME=SPEC"`, or a model of one's own."""


def load_assistants(
    given: Sequence[AssistantSource],
    trained: Sequence[AssistantInfo],
    base: Formatter,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    cache: bool = True,
    max_cache_tokens: int | None = None,
    store: ModelStore | None = None,
) -> list[tuple[LanguageModel, Formatter]]:
    """The assistants in the order of the gate, each with its prompt format.

    Args:
        given: specs; `SPEC?dtype=bfloat16&device=cuda:1` loads one otherwise than the rest.
        trained: those of the checkpoint; none for a plain model, which takes whatever is given.
        base: the base's formatter; tools and models of one's own see the prompt as the base does.
        store: what is in memory already; adapters of one model share its weights.

    Raises:
        CollmError: one is missing, one too many, two have one name, or a tokenizer differs from the base's.

    Warns:
        UserWarning: an assistant has other weights than the one of training.
    """
    infos, sources = _matched(given, trained)
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        raise CollmError(f"two assistants have one name ({', '.join(names)}); name them as NAME=SPEC")
    placement, store = Placement(dtype, device, cache, max_cache_tokens), store or ModelStore()
    return [_load(s, info, base, placement, store) for s, info in zip(sources, infos, strict=True)]


@dataclass(frozen=True, slots=True)
class Placement:
    """How and where a model is loaded."""

    dtype: str = "float32"
    device: str = "cpu"
    cache: bool = True
    max_cache_tokens: int | None = None

    def of(self, source: str) -> tuple[str, Placement]:
        """The spec without its `?dtype=...&device=...`, and the placement that this asks for."""
        spec, mark, asked = source.rpartition("?")
        if not mark or Path(source).exists():
            return source, self
        settings = dict(parse_qsl(asked, keep_blank_values=True))
        unknown = sorted(set(settings) - {"dtype", "device"})
        if unknown or not settings:
            raise CollmError(f"{source}: after the ? stands dtype=... or device=... (joined by &), not {asked!r}")
        return spec, replace(self, **settings)  # type: ignore[arg-type]


def _matched(
    given: Sequence[AssistantSource], trained: Sequence[AssistantInfo]
) -> tuple[list[AssistantInfo], list[AssistantSource]]:
    """For each assistant, what is known about it and what to load."""
    given = [given] if isinstance(given, str) else given
    named = [_named(source, [info.name for info in trained]) for source in given]
    if not trained:
        return [_untrained(name, s) for name, s in named], [s for _, s in named]
    by_name = {name: source for name, source in named if name is not None}
    unnamed = [source for name, source in named if name is None]
    unknown = sorted(set(by_name) - {info.name for info in trained})
    if unknown:
        known = ", ".join(info.name for info in trained)
        raise CollmError(f"the checkpoint has no assistant called {', '.join(unknown)}; its assistants are {known}")
    sources: list[AssistantSource] = []
    for info in trained:
        if info.name in by_name:
            sources.append(by_name[info.name])
        elif info.spec in unnamed:
            sources.append(unnamed.pop(unnamed.index(info.spec)))
        elif unnamed and not (is_tool(info.spec) and len(unnamed) < _wanting(trained, by_name, sources)):
            sources.append(unnamed.pop(0))
        elif is_tool(info.spec) or Path(info.spec).exists():
            sources.append(info.spec)
        else:
            raise CollmError(
                f"the assistant {info.name!r} is missing; give it as assistant {info.name}=SPEC "
                f"(it was trained with {info.spec})"
            )
    if unnamed:
        raise CollmError(f"{len(given)} assistants were given, but the checkpoint was trained with {len(trained)}")
    for info, source in zip(trained, sources, strict=True):
        if isinstance(source, str) and is_tool(source) != is_tool(info.spec):
            raise CollmError(
                f"the gate was trained with {info.spec!r} as assistant {info.name!r}; {source!r} is another kind of "
                "writer, and the gate knows nothing about it"
            )
    return list(trained), sources


def _untrained(name: str | None, source: AssistantSource) -> AssistantInfo:
    """No gate was trained with it. One that is a checkpoint itself is shown its prompts as in its own training."""
    own = load_info(source.partition("?")[0]) if isinstance(source, str) else None
    return AssistantInfo(name=name or _default_name(source), spec="", format={} if own is None else own.base_format)


def _wanting(trained: Sequence[AssistantInfo], by_name: dict[str, AssistantSource], done: Sequence[object]) -> int:
    """How many assistants, from the next one on, are still to be found by their order."""
    return sum(info.name not in by_name for info in trained[len(done) :])


def _named(source: AssistantSource, known: Sequence[str]) -> tuple[str | None, AssistantSource]:
    """Split `NAME=SPEC`; a model of one's own counts as named if the checkpoint knows its name."""
    if not isinstance(source, str):
        return (source.name if source.name in known or not known else None), source
    name, sign, spec = source.partition("=")
    # A folder may have "=" in its name.
    return (name, spec) if sign and name and not set(name) & set("/?") and not Path(source).exists() else (None, source)


def _default_name(source: AssistantSource) -> str:
    return Path(source).name if isinstance(source, str) else source.name


def _load(
    source: AssistantSource, info: AssistantInfo, base: Formatter, placement: Placement, store: ModelStore
) -> tuple[LanguageModel, Formatter]:
    if not isinstance(source, str):
        return source, base
    source, placed = placement.of(source)
    if is_tool(source):
        return make_tool(source, base.tokenizer, info.name), base
    tokenizer = load_tokenizer(source)
    require_same_tokenizer(base.tokenizer, tokenizer, ("the base", f"the assistant {info.name!r}"))
    variant = store.load(source, dtype=placed.dtype, device=placed.device)
    warn_of_other_weights(
        variant.fingerprint,
        info.weights_fingerprint,
        f"{source} does not hold the weights that the gate was trained with as assistant {info.name!r}",
    )
    model = LocalModel(
        variant.model,
        tokenizer,
        name=info.name,
        vocab_size=shared_vocab_size(base.tokenizer),
        cache=placed.cache,
        max_cache_tokens=placed.max_cache_tokens,
        activate=variant.activate,
    )
    return model, Formatter(tokenizer, PromptFormat(**info.format))
