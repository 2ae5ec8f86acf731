"""Keys and values addressed by absolute position, under transformers' attention interface.

Row i of a pass writes its keys at their positions in its slot and sees only what stands up to them. So rows of any
widths and lengths share one forward pass without padding, a rollback costs nothing (later positions are overwritten,
and never shown before), and any prefix can be resumed or copied to another slot.

Sliding-window layers read their window alone and keep all positions: more memory than they need, never a wrong answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from collm.models.attention import Row, Span, attend, spans
from collm.models.backbone import causal_lm
from collm.models.devices import input_device
from collm.models.paged.pool import Layer

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""RoPE scalings that do not depend on the length of the sequence; `dynamic` and `longrope` do."""
ATTENTION = "collm_kv_pool"
"""The name of `_attention` among transformers' attention functions."""


def may_support(model: torch.nn.Module) -> bool:
    """Whether the pool can give this model the right answers at all lengths, if it does at one (`agrees`)."""
    lm = causal_lm(model)
    config: Any = lm.config.get_text_config()
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    ropes = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return (
        config is lm.config  # a multimodal model is more than its text model
        and getattr(config, "num_attention_heads", None) is not None
        and set(_layer_types(config)) <= {"full_attention", "sliding_attention"}
        and all(each.get("rope_type", "default") in STATIC_ROPE for each in ropes)
        and not getattr(config, "use_bidirectional_attention", False)
    )


def _layer_types(config: Any) -> list[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = getattr(config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return list(kinds)


@dataclass(frozen=True, slots=True)
class Place:
    """On one device: where new keys and values go, and who reads which."""

    where: Tensor
    spans: list[Span]


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass. Each layer asks for what it needs where it lies: a network may lie on several devices."""

    pool: KVPool
    rows: Sequence[Row]
    where: Tensor
    starts: Tensor
    slots: Tensor
    places: dict[torch.device, Place] = field(default_factory=dict)

    def on(self, device: torch.device) -> Place:
        place = self.places.get(device)
        if place is None:
            where, starts, slots = (t.to(device, non_blocking=True) for t in (self.where, self.starts, self.slots))
            place = self.places[device] = Place(where, self.pool.spans(self.rows, starts, slots))
        return place


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    kv_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One layer of a flat pass: query `[1, head, token, dim]`, new keys and values `[1, kv_head, token, dim]`.

    A pass without a pool is somebody else's: the model stays usable by all, at the same time.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv_pass is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        return kv_pass.pool.attend(layer, query, key, value, scale, softcap, kv_pass), None
    if softcap is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scale, **kwargs
        )
        return found
    return _softcapped(query, key, value, attention_mask, scale, softcap), None


def _softcapped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """What sdpa does not do, as Gemma 2's own eager attention does it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)) * cap
    if mask is None:  # transformers makes none where all that it would say is that attention is causal
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(key.shape[2] - query.shape[2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class KVPool:
    """The slots of one model. `forward` writes and reads them; who sits in which slot is the caller's affair."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_slots = self.num_positions = 0
        self._model, self._device = model, input_device(model)
        config: Any = model.config.get_text_config()
        # For good: nothing may be swapped on a model that others use at the same time.
        config._attn_implementation = ATTENTION
        self._kinds = _layer_types(config)
        window = getattr(config, "sliding_window", None) or 0
        self._windows = {kind: window if kind == "sliding_attention" else 0 for kind in sorted(set(self._kinds))}
        self._heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._groups = config.num_attention_heads // self._heads
        # For each layer keys and values [slot, kv_head, position, dim]; the first pass tells their shapes.
        self._stored: list[tuple[Tensor, Tensor] | None] = [None] * len(self._kinds)

    @property
    def groups(self) -> int:
        """Query heads for each key head."""
        found: int = self._groups
        return found

    @property
    def layers(self) -> list[Layer]:
        """What each layer stores, as the passes have shown; nothing where keys and values have different widths."""
        found = []
        for kind, pair in zip(self._kinds, self._stored, strict=True):
            assert pair is not None, "no pass yet"
            if pair[0].shape != pair[1].shape:
                return []
            _, heads, _, dim = pair[0].shape
            found.append(Layer(heads, dim, self._windows[kind], pair[0].device))
        return found

    def spans(self, rows: Sequence[Row], starts: Tensor, slots: Tensor) -> list[Span]:
        """Of a pass, on the device of `starts` and `slots`."""
        return spans(rows, self._windows, self._groups, starts, slots)

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

    def forward(self, rows: Sequence[Row], token_ids: Sequence[int], more: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Hidden states `[token, H]` of the tokens of all rows, one row after another (sorted by width, then slot).

        `more` are numbers that are needed on the device, too: all that a pass needs goes there at once, int64. They
        come back on the device of the token ids.
        """
        assert all(row.slot < self.num_slots and row.end <= self.num_positions for row in rows), "resize first"
        count = len(token_ids)
        numbers = list(token_ids)
        for row in rows:
            numbers += range(row.start, row.end)
        for row in rows:
            numbers += [row.slot] * row.width
        numbers += [row.start for row in rows]
        numbers += [row.slot for row in rows]
        numbers += more
        uploaded = torch.tensor(numbers).to(self._device, non_blocking=True)
        ids, positions, token_slots, starts, slots, extra = uploaded.split(
            [count, count, count, len(rows), len(rows), len(more)]
        )
        heads = torch.arange(self._heads, device=uploaded.device)
        where = ((token_slots[:, None] * self._heads + heads) * self.num_positions + positions[:, None]).flatten()
        issued = Pass(self, rows, where, starts, slots)
        backbone: Any = self._model.base_model
        hidden: Tensor = backbone(
            input_ids=ids[None],
            position_ids=positions[None],
            # Four dimensions: transformers takes it for a mask that is ready, and makes none.
            attention_mask=starts.view(-1, 1, 1, 1)[:1],
            use_cache=False,
            kv_pass=issued,
        ).last_hidden_state
        return hidden[0], extra

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, issued: Pass
    ) -> Tensor:
        """Store new keys and values, and read: `[1, token, head, dim]`."""
        stored = self._stored[layer]
        if stored is None:
            stored = self._stored[layer] = (self._empty(key), self._empty(value))
        keys, values = stored
        place = issued.on(key.device)
        for tensor, new in ((keys, key), (values, value)):
            width = new.shape[-1]
            tensor.view(-1, width).index_copy_(0, place.where, new[0].transpose(0, 1).reshape(-1, width))
        queries, kind = query[0].transpose(0, 1), self._kinds[layer]
        read = [attend(queries, keys, values, span, kind, scale, softcap) for span in place.spans]
        return (read[0] if len(read) == 1 else torch.cat(read))[None]

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_zeros((self.num_slots, like.shape[1], self.num_positions, like.shape[3]))


def _resized(old: Tensor, keep: Sequence[int], num_slots: int, num_positions: int, length: int) -> Tensor:
    new = old.new_zeros((num_slots, old.shape[1], num_positions, old.shape[3]))
    for to, slot in enumerate(keep):
        new[to, :, :length] = old[slot, :, :length]
    return new
