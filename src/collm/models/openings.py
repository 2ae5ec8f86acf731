"""Which tokens of a model may open a chunk behind which byte: `collm.cuts` as masks where the laws lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from collm.cuts import END, NEVER, START, Cuts
from collm.decoding.choosing import Draws

BLOCK = 1 << 21
"""Numbers of logits that are looked at together on a CPU: what its caches hold."""


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
    logits: `[N, V]` float32; with `choices`, those of tokens that are no text become -inf in it.
    gold: `[N]` token ids.
    last: `[N]`, the byte behind which a chunk opens with the gold token; -1 where it goes on with one.
    choices: False leaves `right` and `opens` out (0), as training does.
    """
    openings = openings.narrowed(logits.shape[1])
    log_prob, log_close = _LogProbs.apply(logits, gold, last, openings)  # type: ignore[no-untyped-call]
    if not choices:
        nothing = torch.zeros_like(log_close)
        return Places(log_prob, log_close, nothing, nothing)
    with torch.no_grad():
        return Places(log_prob, log_close, *_choices(logits.detach(), gold, last, openings))


class _LogProbs(torch.autograd.Function):
    """`Places.log_prob` and `log_close`, with their gradient, some rows at a time: fresh memory of the size of the
    logits costs many times what is computed in it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gold: Tensor, last: Tensor, openings: Openings) -> tuple[Tensor, Tensor]:
        ends = (openings.first == END).nonzero()[:, 0]
        before = last.clamp(min=0)
        ending = (last >= 0) & (openings.first[gold] == END)
        # Behind a free byte the factor is 1.
        bound = (last >= 0) & ~openings.free[before]
        norm, of_ends, close = (logits.new_empty(len(logits)) for _ in range(3))
        weights = openings.allowed.to(logits.dtype)
        for rows in _blocks(logits):
            block = logits[rows]
            norm[rows] = block.logsumexp(-1)
            of_ends[rows] = block[:, ends].logsumexp(-1)
            share = (block - norm[rows][:, None]).exp_()
            close[rows] = share.mul_(weights[before[rows]].index_select(1, openings.first)).sum(-1)
        close = torch.where(bound, close.clamp(min=torch.finfo(close.dtype).tiny), 1.0)
        log_prob = torch.where(ending, of_ends, logits.gather(-1, gold[:, None])[:, 0]) - norm
        ctx.save_for_backward(logits, gold, norm, close, log_prob)
        ctx.flags = (ends, before, ending, bound, openings, weights)
        return log_prob, close.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """With p the law: `onehot - p` of the gold token (of ends `p_end / sum - p`), and `p_open / close - p`."""
        logits, gold, norm, close, log_prob = ctx.saved_tensors
        ends, before, ending, bound, openings, weights = ctx.flags
        of_gold, of_close = grads[0], torch.where(bound, grads[1], 0.0)
        found = torch.empty_like(logits)
        for rows in _blocks(logits):
            share = torch.sub(logits[rows], norm[rows][:, None], out=found[rows]).exp_()
            factors = weights[before[rows]] * (of_close[rows] / close[rows])[:, None]
            factors -= (of_gold[rows] + of_close[rows])[:, None]
            last = ending[rows].nonzero()[:, 0]
            of_ends = share[last][:, ends] * (of_gold[rows][last] / log_prob[rows][last].exp())[:, None]
            share.mul_(factors.index_select(1, openings.first))
            share.scatter_add_(1, gold[rows][:, None], torch.where(ending[rows], 0.0, of_gold[rows])[:, None])
            share[last[:, None], ends[None]] += of_ends
        return found, None, None, None


def _blocks(logits: Tensor) -> Iterator[slice]:
    numbers = BLOCK if logits.device.type == "cpu" else BLOCK << 5
    step = max(1, numbers // logits.shape[1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _choices(logits: Tensor, gold: Tensor, last: Tensor, openings: Openings) -> tuple[Tensor, Tensor]:
    logits[:, (~openings.text).nonzero()[:, 0]] = -torch.inf
    choice = logits.argmax(-1)
    before = last.clamp(min=0)
    opens = (last >= 0) & openings.allowed[before, openings.first[choice]]
    forced = ((last >= 0) & ~opens).nonzero()[:, 0]
    for rows in forced.split(max(1, BLOCK // logits.shape[1])):
        choice[rows] = logits[rows].masked_fill_(~openings.mask(last[rows]), -torch.inf).argmax(-1)
    ending = (last >= 0) & (openings.first[gold] == END)
    right = torch.where(ending, openings.first[choice] == END, choice == gold)
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
