"""The attention of one forward pass over a KV pool: whose queries meet which keys, in as few calls as pay.

The tokens of all rows stand one after another in one flat pass, without padding, whatever each row is wide. Keys and
values are read where they lie: rows of equal width in neighbouring slots form a *span*, attended to in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PACKED_WIDTH = 32
"""Up to this width the query heads that share a key head are stacked as more queries, so that no key is repeated."""
WASTED_POSITIONS = 128
"""Positions read in vain that cost a CPU about as much as another call; accelerators are short of calls instead."""


class Row(NamedTuple):
    """One text in a pass: `width` tokens from position `start` on, whose keys go to `slot`."""

    slot: int
    start: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.width


@dataclass(frozen=True, slots=True)
class View:
    """What a span sees in one kind of layer: positions `low` to `end`, those that `mask` `[row, 1, query, position]`
    does not hide."""

    low: int
    end: int
    mask: Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True)
class Span:
    """`rows` rows of `width` tokens: `tokens` of the flat pass. Scattered `slots` are an index, which copies."""

    rows: int
    width: int
    tokens: slice
    slots: slice | Tensor
    views: dict[str, View]


def spans(rows: Sequence[Row], windows: dict[str, int], groups: int, starts: Tensor, slots: Tensor) -> list[Span]:
    """The spans of a pass, rows in their order in it: sorted by width, then slot.

    Args:
        windows: for each kind of layer how many positions it sees; 0 is all of them.
        groups: query heads for each key head.
        starts, slots: `[row]`, those of `rows` on the device of the pass.
    """
    found, at, first = [], 0, 0
    for block in _blocks(rows, scattered=starts.device.type != "cpu"):
        width, low, high = block[0].width, block[0].slot, block[-1].slot
        own = slice(first, first + len(block))
        neighbours = [row.slot for row in block] == list(range(low, low + len(block)))
        found.append(
            Span(
                rows=len(block),
                width=width,
                tokens=slice(at, at + len(block) * width),
                slots=slice(low, high + 1) if neighbours else slots[own],
                views={kind: _view(block, window, groups, starts[own]) for kind, window in windows.items()},
            )
        )
        at, first = at + len(block) * width, first + len(block)
    return found


def _blocks(rows: Sequence[Row], scattered: bool) -> Iterator[list[Row]]:
    block: list[Row] = []
    longest = 0
    for row in rows:
        if block and row.width == block[0].width:
            wasted = longest - row.end if row.end <= longest else len(block) * (row.end - longest)
            if scattered or (row.slot == block[-1].slot + 1 and wasted <= WASTED_POSITIONS):
                block.append(row)
                longest = max(longest, row.end)
                continue
        if block:
            yield block
        block, longest = [row], row.end
    if block:
        yield block


def _view(block: Sequence[Row], window: int, groups: int, starts: Tensor) -> View:
    """The least mask that does: none where all rows see all positions between the first and the last."""
    width, end = block[0].width, max(row.end for row in block)
    first = min(row.start for row in block)
    low = max(0, first + 1 - window) if window else 0
    level = all(row.end == end for row in block)
    if level and width == 1:
        return View(low, end, None, causal=False)
    if level and first == 0 and (not window or end <= window):
        return View(0, end, None, causal=True)
    queries = starts[:, None, None, None] + torch.arange(width, device=starts.device)[:, None]
    keys = torch.arange(low, end, device=starts.device)
    seen = keys <= queries
    if window:
        seen &= keys > queries - window
    return View(low, end, seen.repeat(1, 1, groups, 1) if 1 < width <= PACKED_WIDTH else seen, causal=False)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, span: Span, kind: str, scale: float, softcap: float | None
) -> Tensor:
    """What the tokens of a span read, `[token, head, dim]`.

    Args:
        query: `[token, head, dim]`, of the whole pass.
        keys, values: `[slot, kv_head, position, dim]`, of the whole pool.
    """
    view = span.views[kind]
    key, value = keys[span.slots, :, view.low : view.end], values[span.slots, :, view.low : view.end]
    heads, groups = keys.shape[1], query.shape[1] // keys.shape[1]
    stacked = query[span.tokens].view(span.rows, span.width, heads, groups, -1).permute(0, 2, 3, 1, 4)
    if span.width <= PACKED_WIDTH and not view.causal:
        stacked = stacked.reshape(span.rows, heads, groups * span.width, -1)
    else:
        stacked = stacked.reshape(span.rows, heads * groups, span.width, -1)
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if softcap is None:
        read = F.scaled_dot_product_attention(
            stacked, key, value, attn_mask=view.mask, is_causal=view.causal, scale=scale
        )
    else:
        read = _softcapped(stacked, key, value, view, scale, softcap)
    read = read.view(span.rows, heads, groups, span.width, -1).permute(0, 3, 1, 2, 4)
    return read.reshape(span.rows * span.width, heads * groups, -1)


def _softcapped(query: Tensor, key: Tensor, value: Tensor, view: View, scale: float, cap: float) -> Tensor:
    """Gemma 2 bounds its scores by `cap tanh(. / cap)`, which no fused kernel of torch does."""
    scores = torch.tanh(query @ key.transpose(2, 3) * (scale / cap)) * cap
    if view.causal:
        scores = scores.masked_fill(~torch.ones_like(scores[0, 0], dtype=torch.bool).tril(), -torch.inf)
    elif view.mask is not None:
        scores = scores.masked_fill(~view.mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value
