"""Scores of chunks: what `score_batch` is to tokens, for models that share chunks (`collm.cuts`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from collm.data.chunks import Chunked
from collm.data.scores import TokenScores
from collm.models.backbone import hidden_states, logits_rows, project
from collm.models.devices import input_device, output_device
from collm.models.openings import Openings, places


@torch.inference_mode()
def score_chunks(
    model: PreTrainedModel, batch: Sequence[Chunked], openings: Openings, vocab_size: int | None = None
) -> list[TokenScores]:
    """Of each sequence's whole chunks, `[C]` float32 and bool, in one forward pass: the log-probability of the model's
    own tokens plus the closing factor at the end less the one at the start, and whether the model would write the chunk
    if it wrote greedily. The end of a text is a chunk: all tokens that end it are one."""
    length = max(len(item) for item in batch) - 1
    inputs = np.zeros((len(batch), length), np.int64)
    gold, last, wanted = np.zeros_like(inputs), np.full_like(inputs, -1), np.zeros_like(inputs, np.bool_)
    for row, item in enumerate(batch):
        n = len(item) - 1
        inputs[row, :n], gold[row, :n] = item.token_ids[:-1], item.token_ids[1:]
        last[row, :n], wanted[row, :n] = item.opens[1:], item.scored[1:]
    mask = torch.from_numpy(wanted)
    hidden = hidden_states(model, torch.from_numpy(inputs).to(input_device(model)), use_cache=False)
    hidden = hidden[mask.to(hidden.device)]
    device = output_device(model)
    gold_ids = torch.from_numpy(gold)[mask].to(device)
    last_bytes = torch.from_numpy(last)[mask].to(device)
    openings = openings.to(device)
    parts, rows = [], logits_rows(model)
    for states, ids, before in zip(hidden.split(rows), gold_ids.split(rows), last_bytes.split(rows), strict=True):
        logits = project(model, states)[:, :vocab_size].float()
        parts.append(torch.stack(places(logits, ids, before, openings)))
    # One copy from the device: it waits for the computation.
    found = torch.cat(parts, dim=1).cpu().numpy()
    ends = np.cumsum([sum(item.scored) for item in batch])[:-1]
    return [_chunks(item, rows) for item, rows in zip(batch, np.split(found, ends, axis=1), strict=True)]


def _chunks(item: Chunked, rows: NDArray[np.float32]) -> TokenScores:
    """From rows of `item.scored` places to its chunks."""
    log_prob, close, right, opens = rows
    at = np.cumsum(item.scored) - 1
    scores, choices = [], []
    for start, stop in item.spans:
        n = at[start]
        if stop is None:
            scores.append(log_prob[n] - close[n])
            choices.append(right[n] > 0)
        else:
            m = at[stop]
            scores.append(log_prob[n:m].sum(dtype=np.float64) + close[m] - close[n])
            choices.append(bool(right[n:m].all()) and opens[m] > 0)
    return np.array(scores, np.float32), np.array(choices, np.bool_)
