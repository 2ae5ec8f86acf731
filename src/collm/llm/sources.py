"""Match the assistants a user gives with those a checkpoint was trained with; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from collm.errors import CollmError
from collm.models.info import AssistantInfo, load_info
from collm.models.specs import is_tool, is_url, require_model, server_name, split_spec
from collm.values import LanguageModel

AssistantSource = str | LanguageModel
"""A spec (a URL of a server, too), `"NAME=SPEC"`, or a model of one's own."""


def matched(
    given: Sequence[AssistantSource], trained: Sequence[AssistantInfo]
) -> tuple[list[AssistantInfo], list[AssistantSource]]:
    """For each assistant, what is known about it and what to load.

    Raises:
        CollmError: one is missing, one too many, or two have one name.
    """
    infos, sources = _matched(given, trained)
    names = [info.name for info in infos]
    if len(set(names)) < len(names):
        raise CollmError(f"two assistants have one name ({', '.join(names)}); name them as NAME=SPEC")
    return infos, sources


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
        elif is_tool(info.spec) or is_url(info.spec) or Path(split_spec(info.spec)[0]).exists():
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
            if not is_tool(source):
                require_model(split_spec(source)[0])
            raise CollmError(
                f"the gate was trained with {info.spec!r} as assistant {info.name!r}; {source!r} is another kind of "
                "writer, and the gate knows nothing about it"
            )
    return list(trained), sources


def _untrained(name: str | None, source: AssistantSource) -> AssistantInfo:
    """No gate was trained with it. One that is a checkpoint itself is shown its prompts as in its own training."""
    own = load_info(split_spec(source)[0]) if isinstance(source, str) and not is_url(source) else None
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
    if not isinstance(source, str):
        return source.name
    return server_name(source) if is_url(source) else Path(split_spec(source)[0]).name
