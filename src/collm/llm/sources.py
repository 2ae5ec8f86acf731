"""Match the assistants a user gives with those a checkpoint was trained with; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from collm.errors import CollmError
from collm.models.info import AssistantInfo, load_info
from collm.models.reach import require_model
from collm.models.specs import is_tool, is_url, server_name, split_spec
from collm.values import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AssistantSource: TypeAlias = "str | Path | LanguageModel | PreTrainedModel"
"""A spec (a URL, too) or path, `"NAME=SPEC"`, a tool or another model of one's own, or a transformers model."""
Assistants: TypeAlias = "AssistantSource | Sequence[AssistantSource] | Mapping[str, AssistantSource]"
"""One, several in the order of training, or several by name."""


def matched(given: Assistants, trained: Sequence[AssistantInfo]) -> tuple[list[AssistantInfo], list[AssistantSource]]:
    """For each assistant, what is known about it and what to load.

    Raises:
        CollmError: one is missing, one too many, or two have one name.
    """
    infos, sources = _matched(given, trained)
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        raise CollmError(f"two assistants have one name ({', '.join(names)}); name them as NAME=SPEC")
    return infos, sources


def _matched(given: Assistants, trained: Sequence[AssistantInfo]) -> tuple[list[AssistantInfo], list[AssistantSource]]:
    """For each assistant, what is known about it and what to load."""
    named = _listed(given, [info.name for info in trained])
    if not trained:
        return [_untrained(name, s) for name, s in named], [s for _, s in named]
    by_name = {name: source for name, source in named if name is not None}
    unnamed = [source for name, source in named if name is None]
    if len(by_name) + len(unnamed) < len(named):
        raise CollmError(f"two assistants have one name ({', '.join(name for name, _ in named if name is not None)})")
    unknown = sorted(set(by_name) - {info.name for info in trained})
    if unknown:
        known = ", ".join(info.name for info in trained)
        raise CollmError(f"the checkpoint has no assistant called {', '.join(unknown)}; its assistants are {known}")
    # First those that say whose place they take, in whatever order; then the others, by theirs.
    for info in trained:
        exact = next((s for s in unnamed if info.name not in by_name and _is_place(s, info.spec)), None)
        if exact is not None:
            unnamed.remove(exact)
            by_name[info.name] = exact
    sources: list[AssistantSource] = []
    for info in trained:
        if info.name in by_name:
            sources.append(by_name[info.name])
        elif unnamed and not (is_tool(info.spec) and len(unnamed) < _wanting(trained, by_name, sources)):
            sources.append(unnamed.pop(0))
        elif is_tool(info.spec) or is_url(info.spec) or Path(split_spec(info.spec)[0]).exists():
            sources.append(info.spec)
        else:
            raise CollmError(
                f"the assistant {info.name!r} is missing; give it as assistant {info.name}=SPEC "
                f"(it was trained with {info.spec})"
            )
    if unnamed:
        raise CollmError(f"{len(named)} assistants were given, but the checkpoint was trained with {len(trained)}")
    for info, source in zip(trained, sources, strict=True):
        if isinstance(source, str) and is_tool(source) != is_tool(info.spec):
            if not is_tool(source):
                require_model(split_spec(source)[0])
            raise CollmError(
                f"the gate was trained with {info.spec!r} as assistant {info.name!r}; {source!r} is another kind of "
                "writer, and the gate knows nothing about it"
            )
    return list(trained), sources


def _is_place(source: AssistantSource, spec: str) -> bool:
    """Does a source name what a checkpoint names as `spec`, however it is loaded and written?"""
    if not isinstance(source, str) or is_url(source) or is_url(spec):
        return source == spec
    one, other = split_spec(source)[0], split_spec(spec)[0]
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _listed(given: Assistants, known: Sequence[str]) -> list[tuple[str | None, AssistantSource]]:
    if isinstance(given, Mapping):
        return [(name, _spec(source)) for name, source in given.items()]
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [_named(_spec(given), known)]
    return [_named(_spec(source), known) for source in given]


def _spec(source: AssistantSource) -> AssistantSource:
    if isinstance(source, str | LanguageModel):
        return source
    if isinstance(source, Path):
        return str(source)
    if hasattr(source, "config"):  # transformers' own; nothing here imports it
        return source
    raise CollmError(
        f"an assistant is a path or another spec, a tool, a LanguageModel or a transformers model, not {source!r}"
    )


def _untrained(name: str | None, source: AssistantSource) -> AssistantInfo:
    """No gate was trained with it. One that is a checkpoint itself is shown its prompts as in its own training."""
    own = load_info(split_spec(source)[0]) if isinstance(source, str) and not is_url(source) else None
    return AssistantInfo(name=name or _default_name(source), spec="", format={} if own is None else own.base_format)


def _wanting(trained: Sequence[AssistantInfo], by_name: dict[str, AssistantSource], done: Sequence[object]) -> int:
    """How many assistants, from the next one on, are still to be found by their order."""
    return sum(info.name not in by_name for info in trained[len(done) :])


def _named(source: AssistantSource, known: Sequence[str]) -> tuple[str | None, AssistantSource]:
    """Split `NAME=SPEC`; a model of one's own counts as named if the checkpoint knows its name."""
    if isinstance(source, LanguageModel):
        return (source.name if source.name in known or not known else None), source
    if not isinstance(source, str):
        return None, source
    name, sign, spec = source.partition("=")
    # A folder may have "=" in its name.
    return (name, spec) if sign and name and not set(name) & set("/?") and not Path(source).exists() else (None, source)


def _default_name(source: AssistantSource) -> str:
    if isinstance(source, LanguageModel):
        return source.name
    if isinstance(source, str) and is_url(source):
        return server_name(source)
    spec = source if isinstance(source, str) else str(getattr(source, "name_or_path", ""))
    return Path(split_spec(spec)[0]).name or "assistant"
