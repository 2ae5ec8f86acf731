"""Static storage of keys and values in blocks, and passes of a network over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from collm.models.attention import Row
from collm.models.devices import input_device
from collm.models.paged import plan as planned
from collm.models.paged.blocks import BLOCK, Blocks
from collm.models.paged.ops import Ops
from collm.models.paged.plan import IDS, POSITIONS, Plan, fill

TILE, WIDE_TILE = 16, 64
"""Rows of a piece's tile, tokens times query heads of a key head: of passes that decode, and of those that read."""
NARROW = 256
"""Tokens of a pass that still decodes."""


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer stores for a token: two times `heads` x `dim` numbers; `window`: positions that it sees (0: all)."""

    heads: int
    dim: int
    window: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class Pass:
    """A pass of a network on its way through the layers, each of which asks for the plan where it lies."""

    pool: PagedPool
    plan: Plan
    places: dict[torch.device, tuple[Plan, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Plan, Tensor]:
        """The plan and the table of blocks."""
        place = self.places.get(device)
        if place is None:
            plan = self.plan.to(device)
            table = self.pool.tables[device]
            self.pool.ops.enter(plan, table, self.pool.blocks.size)
            place = self.places[device] = plan, table
        return place


class Body(Protocol):
    """A network without its output side."""

    def __call__(self, issued: Pass) -> Tensor:
        """Hidden states `[T, H]` of the tokens of a plan."""
        ...


class Modules:
    """transformers' own modules, whose attention is ours: every architecture, and the twin of `LlamaBody`."""

    def __init__(self, lm: PreTrainedModel) -> None:
        self._lm = lm

    def __call__(self, issued: Pass) -> Tensor:
        ids, positions = (issued.plan.line(which).long()[None] for which in (IDS, POSITIONS))
        backbone: Any = self._lm.base_model
        hidden: Tensor = backbone(
            input_ids=ids,
            position_ids=positions,
            # Four dimensions: transformers takes it for a mask that is ready, and makes none.
            attention_mask=positions.view(-1, 1, 1, 1)[:1],
            use_cache=False,
            kv_pass=issued,
        ).last_hidden_state
        return hidden[0]


class PagedPool:
    """The storage of one network, reserved once (`reserve`): its addresses never change, so that graphs may keep them.

    Args:
        layers: as a pass over a `KVPool` has shown them.
        groups: query heads for each key head.
        recorded: runs the network where a graph is recorded, instead of `body`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        layers: Sequence[Layer],
        groups: int,
        ops: Ops,
        body: Body | None = None,
        block: int = BLOCK,
        recorded: Body | None = None,
    ) -> None:
        self.ops, self.layers, self.groups = ops, tuple(layers), groups
        self.body: Body = body or Modules(lm)
        self.recorded = recorded
        self.device = self.layers[0].device if self.layers else input_device(lm)
        self.dtype = lm.dtype
        self.block = block
        self.blocks = Blocks(0, 0, 0, block)
        self.tables: dict[torch.device, Tensor] = {}
        self._stored: list[tuple[Tensor, Tensor]] = []
        self.moves = 0
        """How often the storage has moved: what was captured before is void."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._stored for tensor in pair)

    @property
    def block_bytes(self) -> int:
        """What a block takes, in all layers together."""
        return sum(2 * layer.heads * layer.dim for layer in self.layers) * self.block * self.dtype.itemsize

    def tile(self, num_tokens: int) -> int:
        least = 1 << (self.groups - 1).bit_length()
        return max(least, TILE if num_tokens <= NARROW else WIDE_TILE)

    def reserve(self, num_slots: int, num_blocks: int, max_length: int) -> None:
        """Take the memory of so many blocks, and of one more, to which the tokens go that pad a pass."""
        self.moves += 1
        width = -(-max_length // self.block)
        self.blocks = Blocks(num_blocks, num_slots, width, self.block)
        self._stored = []
        for layer in self.layers:
            shape = (num_blocks + 1, layer.heads, self.block, layer.dim)
            pair = [torch.empty(shape, dtype=self.dtype, device=layer.device) for _ in range(2)]
            self._stored.append((pair[0], pair[1]))
            if layer.device not in self.tables or self.tables[layer.device].shape != (num_slots + 1, width):
                self.tables[layer.device] = torch.zeros((num_slots + 1, width), dtype=torch.int32, device=layer.device)

    def free(self) -> None:
        """Give all memory back."""
        self.moves += 1
        self._stored, self.tables = [], {}
        self.blocks = Blocks(0, 0, 0, self.block)

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot begin with the first `length` positions of another one."""
        count = self.blocks.share(source, target, length)
        for table in self.tables.values():
            table[target, :count] = table[source, :count]

    def clear(self, slot: int) -> None:
        """A slot holds nothing any more. What its blocks hold is never read again, for no text reads beyond itself."""
        self.blocks.clear(slot)

    def fill(self, numbers: NDArray[np.int32], rows: Sequence[Row], token_ids: Sequence[int], tile: int) -> int:
        """Make room for the tokens of a pass, and write it down; returns how many items of work it has."""
        for source, target in self.blocks.write_rows(rows):
            for pair in self._stored:
                for tensor in pair:
                    tensor[target].copy_(tensor[source])
        return fill(numbers, rows, token_ids, self.blocks, tile // self.groups)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What runs belongs to a graph."""
        before, self.body = self.body, self.recorded or self.body
        try:
            yield
        finally:
            self.body = before

    def run(self, plan: Plan) -> Tensor:
        """Hidden states `[T, H]` of the tokens of a plan."""
        return self.body(Pass(self, plan))

    def forward(self, rows: Sequence[Row], token_ids: Sequence[int], more: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """A pass outside of any graph; as `KVPool.forward`."""
        count = len(token_ids)
        size = planned.size(count)
        numbers = np.empty(size // 2 + len(more), dtype=np.int64)
        numbers[size // 2 :] = more
        tile = self.tile(count)
        items = self.fill(numbers[: size // 2].view(np.int32), rows, token_ids, tile)
        uploaded = torch.from_numpy(numbers).to(self.device, non_blocking=True)
        hidden = self.run(Plan(uploaded[: size // 2].view(torch.int32), count, tile, items))
        return hidden, uploaded[size // 2 :]

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[block, kv_head, position in the block, dim]`."""
        return self._stored[layer]

    def store(self, layer: int, key: Tensor, value: Tensor, issued: Pass) -> None:
        """New keys and values `[token, kv_head, dim]`."""
        keys, values = self._stored[layer]
        plan, _ = issued.on(keys.device)
        self.ops.store(key, value, keys, values, plan)

    def read(self, layer: int, query: Tensor, scale: float, softcap: float | None, issued: Pass) -> Tensor:
        """What the queries `[token, head, dim]` of a pass read."""
        keys, values = self._stored[layer]
        plan, table = issued.on(keys.device)
        return self.ops.attend(query, keys, values, plan, table, scale, self.layers[layer].window, softcap)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, issued: Pass
    ) -> Tensor:
        """Store new keys and values, and read; as `KVPool.attend`."""
        self.store(layer, key[0].transpose(0, 1), value[0].transpose(0, 1), issued)
        return self.read(layer, query[0].transpose(0, 1), scale, softcap, issued)[None]
