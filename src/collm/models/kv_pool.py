"""Keys and values addressed by absolute position, under transformers' attention interface.

Row i of a pass writes its keys at their positions in its slot and sees only what stands up to them. So rows of any
widths and lengths share one forward pass without padding, a rollback costs nothing (later positions are overwritten,
and never shown before), and any prefix can be resumed or copied to another slot.

Sliding-window layers read their window alone and keep all positions: more memory than they need, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from collm.models.attention import Row, Span, attend, spans
from collm.models.backbone import causal_lm

SUPPORTED = frozenset(
    {"gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
)
"""`model_type`s checked against a cache-free pass (tests/test_local.py)."""
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE scalings that do not depend on the length of the sequence; `dynamic` and `longrope` do."""
ATTENTION = "collm_kv_pool"
"""The name of `_attention` among transformers' attention functions."""


def supports(model: torch.nn.Module) -> bool:
    """Whether the pool is known to give this model the same answers as a pass without cache."""
    lm = causal_lm(model)
    config: Any = lm.config.get_text_config()
    softcap = getattr(config, "attn_logit_softcapping", None)
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return (
        lm.config.model_type in SUPPORTED  # the whole model's, so that no multimodal one slips in
        and set(_layer_types(config)) <= {"full_attention", "sliding_attention"}
        and all(each.get("rope_type", "default") in STATIC_ROPE for each in ropes)
        and not getattr(config, "use_bidirectional_attention", False)
        # The first releases of transformers 5 drop Gemma 2's softcap under sdpa, which they choose by default.
        and lm.config._attn_implementation in (("eager",) if softcap else ("sdpa", "eager"))
    )


def _layer_types(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return list(kinds)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kv_pool: KVPool,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer of a flat pass: query `[1, head, token, dim]`, new keys and values `[1, kv_head, token, dim]`."""
    return kv_pool.attend(int(module.layer_idx), query, key, value, scaling, softcap), None  # type: ignore[arg-type]


# It has no mask function: transformers then makes none, for ours come with the spans.
AttentionInterface.register(ATTENTION, _attention)


class KVPool:
    """The slots of one model. `forward` writes and reads them; who sits in which slot is the caller's affair."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_slots = self.num_positions = 0
        self._model = model
        config: Any = model.config.get_text_config()
        self._kinds = _layer_types(config)
        window = getattr(config, "sliding_window", None) or 0
        self._windows = {kind: window if kind == "sliding_attention" else 0 for kind in sorted(set(self._kinds))}
        self._heads: int = config.num_key_value_heads
        self._groups = config.num_attention_heads // self._heads
        # For each layer keys and values [slot, kv_head, position, dim]; the first pass tells their shapes.
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * len(self._kinds)
        self._spans: list[Span] = []
        self._where: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._stored if pair is not None for tensor in pair)

    def resize(self, keep: Sequence[int], num_slots: int, num_positions: int) -> None:
        """Room for so many slots and positions; the slots `keep` become the first ones, the others are empty.

        Layer by layer: at no time is more than one layer stored twice.
        """
        assert len(keep) <= num_slots
        length = min(num_positions, self.num_positions)
        for i, pair in enumerate(self._stored):
            if pair is not None:
                self._stored[i] = None
                self._stored[i] = (
                    _resized(pair[0], keep, num_slots, num_positions, length),
                    _resized(pair[1], keep, num_slots, num_positions, length),
                )
        self.num_slots, self.num_positions = num_slots, num_positions

    def free(self) -> None:
        """Give all memory back."""
        self._stored = [None] * len(self._kinds)
        self.num_slots = self.num_positions = 0

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of a slot, into another one."""
        for pair in self._stored:
            for tensor in pair or ():
                tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Nothing of what a slot held can be read again: NaN would pass through masks."""
        for pair in self._stored:
            for tensor in pair or ():
                tensor[slot].zero_()

    def forward(self, rows: Sequence[Row], token_ids: Sequence[int]) -> Tensor:
        """Hidden states `[token, H]` of the tokens of all rows, one row after another (sorted by width, then slot)."""
        assert all(row.slot < self.num_slots and row.end <= self.num_positions for row in rows), "resize first"
        device = self._model.device
        positions = torch.tensor([p for row in rows for p in range(row.start, row.end)], device=device)
        slots = torch.tensor([row.slot for row in rows for _ in range(row.width)], device=device)
        heads = torch.arange(self._heads, device=device)
        self._where = ((slots[:, None] * self._heads + heads) * self.num_positions + positions[:, None]).flatten()
        like = torch.empty(0, dtype=self._model.dtype, device=device)
        self._spans = spans(rows, self._windows, self._groups, like)
        config: Any = self._model.config
        backbone: Any = self._model.base_model
        usual, config._attn_implementation = config._attn_implementation, ATTENTION
        try:
            hidden: Tensor = backbone(
                input_ids=torch.tensor([token_ids], device=device),
                position_ids=positions[None],
                use_cache=False,
                kv_pool=self,
            ).last_hidden_state
        finally:
            config._attn_implementation = usual
        return hidden[0]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Store new keys and values, and read: `[1, token, head, dim]`."""
        stored = self._stored[layer]
        if stored is None:
            stored = self._stored[layer] = (self._empty(key), self._empty(value))
        keys, values = stored
        for tensor, new in ((keys, key), (values, value)):
            width = new.shape[-1]
            tensor.view(-1, width).index_copy_(0, self._where, new[0].transpose(0, 1).reshape(-1, width))
        queries, kind = query[0].transpose(0, 1), self._kinds[layer]
        read = [attend(queries, keys, values, span, kind, scale, softcap) for span in self._spans]
        return (read[0] if len(read) == 1 else torch.cat(read))[None]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.num_slots, like.shape[1], self.num_positions, like.shape[3]))


def _resized(old: Tensor, keep: Sequence[int], num_slots: int, num_positions: int, length: int) -> Tensor:
    new = old.new_zeros((num_slots, old.shape[1], num_positions, old.shape[3]))
    for to, slot in enumerate(keep):
        new[to, :, :length] = old[slot, :, :length]
    return new
