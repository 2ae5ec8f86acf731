"""Several models from one set of weights: a base, and LoRA adapters of it that are switched on and off.

A pair whose assistants are adapters of its base then takes the memory of one model. What is given back for each
spec is a `Variant`: the shared transformers model, and `activate`, which makes it this variant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from collm.models.attaching import attach, insert
from collm.models.contents import contents, same_configuration, same_files
from collm.models.devices import parameters
from collm.models.loading import named_fingerprint, place_model, weights_fingerprint
from collm.models.placement import DEFAULT, Placement
from collm.models.specs import adapter_config

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer


class Weights:
    """A base model with any number of adapters in its layers, at most one of them active."""

    def __init__(self, model: PreTrainedModel, contents: str | None = None) -> None:
        self.model = model
        self.contents = contents
        """Of the files it was loaded from (`models.contents`)."""
        self.adapters: list[str] = []
        self._peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []
        self._active: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the base. It reads through all weights, so only when somebody asks."""
        return weights_fingerprint(self.model)

    def equals(self, other: Weights) -> bool:
        """Equal weights, and a configuration that does the same with them."""
        if not same_configuration(self.model.config, other.model.config) or self.fingerprint != other.fingerprint:
            return False
        # Fingerprints look at samples: a model that was fine-tuned in a few rows has its base's.
        ours, theirs = (dict(Variant(weights).own_parameters()) for weights in (self, other))
        return ours.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name].to(tensor.device)) for name, tensor in ours.items()
        )

    def add(self, folder: str) -> str:
        """Put the adapter of a folder into the layers; returns the name it has there. It is not active."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        name = f"shared_{len(self.adapters)}"
        if self._peft is None:
            _ = self.fingerprint  # adapters give the parameters other names
            self._peft = attach(self.model, folder, name)
        else:
            insert(self._peft, folder, name)
        self._peft.eval()
        self.adapters.append(name)
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        self._active = name
        self.activate(None)
        return name

    def activate(self, name: str | None) -> None:
        """None is the base itself."""
        if name == self._active:
            return
        active = [] if name is None else [name]
        for layer in self._layers:
            # `set_adapter` and `enable_adapters` also go through every parameter: 35 ms for 30 layers, at each turn.
            layer._active_adapter = active
        self._active = name


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the models that a set of weights holds; None is the base."""

    weights: Weights
    adapter: str | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    def activate(self) -> None:
        self.weights.activate(self.adapter)

    def fingerprint(self) -> str:
        """`weights_fingerprint` of this variant, as if it had been loaded by itself."""
        return self.weights.fingerprint if self.adapter is None else named_fingerprint(self.own_parameters())

    def own_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters under the names that PEFT gives them where there is this adapter alone."""
        named = [(name.split("."), tensor) for name, tensor in parameters(self.model)]
        wrapped = {tuple(parts[: parts.index(self.adapter) - 1]) for parts, _ in named if self.adapter in parts}
        for parts, tensor in named:
            if self.adapter in parts:
                parts = ["default" if part == self.adapter else part for part in parts]
            elif set(parts) & set(self.weights.adapters):
                continue  # another adapter's
            elif "base_layer" in parts and tuple(parts[: parts.index("base_layer")]) not in wrapped:
                parts = [part for part in parts if part != "base_layer"]
            yield ".".join(parts), tensor


class ModelStore:
    """Models by spec, each set of weights in memory once for every dtype and device.

    Adapters that change more than their own matrices (biases, the output head, new tokens) are loaded by themselves.
    """

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, Placement], Weights] = {}
        self._variants: dict[tuple[str, Placement], Variant] = {}

    def put(self, spec: str, model: PreTrainedModel, placement: Placement = DEFAULT) -> Variant:
        """A model that has been loaded already, with this placement; adapters are put into it."""
        name, placement = placement.of(spec)
        self._loaded[name, placement] = Weights(model, contents(name))
        return Variant(self._loaded[name, placement])

    def load(self, spec: str, *, dtype: str = "float32", device: str = "cpu") -> Variant:
        """The model of a spec; as `load_model`, but for what is in memory already."""
        return self._variant(*Placement(dtype, device).of(spec))

    def _variant(self, name: str, placement: Placement) -> Variant:
        if (name, placement) not in self._variants:
            config = adapter_config(name)
            if config is None or not _is_pure(config):
                found = Variant(self._weights(name, placement))
            else:
                weights = self._weights(*placement.of(str(config["base_model_name_or_path"])))
                found = Variant(weights, weights.add(name))
            self._variants[name, placement] = found
        return self._variants[name, placement]

    def _weights(self, name: str, placement: Placement) -> Weights:
        """By name, else by what it holds: one model may lie in two places."""
        if (name, placement) not in self._loaded:
            there = [(other, weights) for (other, placed), weights in self._loaded.items() if placed == placement]
            files = contents(name)
            # By the files, so that there never is a second copy; else by the weights, however they are kept.
            same = [w for other, w in there if files is not None and w.contents == files and same_files(other, name)]
            if not same:
                found = Weights(place_model(name, placement), files)
                same = [weights for _, weights in there if weights.equals(found)] or [found]
            self._loaded[name, placement] = same[0]
        return self._loaded[name, placement]


def _is_pure(config: dict[str, object]) -> bool:
    changes_more = ("modules_to_save", "trainable_token_indices")
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and not any(config.get(name) for name in changes_more)
    )
