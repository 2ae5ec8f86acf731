"""Keys and values addressed by absolute position, under transformers' `Cache` interface.

Row i of a batch writes its keys at their positions in its slot, and a per-row mask lets position p see only what it
may. So rows of different lengths share one forward pass without left padding, a rollback costs nothing (later
positions are overwritten, and the mask never shows them), and any prefix can be resumed.

Sliding-window layers get their own mask and keep all positions: more memory than they need, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from collm.models.backbone import causal_lm

SUPPORTED = frozenset(
    {"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""`model_type`s checked against a cache-free pass (tests/test_local.py)."""
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE scalings that do not depend on the length of the sequence; `dynamic` and `longrope` do."""
LENGTH_STEP = 64
"""Positions by which the pool grows, at least; it also grows by a quarter."""


def supports(model: torch.nn.Module) -> bool:
    """Whether the pool is known to give this model the same answers as a pass without cache."""
    lm = causal_lm(model)
    config: Any = lm.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return (
        lm.config.model_type in SUPPORTED  # the whole model's, so that no multimodal one slips in
        and set(_layer_types(config)) <= {"full_attention", "sliding_attention"}
        and all(each.get("rope_type", "default") in STATIC_ROPE for each in ropes)
        and not getattr(config, "use_bidirectional_attention", False)
        and lm.config._attn_implementation in ("sdpa", "eager")
    )


def _layer_types(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return list(kinds)


class _Layer(CacheLayerMixin):
    """Keys and values `[slot, kv_head, position, head_dim]`; the pool says where a pass writes and reads."""

    is_sliding = False

    def __init__(self, pool: KVPool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pool = pool
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.pool.num_slots, key_states.shape[1], self.pool.max_length)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def grow(self) -> None:
        if self.is_initialized:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((self.pool.num_slots, old.shape[1], self.pool.max_length, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pool = self.pool
        self.keys[pool.slots[:, None], :, pool.positions] = key_states.transpose(1, 2)
        self.values[pool.slots[:, None], :, pool.positions] = value_states.transpose(1, 2)
        rows: slice | Tensor = pool.slots if pool.block is None else pool.block
        return self.keys[rows, :, : pool.end], self.values[rows, :, : pool.end]

    def swap(self, a: int, b: int, length: int) -> None:
        if self.is_initialized:
            for tensor in (self.keys, self.values):
                kept = tensor[a, :, :length].clone()
                tensor[a, :, :length] = tensor[b, :, :length]
                tensor[b, :, :length] = kept

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.pool.end, 0

    def get_max_length(self) -> int:
        return self.pool.max_length

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in the first releases of transformers 5."""
        return self.pool.max_length


class KVPool(Cache):
    """The slots of one model. `forward` writes and reads them; who sits in which slot is the caller's affair."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_slots, self.max_length = 1, LENGTH_STEP
        self.slots: Tensor
        self.positions: Tensor
        self.block: slice | None = None
        self.end = 0
        self._model = model
        config: Any = model.config.get_text_config()
        self._kinds = sorted(set(_layer_types(config)))
        self._window: int = getattr(config, "sliding_window", None) or 0
        self._layers = [_Layer(self) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self._layers))

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room; what is stored stays."""
        if num_slots <= self.num_slots and length <= self.max_length:
            return
        self.num_slots = max(num_slots, self.num_slots)
        if length > self.max_length:
            self.max_length = -(-max(length, self.max_length * 5 // 4) // LENGTH_STEP) * LENGTH_STEP
        for layer in self._layers:
            layer.grow()

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for layer in self._layers:
            layer.swap(a, b, length)

    def forward(self, slots: Sequence[int], tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> Tensor:
        """Hidden states `[row, width, H]` of rows that go on at `starts`; columns past a row's end repeat its last."""
        device = self._model.device
        lengths = torch.tensor([len(row) for row in tokens])
        width = int(lengths.max())
        ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in tokens])
        positions = torch.tensor(starts)[:, None] + torch.minimum(torch.arange(width)[None], lengths[:, None] - 1)
        self.end = int(positions.max()) + 1
        assert self.end <= self.max_length and max(slots) < self.num_slots, "reserve first"
        self.slots, self.positions = torch.tensor(slots, device=device), positions.to(device)
        self.block = slice(slots[0], slots[0] + len(slots))
        if list(slots) != list(range(slots[0], slots[0] + len(slots))):
            self.block = None  # scattered rows are gathered, which copies them
        backbone: Any = self._model.base_model
        hidden: Tensor = backbone(
            input_ids=ids.to(device),
            attention_mask=self._mask(),
            position_ids=self.positions,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def _mask(self) -> Tensor | dict[str, Tensor]:
        """Additive masks `[row, 1, query, key]`; a dictionary by kind for models that mix kinds of layers."""
        keys, queries = torch.arange(self.end, device=self.positions.device), self.positions[:, None, :, None]
        causal = keys <= queries
        masks = {}
        for kind in self._kinds:
            visible = causal if kind == "full_attention" else causal & (keys > queries - self._window)
            bias = torch.zeros(visible.shape, dtype=self._model.dtype, device=keys.device)
            masks[kind] = bias.masked_fill_(~visible, torch.finfo(self._model.dtype).min)
        return masks if len(masks) > 1 else masks[self._kinds[0]]
