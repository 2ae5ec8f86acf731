"""Drawing tokens, with noise that is a pure function of (seed, position, purpose).

So a text does not depend on its batch-mates, on how the models were scheduled, or on whether it was streamed; and
two decoders that meet the same law at the same position of the same seed draw the same token.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from collm.sampling_params import SamplingParams
from collm.types import Prediction

Purpose = Literal["author", "token", "deferral"]
_PURPOSES: dict[Purpose, int] = {"author": 0, "token": 1, "deferral": 2}
_MASK = 2**64 - 1


def noise(seed: int, position: int, purpose: Purpose) -> np.random.Generator:
    """An independent stream of random numbers for one decision at one position (a counter-based generator)."""
    return np.random.Generator(
        np.random.Philox(key=[seed & _MASK, (seed >> 64) & _MASK], counter=[0, 0, position, _PURPOSES[purpose]])
    )


def truncated(log_probs: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """The law `[V]` (float64 probabilities) that is drawn from: temperature first, then top-k, then top-p.

    Top-k keeps the k most probable tokens, top-p the fewest that hold at least that mass (always the first); of
    equally probable tokens the lower id comes first.
    """
    scaled = log_probs.double() / temperature
    if top_k or top_p < 1:
        ordered, token_ids = scaled.sort(descending=True, stable=True)
        if top_k:
            ordered[top_k:] = -torch.inf
        if top_p < 1:
            law = ordered.softmax(dim=-1)
            ordered[law.cumsum(dim=-1) - law >= top_p] = -torch.inf
        scaled = torch.empty_like(scaled).scatter_(0, token_ids, ordered)
    return scaled.softmax(dim=-1)


@lru_cache(maxsize=64)
def _race(seed: int, position: int, size: int) -> Tensor:
    return torch.from_numpy(noise(seed, position, "token").standard_exponential(size))


def draw(law: Tensor, seed: int, position: int) -> int:
    """A token of the law `[V]`: the first of an exponential race, `argmin E_i / p_i` (the Gumbel-max trick).

    Every token has its own noise, the same for all laws. So laws that are close draw the same token with high
    probability, at least (1 - d) / (1 + d) at total variation distance d, which is what speculation lives on; one
    uniform number by inverse CDF would shift every token behind a small difference.
    """
    return int((_race(seed, position, len(law)).to(law.device) / law).argmin())


def choose_token(prediction: Prediction, params: SamplingParams, position: int) -> int:
    """The next token of a text: the most probable one, or a draw."""
    if params.temperature == 0:
        return prediction.top_token_id
    law = truncated(prediction.log_probs, params.temperature, params.top_p, params.top_k)
    return draw(law, params.seed, position)
