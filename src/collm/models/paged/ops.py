"""What a pass does with stored keys and values: an interface, and its plain twin in torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from collm.models.paged.plan import POSITIONS, SLOT, SLOTS, START, TOKEN, WHERE, WIDTH, Plan


class Ops(Protocol):
    """Storage of a layer: keys and values `[block, kv_head, position in the block, dim]`; `table` `[slot, block]`."""

    def enter(self, plan: Plan, table: Tensor, size: int) -> None:
        """Tell the table the blocks that the tokens of a pass are written to."""
        ...

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> None:
        """Put new keys and values `[token, kv_head, dim]` to their places."""
        ...

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: Plan,
        table: Tensor,
        scale: float,
        window: int,
        softcap: float | None,
    ) -> Tensor:
        """What the queries `[token, head, dim]` of a pass read: each the positions up to its own, `window` of them at
        most (0: all)."""
        ...


class TorchOps:
    """The plain twin of `TritonOps`, text by text; it reads the plan on the host."""

    def enter(self, plan: Plan, table: Tensor, size: int) -> None:
        slots, positions, where = (plan.line(which).long() for which in (SLOTS, POSITIONS, WHERE))
        table[slots, positions // size] = (where // size).to(table.dtype)

    def store(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, plan: Plan) -> None:
        where = plan.line(WHERE).long()
        block, offset = where // keys.shape[2], where % keys.shape[2]
        keys[block, :, offset] = key
        values[block, :, offset] = value

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        plan: Plan,
        table: Tensor,
        scale: float,
        window: int,
        softcap: float | None,
    ) -> Tensor:
        out, groups = torch.zeros_like(query), query.shape[1] // keys.shape[1]
        for token, width, slot, start in _texts(plan):
            end, low = start + width, max(0, start + 1 - window) if window else 0
            blocks = table[slot, : -(-end // keys.shape[2])].long()
            key, value = (t[blocks].transpose(0, 1).flatten(1, 2)[:, low:end] for t in (keys, values))
            own = slice(token, token + width)
            position = torch.arange(start, end, device=query.device)[:, None]
            at = torch.arange(low, end, device=query.device)
            seen = at <= position
            if window:
                seen &= at > position - window
            key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
            read = _read(query[own].transpose(0, 1), key, value, seen, scale, softcap)
            out[own] = read.transpose(0, 1)
        return out


def _read(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float | None) -> Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    scores = torch.tanh(query @ key.transpose(1, 2) * (scale / softcap)) * softcap
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def _texts(plan: Plan) -> Iterator[tuple[int, int, int, int]]:
    """First token, width, slot and first position of each text, its pieces put together again."""
    pieces = torch.stack([plan.line(which) for which in (TOKEN, WIDTH, SLOT, START)]).T.tolist()
    text: tuple[int, int, int, int] | None = None
    for token, width, slot, start in pieces:
        if not width:
            continue
        if text is not None and text[2] == slot and text[3] + text[1] == start and text[0] + text[1] == token:
            text = (text[0], text[1] + width, slot, text[3])
            continue
        if text is not None:
            yield text
        text = (token, width, slot, start)
    if text is not None:
        yield text
