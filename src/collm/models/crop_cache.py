"""transformers' own KV cache where the pool does not serve: a text at a time, rolled back by `crop`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from collm.models.backbone import hidden_states
from collm.models.devices import input_device
from collm.views import View

PIECE = 1024
"""Tokens of one forward pass at most."""


@dataclass(slots=True, eq=False)
class Kept:
    """The first `held` tokens of a view, as it was when it had been rewound `rewinds` times, are in `cache`."""

    cache: DynamicCache
    held: int = 0
    rewinds: int = 0
    used: int = 0
    ended: bool = False


class CropCache:
    """The caches of at most `num_slots` texts."""

    def __init__(self, lm: PreTrainedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self._lm = lm
        self._kept: dict[View, Kept] = {}
        self._ended: deque[View] = deque()
        self._clock = 0

    @property
    def num_bytes(self) -> int:
        return sum(
            tensor.nbytes
            for kept in self._kept.values()
            for layer in kept.cache.layers
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if tensor is not None
        )

    def held(self, view: View) -> int:
        kept = self._kept.get(view)
        return 0 if kept is None else min(kept.held, view.valid_since(kept.rewinds))

    def release(self, view: View) -> None:
        """From any thread; it takes effect with the next pass."""
        if view in self._kept:
            self._ended.append(view)

    def forget(self) -> None:
        self._kept = {}

    def read(self, view: View, length: int, num_last: int) -> Tensor:
        """Hidden states `[num_last, H]` of the last of the first `length` tokens; computed is what is not held."""
        kept = self._of(view)
        start = min(kept.held, view.valid_since(kept.rewinds), length - num_last)
        surplus = kept.cache.get_seq_length() - start
        if surplus:
            kept.cache.crop(-surplus)
        kept.held, kept.rewinds = start, view.rewinds
        found: list[Tensor] = []
        try:
            while kept.held < length:
                end = min(length, kept.held + PIECE)
                ids = torch.tensor([view.token_ids[kept.held : end]], device=input_device(self._lm))
                hidden = hidden_states(self._lm, ids, past_key_values=kept.cache, use_cache=True)[0]
                found.append(hidden[max(0, length - num_last - kept.held) :])
                kept.held = end
        except BaseException:
            del self._kept[view]
            raise
        return torch.cat(found)[-num_last:] if num_last else torch.empty(0)

    def _of(self, view: View) -> Kept:
        while self._ended:
            ended = self._kept.get(self._ended.popleft())
            if ended is not None:
                ended.ended = True
        if view not in self._kept:
            # Ended texts first; those that nobody has called ended (direct callers) after them.
            spare = sorted((not kept.ended, kept.used, n, v) for n, (v, kept) in enumerate(self._kept.items()))
            for *_, other in spare[: max(0, len(self._kept) + 1 - self.num_slots)]:
                del self._kept[other]
            # Without the configuration every layer keeps all positions, so that each can be rolled back.
            self._kept[view] = Kept(DynamicCache())
        self._clock += 1
        kept = self._kept[view]
        kept.used, kept.ended = self._clock, False
        return kept
