"""transformers' own KV caches where the pool does not serve, one for each text, rolled back by `crop`.

Texts that bring as many new tokens share a pass: their caches are put side by side for it, padded on the left, and what
is new is handed back. That copies what they hold, as one more reading of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from collm.models.backbone import hidden_states, rope_switches
from collm.models.devices import input_device
from collm.views import View

PIECE = 1024
"""Tokens of one forward pass at most."""
WIDEST = 64
"""New tokens of each text that share a pass, at most."""


@dataclass(slots=True, eq=False)
class Kept:
    """The first `held` tokens of a view, as it was when it had been rewound `rewinds` times, are in `cache`."""

    cache: DynamicCache
    held: int = 0
    rewinds: int = 0
    used: int = 0
    ended: bool = False
    side: int = 0
    """Of the switches of RoPE, on which its keys were made."""


Wanted = tuple[View, int, int]
"""A text, how many of its tokens, and of how many of the last of them hidden states are wanted."""


class CropCache:
    """The caches of at most `num_slots` texts, and of `max_tokens` in all, if given.

    `together`: texts may share a pass, as a trial has shown.
    """

    def __init__(self, lm: PreTrainedModel, num_slots: int) -> None:
        self.num_slots = num_slots
        self.max_tokens: int | None = None
        self.together = False
        self._lm = lm
        self._switches = rope_switches(lm)
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

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether texts of so many tokens can be held at once."""
        return self.max_tokens is None or sum(lengths) <= self.max_tokens

    def held(self, view: View) -> int:
        kept = self._kept.get(view)
        return 0 if kept is None else min(kept.held, view.valid_since(kept.rewinds))

    def release(self, view: View) -> None:
        """From any thread; it takes effect with the next pass."""
        if view in self._kept:
            self._ended.append(view)

    def forget(self) -> None:
        self._kept = {}

    def clear(self, view: View) -> None:
        """Nothing of what is held of a text may be read again: what is not a number spoils keys before it, too."""
        self._kept.pop(view, None)

    def read(self, texts: Sequence[Wanted]) -> list[Tensor]:
        """For each text the hidden states `[num_last, H]` of the last of its first `length` tokens; computed is what is
        not held. No view comes twice, and all fit."""
        self._make_room(texts)
        rows = [self._ready(*text) for text in texts]
        groups: dict[tuple[int, ...], list[int]] = {}
        for n, ((_, length, _), kept) in enumerate(zip(texts, rows, strict=True)):
            width = length - kept.held
            together = self.together and 0 < width <= WIDEST
            groups.setdefault((width, kept.side) if together else (width, kept.side, n), []).append(n)
        found: dict[int, Tensor] = {}
        try:
            for members in groups.values():
                if len(members) == 1:
                    [n] = members
                    found[n] = self._read_alone(rows[n], *texts[n])
                else:
                    hidden = self._read_together([rows[n] for n in members], [texts[n] for n in members])
                    for n, own in zip(members, hidden, strict=True):
                        found[n] = own[len(own) - texts[n][2] :]
        except BaseException:
            for view, _, _ in texts:
                self._kept.pop(view, None)
            raise
        return [found[n] for n in range(len(texts))]

    def _make_room(self, texts: Sequence[Wanted]) -> None:
        """Give up what others have left until these fit."""
        self._settle_ended()
        if self.max_tokens is None:
            return
        own = {view for view, _, _ in texts}
        others = [(v, kept.cache.get_seq_length()) for v, kept in self._spare() if v not in own]
        surplus = sum(length for _, length, _ in texts) + sum(held for _, held in others) - self.max_tokens
        for view, held in others:
            if surplus <= 0:
                return
            del self._kept[view]
            surplus -= held

    def _settle_ended(self) -> None:
        while self._ended:
            ended = self._kept.get(self._ended.popleft())
            if ended is not None:
                ended.ended = True

    def _spare(self) -> list[tuple[View, Kept]]:
        """Ended texts first; those that nobody has called ended (direct callers) after them."""
        return sorted(self._kept.items(), key=lambda item: (not item[1].ended, item[1].used))

    def _ready(self, view: View, length: int, num_last: int) -> Kept:
        """What a text keeps, rolled back to what of it can be used."""
        kept, side = self._of(view), self._side(length)
        start = min(kept.held, view.valid_since(kept.rewinds), length - num_last) if kept.side == side else 0
        surplus = kept.cache.get_seq_length() - start
        if surplus:
            kept.cache.crop(-surplus)
        kept.held, kept.rewinds, kept.side = start, view.rewinds, side
        return kept

    def _side(self, length: int) -> int:
        """Texts on different sides of a switch of RoPE are read otherwise from their first token on."""
        return bisect_left(self._switches, length)

    def _read_alone(self, kept: Kept, view: View, length: int, num_last: int) -> Tensor:
        found: list[Tensor] = []
        # Behind a switch the factors are those of the longest position of a pass: no piece may lie before it.
        piece = length if kept.side else PIECE
        while kept.held < length:
            end = min(length, kept.held + piece)
            ids = torch.tensor([view.token_ids[kept.held : end]], device=input_device(self._lm))
            hidden = hidden_states(self._lm, ids, past_key_values=kept.cache, use_cache=True)[0]
            found.append(hidden[max(0, length - num_last - kept.held) :])
            kept.held = end
        return torch.cat(found)[-num_last:] if num_last else torch.empty(0)

    def _read_together(self, rows: Sequence[Kept], texts: Sequence[Wanted]) -> Tensor:
        """Hidden states `[B, W, H]` of as many new tokens of each text."""
        past, device = max(kept.held for kept in rows), input_device(self._lm)
        ids = torch.tensor(
            [view.token_ids[kept.held : length] for kept, (view, length, _) in zip(rows, texts, strict=True)],
            device=device,
        )
        held = torch.tensor([[kept.held] for kept in rows], device=device)
        width = ids.shape[1]
        shared = DynamicCache()
        fullest = max(rows, key=lambda kept: kept.held).cache
        for n, like in enumerate(fullest.layers if past else ()):
            columns = ([_padded(kept, n, past, like, part) for kept in rows] for part in ("keys", "values"))
            keys, values = map(torch.cat, columns)
            shared.update(keys, values, n)
        hidden = hidden_states(
            self._lm,
            ids,
            (torch.arange(past + width, device=device) >= past - held).long(),
            position_ids=held + torch.arange(width, device=device),
            past_key_values=shared,
            use_cache=True,
        )
        layers: Sequence[Any] = shared.layers
        for n, (keys, values) in enumerate((layer.keys, layer.values) for layer in layers):
            for row, kept in enumerate(rows):
                # A copy: a slice would keep what all of them hold.
                kept.cache.update(keys[row : row + 1, :, past:].clone(), values[row : row + 1, :, past:].clone(), n)
        for kept in rows:
            kept.held += width
        return hidden

    def _of(self, view: View) -> Kept:
        if view not in self._kept:
            for other, _ in self._spare()[: max(0, len(self._kept) + 1 - self.num_slots)]:
                del self._kept[other]
            # Without the configuration every layer keeps all positions, so that each can be rolled back.
            self._kept[view] = Kept(DynamicCache())
        self._clock += 1
        kept = self._kept[view]
        kept.used, kept.ended = self._clock, False
        return kept


def _padded(kept: Kept, n: int, length: int, like: Any, part: str) -> Tensor:
    """Keys or values of one layer `[1, head, length, dim]`, padded on the left; `like`: another text's layer."""
    if not kept.held:
        tensor: Tensor = getattr(like, part)
        return torch.zeros_like(tensor)
    own: Tensor = getattr(kept.cache.layers[n], part)
    return F.pad(own, (0, 0, length - kept.held, 0))
