"""How a model chooses its token: the most probable one, or a draw, for a whole batch where its laws lie."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from collm.noise import PURPOSES, key_of, philox, to_uniform
from collm.values import Answer, Draw, Query

CHUNK = 1 << 20
"""Numbers of noise that exist at a time: rows of a wide vocabulary are drawn a few at a time."""


def truncated(
    log_probs: Tensor, temperature: Tensor, top_p: Tensor | None = None, top_k: Tensor | None = None
) -> Tensor:
    """The laws `[N, V]` (probabilities) that are drawn from: temperature first, then top-k, then top-p.

    Top-k keeps the k most probable tokens, top-p the fewest that hold at least that mass (always the first); of
    equally probable tokens the lower id comes first. `temperature`, `top_p`, `top_k` (0 = all): `[N]`.
    """
    # The maximum goes first, so that the smallest temperatures do not make -inf of everything.
    scaled = (log_probs - log_probs.amax(dim=-1, keepdim=True)) / temperature[:, None]
    if top_p is not None and top_k is not None:
        ordered, token_ids = scaled.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(ordered.shape[-1], device=ordered.device)
        ordered = ordered.masked_fill((rank >= top_k[:, None]) & (top_k[:, None] > 0), -torch.inf)
        law = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill((law.cumsum(dim=-1) - law >= top_p[:, None]) & (top_p[:, None] < 1), -torch.inf)
        scaled = torch.empty_like(scaled).scatter_(-1, token_ids, ordered)
    return scaled.softmax(dim=-1)


def race(seed: tuple[Tensor, Tensor], sample: Tensor, position: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Exponential noise `[N, V]` of every token for each row; the words of `seed`, `sample`, `position`: `[N]`."""
    columns: tuple[Any, Any, Any, Any] = (*seed, sample, position)
    if position.device.type == "cpu":
        # Ten rounds of a dozen operators: numpy's cost a fraction of torch's on short rows.
        words = torch.from_numpy(np.stack(_words(np.arange, *map(Tensor.numpy, columns), size=size), axis=-1))
    else:
        words = torch.stack(_words(partial(torch.arange, device=position.device), *columns, size=size), dim=-1)
    uniform = (words.flatten(1)[:, :size].to(dtype) + 0.5) * 2.0**-32
    # In float32 the largest words are rounded to 1, whose noise would be 0: any token, impossible ones too, would win.
    return -uniform.clamp_max(1 - torch.finfo(dtype).eps / 2).log()


def _words(arange: Callable[[int], Any], *columns: Any, size: int) -> tuple[Any, ...]:
    low, high, sample, position = columns
    counter = (arange(-(-size // 4))[None], position[:, None], sample[:, None], PURPOSES["token"])
    return philox(counter, (low[:, None], high[:, None]))


def draw(laws: Tensor, noise: Tensor) -> Tensor:
    """A token `[N]` of each law `[N, V]`: the first of an exponential race, `argmin E_i / p_i` (the Gumbel-max trick).

    Every token has its own noise, the same for all laws. So laws that are close draw the same token with high
    probability, at least (1 - d) / (1 + d) at total variation distance d, which is what speculation lives on; one
    uniform number by inverse CDF would shift every token behind a small difference.
    """
    return (noise / laws).argmin(dim=-1)


@dataclass(frozen=True, slots=True)
class Draws:
    """How the rows of a pass choose, as numbers that go to the device with everything else of the pass.

    `rows`: those that are drawn; the others take their most probable token. `words`: `WIDTH` int64 for each of them.
    """

    WIDTH = 8
    rows: list[int]
    words: list[int]
    truncates: bool

    @classmethod
    def of(cls, draws: Sequence[tuple[Draw, int]]) -> Draws:
        """From how each row is drawn, and its position in the completion."""
        rows: list[int] = []
        words: list[int] = []
        truncates = False
        for row, (how, position) in enumerate(draws):
            if how.temperature:
                rows.append(row)
                floats = struct.unpack("qq", struct.pack("dd", how.temperature, how.top_p))
                words += (row, *key_of(how.seed), how.sample, position, how.top_k, *floats)
                truncates |= how.top_k > 0 or how.top_p < 1
        return cls(rows, words, truncates)

    def choose(self, log_probs: Tensor, top: Tensor, packed: Tensor) -> Tensor:
        """The chosen tokens `[N]`; `log_probs` `[N, V]`, `top` `[N]`, `packed`: `words` on the device."""
        # Some devices (mps) know no float64.
        dtype = torch.float32 if log_probs.device.type == "mps" else torch.float64
        words = packed.view(-1, self.WIDTH)
        settings = words[:, 6:].contiguous().view(torch.float64).to(dtype)
        chosen, size = top.clone(), log_probs.shape[-1]
        step = max(1, CHUNK // size)
        for start in range(0, len(self.rows), step):
            row, low, high, sample, position, top_k = words[start : start + step, :6].T
            temperature, top_p = settings[start : start + step].T
            truncation = (top_p, top_k) if self.truncates else ()
            laws = truncated(log_probs[row].to(dtype), temperature, *truncation)
            chosen[row] = draw(laws, race((low, high), sample, position, size, dtype))
        return chosen


def choose(log_probs: Tensor, draws: Sequence[tuple[Draw, int]]) -> Tensor:
    """The tokens `[N]` of laws `[N, V]` (log-probabilities), each with how it is drawn and its position."""
    own = Draws.of(draws)
    top = log_probs.argmax(dim=-1)
    return own.choose(log_probs, top, torch.tensor(own.words, device=log_probs.device)) if own.rows else top


def token_noise(how: Draw, position: int, token_id: int) -> float:
    """The uniform number behind `race` for a single token, computed on the host: the plain twin."""
    words = philox((token_id // 4, position, how.sample, PURPOSES["token"]), key_of(how.seed))
    return float(to_uniform(words[token_id % 4]))


def answer_of(law: Tensor, draw: Draw, position: int, gate: tuple[float, ...] | None = None) -> Answer:
    """The answer of one law `[V]` (log-probabilities) that is at hand: a mixture of laws, a fake's."""
    token_id = int(choose(law[None], [(draw, position)])[0])
    top = int(law.argmax())
    entropy = float(torch.special.entr(law.double().exp()).sum())
    return Answer(token_id, float(law[token_id]), top, float(law[top]), entropy, gate, law=law)


def requested(answer: Answer, query: Query, i: int) -> Answer:
    """An answer that carries its law, with what a query asks for behind its i-th prefix."""
    law = answer.law
    assert law is not None
    given: float | None = None
    if query.given is not None:
        given = float(law[query.given[i]]) if query.given[i] < len(law) else -math.inf
    return answer._replace(given_log_prob=given, top=most_probable(law, query.num_top))


def most_probable(law: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The most probable tokens of a law `[V]` (log-probabilities) with theirs, best first."""
    if not count:
        return ()
    values, token_ids = law.topk(min(count, len(law)))
    return tuple(zip(token_ids.tolist(), values.tolist(), strict=True))
