"""A forward pass of our own for Llama and its kin: fused products, and small kernels between them.

What it computes is what transformers' modules do (`pool.Modules`), its reference; `selftest.paged_serves` compares the
two where a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from collm.models.devices import is_quantized, is_spread
from collm.models.paged.dense import Dense, Heads, Turns
from collm.models.paged.pool import Pass
from collm.models.paged.products import CannotFuse, Product

FAMILY = frozenset({"granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"})
"""They differ by biases, norms of queries and keys, factors, layers that do not turn, and names."""


@dataclass(frozen=True, slots=True)
class Layer:
    norm: Tensor
    qkv: Product
    heads: Heads
    norms: tuple[Tensor, Tensor] | None
    scale: float
    o: Product
    second_norm: Tensor
    gate_up: Product
    down: Product


class LlamaBody:
    """`Body` of one of the `FAMILY`.

    Raises:
        CannotFuse: it has parts that this pass does not know.
    """

    def __init__(self, lm: PreTrainedModel, dense: Dense) -> None:
        config: Any = lm.config.get_text_config()
        if config.model_type not in FAMILY or config.hidden_act not in ("silu", "swish"):
            raise CannotFuse(f"{config.model_type} with {getattr(config, 'hidden_act', None)}")
        if is_spread(lm) or is_quantized(lm):
            raise CannotFuse("weights that lie elsewhere, or are packed")
        backbone: Any = lm.base_model
        if type(backbone.embed_tokens) is not nn.Embedding:
            raise CannotFuse("an embedding of another kind")
        self._dense = dense
        self._embedding = backbone.embed_tokens
        self._factor = float(getattr(config, "embedding_multiplier", 1.0))
        self._residual = float(getattr(config, "residual_multiplier", 1.0))
        self._eps = float(config.rms_norm_eps)
        self._norm = backbone.norm.weight
        self._turns = _turns(backbone.rotary_emb, config.max_position_embeddings)
        self._layers = [_layer(layer, config, 2 * self._turns.cos.shape[1]) for layer in backbone.layers]

    def __call__(self, issued: Pass) -> Tensor:
        dense, pool = self._dense, issued.pool
        plan, _ = issued.on(pool.device)
        x = dense.embed(plan, self._embedding.weight)
        if self._factor != 1.0:
            x = x * self._factor
        delta: Tensor | None = None
        for n, layer in enumerate(self._layers):
            qkv = layer.qkv(dense.add_norm(x, delta, self._residual, layer.norm, self._eps))
            keys, values = pool.stored(n)
            query = dense.turn_and_store(qkv, layer.heads, self._turns, layer.norms, keys, values, plan)
            delta = layer.o(pool.read(n, query, layer.scale, None, issued).flatten(1))
            gate_up = layer.gate_up(dense.add_norm(x, delta, self._residual, layer.second_norm, self._eps))
            delta = layer.down(dense.gated(gate_up))
        return dense.add_norm(x, delta, self._residual, self._norm, self._eps)


def _layer(layer: Any, config: Any, rotated: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight, attention.k_norm.weight
    heads = Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        # SmolLM3 has layers that know no positions.
        rotated if getattr(attention, "use_rope", True) else 0,
        float(config.rms_norm_eps),
    )
    fused = config.model_type == "phi3"
    return Layer(
        norm=layer.input_layernorm.weight,
        qkv=Product(attention, *(["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"])),
        heads=heads,
        norms=norms,
        scale=float(attention.scaling),
        o=Product(attention, "o_proj"),
        second_norm=layer.post_attention_layernorm.weight,
        gate_up=Product(mlp, *(["gate_up_proj"] if fused else ["gate_proj", "up_proj"])),
        down=Product(mlp, "down_proj"),
    )


def _turns(rotary: Any, num_positions: int) -> Turns:
    frequencies: Tensor = rotary.inv_freq.float()
    angles = torch.arange(num_positions, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    return Turns(angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling)
