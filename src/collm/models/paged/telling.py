"""What a pass tells of each of its tokens, as one row of numbers that go to the host at once: the plain twin.

Row: top token, its log-probability, entropy, whether something is not a number, the chosen token, its log-probability,
and the logs of the gate; where models share chunks, last of all the log of the closing factor. Int32, floats by their
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm.decoding.choosing import draw, race, truncated
from collm.gate import log_gate
from collm.models.head import DeferralHead
from collm.models.openings import Openings
from collm.models.paged.plan import CUT, DRAW, OPENS, Plan
from collm.values import Answer, made_of

BAD, CHOSEN, GATE = 3, 4, 6
"""Columns: whether something is no number, the chosen token, the gate's first number."""
WORD = 0xFFFFFFFF
NONES = repeat(None)


def columns(head: DeferralHead | None) -> int:
    return GATE + (0 if head is None else 1 + head.num_assistants)


class Telling(Protocol):
    def tell(self, logits: Tensor, hidden: Tensor, head: DeferralHead | None, plan: Plan, vocab_size: int) -> Tensor:
        """Rows `[T, columns]` of logits `[T, >= vocab_size or fewer]` and hidden states `[T, H]`."""
        ...


class TorchTelling:
    """The plain twin of `TritonTelling`."""

    def tell(self, logits: Tensor, hidden: Tensor, head: DeferralHead | None, plan: Plan, vocab_size: int) -> Tensor:
        log_probs = torch.log_softmax(logits[:, :vocab_size].float(), dim=-1)
        top_log_prob, top = log_probs.max(dim=-1)
        entropy = torch.special.entr(log_probs.exp()).sum(dim=-1)
        bad = entropy.isnan() | top_log_prob.isnan()
        chosen = top.clone()
        temperature, top_p = (plan.line(DRAW + n).view(torch.float32) for n in (5, 6))
        low, high, sample, position, top_k = (plan.line(DRAW + n).long() for n in range(5))
        for row in temperature.nonzero().flatten().tolist():
            own = slice(row, row + 1)
            law = truncated(log_probs[own].double(), temperature[own].double(), top_p[own].double(), top_k[own])
            seed = low[own] & WORD, high[own] & WORD
            noise = race(seed, sample[own], position[own], law.shape[-1], torch.float64)
            chosen[own] = draw(law, noise)
        floats = [top_log_prob, entropy, log_probs.gather(-1, chosen[:, None])[:, 0]]
        if head is not None:
            gates = log_gate(head(hidden))
            bad |= gates[:, 0].isnan()
            floats += list(gates.T)
        first, second, third, *rest = (each.contiguous().view(torch.int32) for each in floats)
        return torch.stack([top.int(), first, second, bad.int(), chosen.int(), third, *rest], dim=1)


@dataclass(frozen=True, eq=False)
class OpenTelling:
    """A `Telling` for models that share chunks, as `openings.chosen_at_cuts` is for laws: of what may open a chunk
    behind the byte in the line `CUT`, with one more column. Masks by the plan alone: a graph holds for all bytes."""

    telling: Telling
    openings: Openings

    def tell(self, logits: Tensor, hidden: Tensor, head: DeferralHead | None, plan: Plan, vocab_size: int) -> Tensor:
        known = min(vocab_size, logits.shape[1])
        logits, openings = logits[:, :known], self.openings.narrowed(known)
        plain, must_open = (plan.line(CUT) == 0)[:, None], (plan.line(OPENS) > 0)[:, None]
        last = (plan.line(CUT) - 1).clamp(min=0).long()
        inside = logits.masked_fill(~(openings.mask(last) | plain), -torch.inf)
        choice = torch.where(must_open, inside, logits.masked_fill(~(openings.text | plain), -torch.inf))
        found = self.telling.tell(inside, hidden, head, plan, known)
        chosen = self.telling.tell(choice, hidden, None, plan, known)
        norm = logits.float().logsumexp(-1)
        mass, of_choice = (each.float().logsumexp(-1) - norm for each in (inside, choice))
        # Of a law over a part of the tokens the other numbers are those of the whole one.
        numbers = found.view(torch.float32)
        numbers[:, 1] += mass
        found[:, BAD] |= chosen[:, BAD] | ~norm.isfinite()
        found[:, CHOSEN] = chosen[:, CHOSEN]
        numbers[:, 5] = chosen.view(torch.float32)[:, 5] + of_choice
        close = mass.masked_fill(openings.free[last] | plain[:, 0], 0.0)
        return torch.cat([found, close[:, None].view(torch.int32)], dim=1)


@dataclass(frozen=True, slots=True)
class Told:
    """The rows of a pass on the host."""

    rows: NDArray[np.int32]
    has_gate: bool
    has_close: bool = False

    @property
    def tokens(self) -> NDArray[np.int32]:
        """The chosen ones; anything at all where something is no number."""
        return self.rows[:, CHOSEN]

    @property
    def bad(self) -> NDArray[np.bool_]:
        """Of which tokens something is no number."""
        found: NDArray[np.bool_] = self.rows[:, BAD] != 0
        return found

    @property
    def all_numbers(self) -> bool:
        return not self.rows[:, BAD].any()

    def answers(self, wanted: Sequence[int]) -> Sequence[Answer | None]:
        """Of some tokens of the pass; None where it is not a number."""
        if len(wanted) == 1:  # columns cost more than they save
            return [self.answer(wanted[0])]
        rows = self.rows if len(wanted) == len(self.rows) else self.rows[list(wanted)]
        floats = rows.view(np.float32)
        end = rows.shape[1] - self.has_close
        gates = map(tuple, floats[:, GATE:end].tolist()) if self.has_gate else NONES
        close = floats[:, end].tolist() if self.has_close else repeat(0.0)
        top, token, log_prob = rows[:, 0].tolist(), rows[:, CHOSEN].tolist(), floats[:, 5].tolist()
        top_log_prob, entropy = floats[:, 1].tolist(), floats[:, 2].tolist()
        kept = top_log_prob, entropy, gates, NONES, repeat(()), NONES, NONES, close
        found = made_of(Answer, token, log_prob, top, *kept)
        bad = rows[:, BAD].tolist()
        return [None if wrong else each for each, wrong in zip(found, bad, strict=True)] if any(bad) else found

    def answer(self, n: int) -> Answer | None:
        """Of the n-th token of the pass: the plain twin."""
        row = self.rows[n]
        numbers, floats = row.tolist(), row.view(np.float32).tolist()
        if numbers[BAD]:
            return None
        close = floats.pop() if self.has_close else 0.0
        gate = tuple(floats[GATE:]) if self.has_gate else None
        told = numbers[CHOSEN], floats[5], numbers[0], floats[1], floats[2], gate, None, (), None, None, close
        return tuple.__new__(Answer, told)
