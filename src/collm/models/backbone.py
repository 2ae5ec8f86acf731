"""A causal language model taken apart: hidden states here, logits only for the positions that need them.

The output head is a fifth of a small model's work and its logits are most of its memory, so neither training nor
scoring nor decoding computes `[batch, length, vocabulary]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collm.errors import CollmError
from collm.models.devices import input_device

LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time in training and scoring: 256 MiB in float32, whatever the vocabulary."""


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (whose adapters live in its layers), or the model itself."""
    inner = model if isinstance(model, PreTrainedModel) else model.get_base_model()  # type: ignore[operator]
    assert isinstance(inner, PreTrainedModel)
    return inner


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Last hidden states `[B, T, H]`, after the final norm: what the output head and the gate see."""
    lm: Any = causal_lm(model)
    # Llama 4 and Mllama call themselves a part of a larger model: their own body goes by another name.
    backbone = lm.model if lm.base_model is lm else lm.base_model
    states: Tensor = backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
    return states


def project(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits `[N, V]` of hidden states `[N, H]`, as the model itself computes them (`check_project` makes sure)."""
    lm = causal_lm(model)
    logits: Tensor = lm.get_output_embeddings()(hidden)
    config: Any = lm.config.get_text_config()
    # The three ways in which architectures rescale their logits: Cohere, Granite, Gemma 2.
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def logits_rows(model: nn.Module) -> int:
    """Positions whose logits exist at a time: 1,365 for a vocabulary of 49k, 441 for one of 152k."""
    return max(1, LOGITS_AT_ONCE // int(causal_lm(model).config.get_text_config().vocab_size))


def rope_switches(model: nn.Module) -> tuple[int, ...]:
    """Lengths beyond which RoPE `longrope` (Phi-3.5, Phi-4-mini) takes other factors, for the *whole* batch: rows on
    different sides of one must not share a batch. Ascending; empty where no text depends on its batch-mates."""
    parameters: Any = getattr(causal_lm(model).config.get_text_config(), "rope_parameters", None) or {}
    # One set of parameters, or one for each type of layer.
    sections = [parameters] if "rope_type" in parameters else [v for v in parameters.values() if isinstance(v, dict)]
    return tuple(sorted({s["original_max_position_embeddings"] for s in sections if s.get("rope_type") == "longrope"}))


@torch.inference_mode()
def check_project(model: nn.Module) -> None:
    """Refuse an architecture whose logits `project` does not reproduce, instead of training on wrong ones.

    Raises:
        CollmError: naming the architecture.
    """
    lm = causal_lm(model)
    ids = torch.arange(1, 5, device=input_device(lm))[None]
    training = lm.training
    lm.eval()
    expected = lm(input_ids=ids, use_cache=False).logits[0].float()
    try:
        found = project(lm, hidden_states(lm, ids, use_cache=False)[0]).float()
    except (AttributeError, TypeError):  # other parts than a body and a head
        found = expected[:0]
    lm.train(training)
    if bool(expected.isnan().any()):
        raise CollmError(f"{lm.name_or_path or type(lm).__name__}: the weights give NaN logits; they are damaged")
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.1
    if expected.shape != found.shape or not torch.allclose(expected, found, atol=tolerance, rtol=tolerance):
        raise CollmError(
            f"{type(lm).__name__} computes its logits in a way that collm does not know; please report the architecture"
        )
