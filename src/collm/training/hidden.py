"""Hidden states of labelled tokens: what the gate is fitted to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from collm.data.resumable import plan_batches, progress_bar
from collm.files import replacing
from collm.models.backbone import hidden_states, rope_switches
from collm.models.loading import weights_fingerprint
from collm.training.dataset import ScoredSet, digest


def all_hidden(model: nn.Module, data: ScoredSet, folder: Path, split: str, *, progress: bool = True) -> Tensor:
    """Hidden states of all labelled tokens, `[N, H]` float32, kept in `folder` for other recipes on the same data."""
    key = [weights_fingerprint(model), [item.token_ids for item in data.items], [item.labelled for item in data.items]]
    path = folder / f"hidden-{split}-{digest(key)}.safetensors"
    if path.is_file():
        return load_file(path)["hidden"]
    hidden, _ = collect_hidden(model, data, progress=progress)
    with replacing(path) as temporary:
        save_file({"hidden": hidden}, temporary)
    return hidden


@torch.inference_mode()
def collect_hidden(
    model: nn.Module,
    data: ScoredSet,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Hidden states that predict labelled tokens: `[M, H]` float32 on the CPU, and their flat indices `[M]`,
    ascending.

    Args:
        limit: take whole examples, in random order, until there are so many tokens; None: all.
    """
    order = (
        np.random.default_rng(seed).permutation(len(data.items)) if limit is not None else np.arange(len(data.items))
    )
    chosen: list[int] = []
    total = 0
    for i in order.tolist():
        if limit is not None and total >= limit:
            break
        chosen.append(i)
        total += data.items[i].num_labelled
    lengths = [len(item) for item in data.items]
    device = next(model.parameters()).device
    starts = data.ends - [item.num_labelled for item in data.items]
    states, indices = [], []
    with progress_bar(sum(lengths[i] for i in chosen), progress, "hidden states") as advance:
        for batch in plan_batches(lengths, chosen, batch_tokens, rope_switches(model)):
            width = lengths[batch[0]]
            ids, mask = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.bool_)
            for row, i in enumerate(batch):
                item = data.items[i]
                ids[row, : len(item)], mask[row, : len(item)] = item.token_ids, item.labelled
                indices.append(torch.arange(int(starts[i]), int(starts[i]) + item.num_labelled))
            # Right padding and causal attention: no mask is needed.
            hidden = hidden_states(model, torch.from_numpy(ids[:, :-1]).to(device), use_cache=False)
            states.append(hidden[torch.from_numpy(mask[:, 1:]).to(device)].float().cpu())
            advance(sum(lengths[i] for i in batch))
    flat = torch.cat(indices)
    ascending = flat.argsort()
    return torch.cat(states)[ascending], flat[ascending]
