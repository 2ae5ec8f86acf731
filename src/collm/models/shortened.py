"""A model cut short: its first layers with its own embeddings, final norm and head."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from collm.errors import CollmError


def first_layers(network: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A copy of a model without the layers from `num_layers` on, in evaluation mode.

    Raises:
        CollmError: the model has not more layers than that.
    """
    config: Any = copy.deepcopy(network.config)
    if not 0 < num_layers < config.num_hidden_layers:
        raise CollmError(f"the model has {config.num_hidden_layers} layers; the base takes from 1 to one less")
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:num_layers]
    short: PreTrainedModel = type(network)(config).to(network.device, network.dtype)  # type: ignore[arg-type]
    known = short.state_dict()
    short.load_state_dict({name: value for name, value in network.state_dict().items() if name in known})
    short.generation_config = copy.deepcopy(network.generation_config)
    short.eval()
    return short
