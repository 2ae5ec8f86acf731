"""Which tokens of a model may open a chunk behind which byte: `collm.cuts` as masks where the laws lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from collm.cuts import END, NEVER, START, Cuts
from collm.decoding.choosing import Draws


@dataclass(frozen=True, eq=False)
class Openings:
    """`allowed`: bool `[257, 258]`, the table of cuts and a column of tokens that no text holds; `first`: int64 `[V]`,
    the column of each token's first byte; `free`: bool `[257]`, a chunk is closed behind this byte, whatever comes."""

    allowed: Tensor
    first: Tensor
    free: Tensor

    @classmethod
    def of(cls, cuts: Cuts, first_bytes: Sequence[int], width: int) -> Openings:
        """Args:
        first_bytes: of each token, `END` or `NEVER`.
        width: V; tokens beyond `first_bytes` are padding.
        """
        first = np.full(width, NEVER, np.int64)
        known = np.asarray(first_bytes[:width], np.int64)
        first[: len(known)] = known
        allowed = np.concatenate([cuts.allowed, np.zeros((257, 1), np.bool_)], axis=1)
        return cls(
            torch.from_numpy(allowed),
            torch.from_numpy(np.where(first == NEVER, END + 1, first)),
            torch.tensor([*cuts.free[:START], True]),
        )

    def narrowed(self, width: int) -> Openings:
        """For laws over fewer tokens."""
        return self if width == len(self.first) else Openings(self.allowed, self.first[:width], self.free)

    def to(self, device: torch.device | str) -> Openings:
        return Openings(self.allowed.to(device), self.first.to(device), self.free.to(device))

    @property
    def text(self) -> Tensor:
        """`[V]`: tokens that a text may hold, or that end it."""
        return self.first <= END

    def mask(self, last: Tensor) -> Tensor:
        """`[N, V]` of last bytes `[N]`: what may open there."""
        return self.allowed[last][:, self.first]


class Places(NamedTuple):
    """What a law says of a gold text at N places, `[N]` each.

    `log_prob`: of the gold token; where it ends a text, of all tokens that do. `log_close`: the logarithm of the
    closing factor where a chunk opens, else 0. `right`: is the model's choice the gold token (an end, if that is one)?
    `opens`: would its choice open a chunk, if nothing were asked of it?
    """

    log_prob: Tensor
    log_close: Tensor
    right: Tensor
    opens: Tensor


def places(logits: Tensor, gold: Tensor, last: Tensor, openings: Openings, *, choices: bool = True) -> Places:
    """Args:
    logits: `[N, V]` float32.
    gold: `[N]` token ids.
    last: `[N]`, the byte behind which a chunk opens with the gold token; -1 where it goes on with one.
    choices: False leaves `right` and `opens` out (0), as training does.
    """
    openings = openings.narrowed(logits.shape[1])
    norm = logits.logsumexp(-1)
    opening = last >= 0
    log_prob = logits.gather(-1, gold[:, None])[:, 0] - norm
    ending = (opening & (openings.first[gold] == END)).nonzero()[:, 0]
    if len(ending):
        of_ends = logits[ending][:, openings.first == END].logsumexp(-1) - norm[ending]
        log_prob = log_prob.index_put((ending,), of_ends)
    close = torch.zeros_like(norm)
    # Behind a free byte the factor is 1.
    bound = (opening & ~openings.free[last.clamp(min=0)]).nonzero()[:, 0]
    if len(bound):
        inside = logits[bound].masked_fill(~openings.mask(last[bound]), -torch.inf)
        close = close.index_put((bound,), inside.logsumexp(-1) - norm[bound])
    right, opens = torch.zeros_like(norm), torch.zeros_like(norm)
    if choices:
        with torch.no_grad():
            right, opens = _choices(logits, gold, last, openings, ending)
    return Places(log_prob, close, right, opens)


def _choices(logits: Tensor, gold: Tensor, last: Tensor, openings: Openings, ending: Tensor) -> tuple[Tensor, Tensor]:
    text = logits.masked_fill(~openings.text, -torch.inf)
    choice = text.argmax(-1)
    before = last.clamp(min=0)
    opens = (last >= 0) & openings.allowed[before, openings.first[choice]]
    forced = ((last >= 0) & ~opens).nonzero()[:, 0]
    if len(forced):
        choice[forced] = text[forced].masked_fill(~openings.mask(last[forced]), -torch.inf).argmax(-1)
    right = choice == gold
    right[ending] = openings.first[choice[ending]] == END
    return right.float(), opens.float()


def chosen_at_cuts(
    log_probs: Tensor, packed: Tensor, draws: Draws, cuts: Tensor, openings: Openings
) -> Iterator[Tensor]:
    """Columns `[N, 1]` of laws `[N, V]` (log-probabilities) behind last bytes: the top token among those that open a
    chunk and its log-probability, the entropy of what opens one, the chosen token and its log-probability, the
    logarithm of the closing factor.

    Args:
        packed: `draws.words` on the device.
        cuts: `[N, 2]`: the last byte, and 1 where the choice has to open a chunk; -1 for a row that shares no chunks.
    """
    openings = openings.narrowed(log_probs.shape[-1]).to(log_probs.device)
    last, opens = cuts.T
    plain = (last < 0)[:, None]
    before = last.clamp(min=0)
    inside = log_probs.masked_fill(~(openings.mask(before) | plain), -torch.inf)
    mass = inside.logsumexp(-1, keepdim=True)
    top_log_prob, top = inside.max(dim=-1, keepdim=True)
    yield top.float()
    yield top_log_prob
    yield torch.special.entr((inside - mass).exp()).sum(dim=-1, keepdim=True)
    # A token that is asked for with nothing forbidden is text all the same.
    choice = torch.where(opens[:, None] > 0, inside, log_probs.masked_fill(~(openings.text | plain), -torch.inf))
    chosen = choice.argmax(dim=-1)
    if draws.rows:
        chosen = draws.choose(choice, chosen, packed)
    yield chosen[:, None].float()
    yield log_probs.gather(-1, chosen[:, None])
    yield mass.masked_fill(openings.free[before][:, None] | plain, 0.0)
