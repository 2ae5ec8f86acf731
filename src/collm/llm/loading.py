"""Load a checkpoint and its assistants."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.llm.assistants import Assistants, load_assistants
from collm.llm.sharing import Sharing, share
from collm.models.adapters import ModelStore
from collm.models.checkpoint import load_base
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.models.placement import Placement
from collm.models.specs import adapter_config, is_url
from collm.values import LanguageModel


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models, base first, each with how it is shown its prompts; see `CollaborativeLM`."""

    models: list[LanguageModel]
    formatters: list[Formatter]
    info: CheckpointInfo
    has_gate: bool
    path: Path | None
    """Of the checkpoint; None where the base is behind a server."""
    sharing: Sharing | None = None
    """Where the models have different tokenizers."""


def load(
    path: str | Path,
    assistants: Assistants = (),
    *,
    base: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    cache: bool = True,
    max_cache_tokens: int | float | None = None,
    compiled: bool = False,
) -> Loaded:
    """See `CollaborativeLM.from_pretrained`."""
    cached: dict[str, Any] = {"cache": cache, "max_cache_tokens": max_cache_tokens, "compiled": compiled}
    placed: dict[str, Any] = {"dtype": dtype, "device": device, **cached}
    if is_url(str(path)) or (base is not None and is_url(base)):
        return _beside_a_server(str(path), base, assistants, placed)
    model, head, tokenizer, info = load_base(path, base=base, dtype=dtype, device=device)
    formatter = Formatter(tokenizer, PromptFormat(**info.base_format))
    folder, placement = Placement(dtype, device).of(str(path))
    store = ModelStore()
    # What the base was before training, if it still is that: assistants that are adapters of it share its weights.
    untrained = {"gate": base or info.base_model, "full": None if head else folder}.get(info.kind)
    shared = None
    if untrained is not None and adapter_config(untrained) is None:
        shared = store.put(untrained, model, placement)
    found = load_assistants(assistants, info.assistants, formatter, store=store, **placed)
    if head is not None and head.num_assistants != len(found):
        raise CollmError(f"the gate of {path} is for {head.num_assistants} assistants, {len(found)} were given")
    # A network that nobody shares need not be switched, and may begin passes while another one runs.
    activate = shared.activate if shared is not None and shared.weights.adapters else None
    local = LocalModel(model, tokenizer, head, name="base", activate=activate, **cached)
    models, formatters = [local, *(m for m, _ in found)], [formatter, *(f for _, f in found)]
    sharing = share(models, formatters, info, head is not None)
    return Loaded(models, formatters, info, head is not None, Path(folder), sharing)


def _beside_a_server(path: str, base: str | None, assistants: Assistants, placed: dict[str, Any]) -> Loaded:
    from collm.llm.connecting import connect_base

    remote, formatter, info = connect_base(path, base)
    vocab_size = None if remote.served is None else remote.served.vocab_size
    found = load_assistants(assistants, info.assistants, formatter, vocab_size=vocab_size, **placed)
    gated = remote.served is not None
    models, formatters = [remote, *(m for m, _ in found)], [formatter, *(f for _, f in found)]
    return Loaded(models, formatters, info, gated, None, share(models, formatters, info, gated))
