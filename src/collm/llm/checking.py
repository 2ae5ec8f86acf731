"""What can be found wrong with a system before torch is imported or a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from collm.errors import CollmError, nearest
from collm.llm.sources import AssistantSource, matched
from collm.models.info import GATE_FILE, CheckpointInfo, base_spec, found, load_info
from collm.models.placement import Placement
from collm.models.reach import require_model
from collm.models.specs import adapter_config, has_chat_template, is_tool, is_url
from collm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Outline:
    """A system as its files describe it."""

    model_names: tuple[str, ...]
    """The base first."""
    info: CheckpointInfo
    has_gate: bool
    tools: tuple[str, ...]
    """Names of the assistants that are tools."""
    base: str
    """The spec whose tokenizer and weights the base has."""
    has_chat_template: bool | None
    """Of the base; None where that is not known without loading."""


def outline(
    path: str | Path, assistants: Sequence[AssistantSource] = (), *, base: str | None = None, dtype: str = "float32"
) -> Outline:
    """Look at what a system is made of, as `CollaborativeLM.from_pretrained` takes it.

    Raises:
        CollmError: a model is not where it should be, an assistant is missing or one too many, or a file is damaged.
    """
    placement = Placement(dtype)
    info: CheckpointInfo | None
    if is_url(str(path)) or (base is not None and is_url(base)):
        from collm.llm.servers import find_base

        served = find_base(str(path), base)
        info, spec, has_gate = served.info, served.folder, served.gate is not None
    else:
        path, _ = placement.of(str(path))
        info = load_info(path)
        if info is not None:
            info = found(info, path)
        spec = base_spec(path, info, base)
        placement.of(spec)
        _require(spec)
        has_gate = info is not None and (Path(path) / GATE_FILE).is_file()
    infos, sources = matched(assistants, [] if info is None else info.assistants)
    tools = []
    for about, source in zip(infos, sources, strict=True):
        if isinstance(source, str):
            own, _ = placement.of(source)
            if is_tool(own):
                tools.append(about.name)
            else:
                _require(own)
    info = info or CheckpointInfo()
    template = True if info.base_format.get("chat_template") else has_chat_template(spec)
    return Outline(("base", *(about.name for about in infos)), info, has_gate, tuple(tools), spec, template)


def _require(spec: str) -> None:
    """Raises:
    CollmError: there is no such model; of an adapter, no such base.
    """
    if is_url(spec):
        from collm.remote.address import Address

        Address.parse(spec).key()
        return
    adapter = adapter_config(spec)
    require_model(spec)
    if adapter is not None:
        require_model(adapter["base_model_name_or_path"])


def check_request(system: Outline, params: SamplingParams, alone: str | None = None) -> None:
    """Is what is asked of a system possible for it?

    Raises:
        CollmError: it has no model of the name `alone`, no gate, no assistant or no calibration that `params` needs.
    """
    if alone is not None:
        if alone not in system.model_names:
            names = ", ".join(system.model_names)
            hint = nearest(alone, system.model_names)
            raise CollmError(f"there is no model {alone!r}; the models are {names}{hint and '; '}{hint}")
        return
    from collm.llm.deferral import READ_SIGNALS, make_policy, require_assistants, require_gate, settled

    params = settled(params, system.info.chosen)
    if params.deferral in (*READ_SIGNALS, "never", "always", "sampled"):
        others = len(system.model_names) - 1
        make_policy(params, others, system.has_gate, system.info.calibration, system.tools)
        return
    require_assistants(len(system.model_names) - 1)
    if params.deferral == "compose":
        require_gate(params, system.has_gate)
