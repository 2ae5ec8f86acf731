"""Who writes the own texts of a recipe: told apart without loading a weight, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from collm.data.formatting import Formatter, PromptFormat
from collm.identity.finding import prompts_identity
from collm.llm import CollaborativeLM
from collm.llm.loading import load
from collm.llm.sources import matched
from collm.models.checkpoint import load_base
from collm.models.info import base_spec, found, load_info
from collm.models.loading import load_tokenizer
from collm.models.local import LocalModel
from collm.models.placement import Placement
from collm.models.specs import is_tool, is_url
from collm.training.checking import placed_assistants
from collm.training.made_from import OF_WEIGHTS, first_day, stamp
from collm.training.recipe import OwnTextsSection, Recipe
from collm.training.writers import formatter_of

CONFIGS = ("config.json", "generation_config.json", "adapter_config.json")
"""What decides answers besides the weights and prompts: how to compute, and which tokens end a text."""


def load_writer(recipe: Recipe, section: OwnTextsSection) -> CollaborativeLM:
    how: dict[str, Any] = {"dtype": section.dtype, "device": section.device}
    if section.checkpoint is not None:
        return CollaborativeLM.from_pretrained(section.checkpoint, placed_assistants(recipe, section.checkpoint), **how)
    asked = recipe.writer(section.writer)
    # Of a model that is a pair, the base alone is loaded: its assistants may not be at hand.
    if is_url(asked.model):
        server = load(asked.model, **how)
        writer, tokenizer = server.models[0], server.formatters[0].tokenizer
    else:
        network, _, tokenizer, _ = load_base(asked.model, **how)
        writer = LocalModel(network, tokenizer)
    # A plain model does not know how the recipe shows it its prompts.
    return CollaborativeLM([writer], [formatter_of(tokenizer, asked, first_day(recipe.out))], has_gate=False)


def looks(recipe: Recipe, section: OwnTextsSection) -> list[Any]:
    """What tells the writer without reading its weights: of each model its files, precision and prompts (and the day
    that these tell). The traces say it to the last bit: a run that goes on compares."""
    if section.checkpoint is None:
        asked = recipe.writer(section.writer)
        files = _files(asked.model, section.dtype)
        if is_url(asked.model):
            return [*files, asked.format.to_dict()]
        tokenizer = load_tokenizer(base_spec_of(asked.model, section.dtype))
        return [*files, prompts_identity(formatter_of(tokenizer, asked, first_day(recipe.out)))]
    told = _files(section.checkpoint, section.dtype)
    if is_url(section.checkpoint):
        return told
    path, _ = Placement(section.dtype).of(section.checkpoint)
    info = load_info(path)
    told.append(_prompts(base_spec_of(path, section.dtype), {} if info is None else info.base_format))
    if info is not None:
        told += [info.base_fingerprint, info.cuts]
        of_training = found(info, path).assistants
        for about, source in zip(*matched(placed_assistants(recipe, section.checkpoint), of_training), strict=True):
            spec = str(source)
            told += [about.name, *_files(spec, section.dtype)]
            if not is_tool(spec):
                told.append(dict(about.format) if is_url(spec) else _prompts(spec, about.format))
    return told


def base_spec_of(spec: str, dtype: str) -> str:
    """Whose tokenizer the base of a checkpoint, or a plain model, has."""
    path, _ = Placement(dtype).of(spec)
    return base_spec(path, load_info(path))


def _files(spec: str, dtype: str) -> list[Any]:
    """Of a model, and of the base that its checkpoint names."""
    if is_url(spec):
        return [spec]
    path, placement = Placement(dtype).of(spec)
    specs = [path] if is_tool(path) else list(dict.fromkeys([path, base_spec_of(path, dtype)]))
    told: list[Any] = [placement.dtype, placement.quantization]
    for each in specs:
        own, asked = Placement(dtype).of(each)
        told += [stamp(own, (*OF_WEIGHTS, *CONFIGS)) or own, asked.quantization]
    return told


def _prompts(spec: str, format: Mapping[str, Any]) -> str:
    return prompts_identity(Formatter(load_tokenizer(spec), PromptFormat(**format)))
