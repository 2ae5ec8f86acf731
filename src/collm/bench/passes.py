"""What a bare forward pass costs: the network alone, on tensors that are ready, with a cache that only stores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from collm.bench.paired import synchronise
from collm.models import narrow
from collm.models.backbone import hidden_states, project

SMALL = 64
"""Tokens in a pass up to which it is repeated."""


class _Layer(CacheLayerMixin):
    """Keys and values `[rows, kv_head, position, head_dim]`, written in place behind `context` positions of zeros.

    What stands in the context costs the same whatever it is, so it is never computed.
    """

    is_sliding = False

    def __init__(self, context: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.context, self.room = context, room
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_zeros((rows, heads, self.context + self.room, head_dim))
        self.values = value_states.new_zeros((rows, heads, self.context + self.room, value_states.shape[3]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.context + key_states.shape[2]
        self.keys[:, :, self.context : end] = key_states
        self.values[:, :, self.context : end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.context

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.context + query_length, 0

    def get_max_length(self) -> int:
        return self.context + self.room

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in the first releases of transformers 5."""
        return self.context + self.room


class BarePasses:
    """Passes of a network over `rows` texts at once, behind a context of fixed length.

    A pass goes from token ids on the device to the most probable next token after every position, on the host: what
    any decoder needs at least.
    """

    def __init__(self, network: PreTrainedModel, rows: int, context: int, widest: int) -> None:
        narrow.prepare(network)
        self.network, self.rows = network, rows
        config: Any = network.config.get_text_config()
        self._cache = Cache(layers=[_Layer(context, widest) for _ in range(config.num_hidden_layers)])
        self._ids = torch.arange(rows * widest, device=network.device).view(rows, widest) % config.vocab_size

    @torch.inference_mode()
    def run(self, width: int) -> list[int]:
        """One pass over `width` new tokens of each row: the most probable next ones, row by row.

        By the products that the engine uses, too: a ceiling of slower ones could be passed.
        """
        with narrow.narrow_products():
            hidden = hidden_states(self.network, self._ids[:, :width], past_key_values=self._cache, use_cache=True)
            top: list[int] = project(self.network, hidden.flatten(0, 1)).argmax(dim=-1).tolist()
        return top

    def seconds(self, width: int) -> float:
        """Wall time of one pass."""
        synchronise(self.network.device)
        start = time.perf_counter()
        self.run(width)
        return time.perf_counter() - start


Measured = list[tuple[int, int, float]]
"""(rows, tokens of each row, seconds of a pass)."""


def measure_passes(benches: Iterable[BarePasses], widths: Sequence[int]) -> Measured:
    """The mean of three passes for each number of rows and each width; one where that is long anyway.

    Not the median: what is compared with these times has all its hiccups, too.
    """
    measured = []
    for bench in benches:
        for width in widths:
            repeats = 3 if bench.rows * width <= SMALL else 1
            seconds = sum(bench.seconds(width) for _ in range(repeats)) / repeats
            measured.append((bench.rows, width, seconds))
    return measured
