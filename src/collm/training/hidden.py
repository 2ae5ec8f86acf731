"""Hidden states of labelled tokens, or of the first ones of chunks: what the gate is fitted to.

A million tokens of width 4096 are 15 GiB in float32, so those of a whole data set lie in a file that is mapped into
memory and is read by parts: it is never in memory as a whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from collm.data.resumable import plan_batches, progress_bar
from collm.errors import CollmError
from collm.files import claimed, write_text
from collm.identity.finding import local_identity
from collm.models.backbone import causal_lm, hidden_states, rope_switches
from collm.models.devices import input_device
from collm.training.dataset import ScoredSet, digest

PART_BYTES = 2**30
"""Of hidden states in float32 that are in memory at a time."""

DTYPES = {
    torch.float32: ("F32", np.float32),
    torch.bfloat16: ("BF16", np.int16),
    torch.float16: ("F16", np.float16),
}
"""By their name in safetensors, and what numpy maps them as (it knows no bfloat16)."""


def part_rows(width: int) -> int:
    """Rows of hidden states `[N, width]` that are in memory at a time."""
    return max(1, PART_BYTES // (4 * width))


def all_hidden(model: nn.Module, data: ScoredSet, folder: Path, split: str, *, progress: bool = True) -> Tensor:
    """Hidden states of all labelled tokens, `[N, H]` in the model's dtype, mapped from a file in `folder`, where other
    recipes on the same data find them. A run that was stopped goes on after its last batch.

    Raises:
        CollmError: no room on the disk.
    """
    key = [dict(local_identity(model)), [item.token_ids for item in data.items], [item.starts for item in data.items]]
    path = folder / f"hidden-{split}-{digest(key)}.safetensors"
    with claimed(path, wait=True):
        if not path.is_file():
            _write(path, model, data, progress)
    return mapped(path)


def mapped(path: Path) -> Tensor:
    """The tensor `hidden` of a safetensors file, mapped: rows are read when they are used. Not to be written to.

    Raises:
        CollmError: it is no such file, or damaged.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > path.stat().st_size:
                raise ValueError("it is no safetensors file")
            header = json.loads(file.read(size))["hidden"]
        begin, end = header["data_offsets"]
        dtype, (name, kind) = next(item for item in DTYPES.items() if item[1][0] == header["dtype"])
        if path.stat().st_size != 8 + size + end:
            raise ValueError("its size is not what its header says")
        if end == begin:  # nothing to map
            return torch.zeros(header["shape"], dtype=dtype)
        # Mapped "copy on write", for torch wants what it could write to; nothing is written.
        rows = np.memmap(path, kind, "c", offset=8 + size + begin, shape=tuple(header["shape"]))
    except (OSError, ValueError, KeyError, StopIteration, struct.error) as error:
        raise CollmError(f"{path} is damaged ({error}): remove it, and it is made again") from None
    return torch.from_numpy(rows).view(dtype)


def sample(hidden: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows `[M, H]` in memory, and which they are, `[M]` ascending: all where they are one part, else a random part."""
    rows = part_rows(hidden.shape[1])
    if len(hidden) <= rows:
        return hidden, torch.arange(len(hidden))
    where = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    return hidden[where], where


def _write(path: Path, model: nn.Module, data: ScoredSet, progress: bool) -> None:
    """Every batch goes to its place in a file of the final size; beside it lies how many are done."""
    dtype = next(model.parameters()).dtype
    dtype = dtype if dtype in DTYPES else torch.float32
    shape = (data.count, causal_lm(model).config.get_text_config().hidden_size)
    partial, done = path.with_name(path.name + ".partial"), path.with_name(path.name + ".done")
    batches = _batches(model, data, range(len(data.items)))
    finished = 0
    if partial.is_file() and done.is_file():
        told = json.loads(done.read_text())
        finished = told["batches"] if told["plan"] == digest(batches) else 0
    try:
        if not finished:
            done.unlink(missing_ok=True)  # of a file that was removed: nothing is done in this one
            _allocate(partial, shape, dtype)
        rows = _mapped_for_writing(partial, shape, dtype)
        for batch, (hidden, where) in enumerate(_hidden_of(model, data, batches[finished:], progress), finished + 1):
            rows[where] = hidden.to(dtype)
            write_text(done, json.dumps({"plan": digest(batches), "batches": batch}))
        del rows
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        done.unlink(missing_ok=True)
    except OSError as error:
        raise CollmError(f"{path}: cannot be written ({error.strerror or error}); make room and run again") from None


def _allocate(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    size = shape[0] * shape[1] * dtype.itemsize
    header = json.dumps({"hidden": {"dtype": DTYPES[dtype][0], "shape": shape, "data_offsets": [0, size]}})
    # Data begin at a multiple of 8.
    head = header.encode() + b" " * (-len(header) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        if size:  # now, not when a write to the map finds no room and the process is killed
            file.flush()
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 8 + len(head), size)
            else:
                file.truncate(8 + len(head) + size)


def _mapped_for_writing(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`[N, H]`: what is written to it goes to the file."""
    size = shape[0] * shape[1] * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    rows = np.memmap(path, DTYPES[dtype][1], "r+", offset=path.stat().st_size - size, shape=shape)
    return torch.from_numpy(rows).view(dtype)


@torch.inference_mode()
def collect_hidden(
    model: nn.Module,
    data: ScoredSet,
    *,
    limit: int,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Hidden states that predict labelled tokens: `[M, H]` float32 on the CPU, and their flat indices `[M]`,
    ascending.

    Args:
        limit: take whole examples, in random order, until there are so many tokens.
    """
    chosen: list[int] = []
    total = 0
    for i in np.random.default_rng(seed).permutation(len(data.items)).tolist():
        if total >= limit:
            break
        chosen.append(i)
        total += data.items[i].num_starts
    found = list(_hidden_of(model, data, _batches(model, data, chosen, batch_tokens), progress))
    flat = torch.cat([where for _, where in found])
    ascending = flat.argsort()
    return torch.cat([hidden for hidden, _ in found])[ascending], flat[ascending]


def _batches(model: nn.Module, data: ScoredSet, chosen: Sequence[int], batch_tokens: int = 8192) -> list[list[int]]:
    return plan_batches([len(item) for item in data.items], chosen, batch_tokens, rope_switches(model))


def _hidden_of(
    model: nn.Module, data: ScoredSet, batches: Sequence[Sequence[int]], progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch's `[M, H]` float32 on the CPU, and their flat indices `[M]`."""
    device = input_device(causal_lm(model))
    starts = data.ends - [item.num_starts for item in data.items]
    with progress_bar(
        sum(len(data.items[i]) for batch in batches for i in batch), progress, "hidden states"
    ) as advance:
        for batch in batches:
            width = len(data.items[batch[0]])
            ids, mask = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.bool_)
            where = []
            for row, i in enumerate(batch):
                item = data.items[i]
                ids[row, : len(item)], mask[row, : len(item)] = item.token_ids, item.starts
                where.append(torch.arange(int(starts[i]), int(starts[i]) + item.num_starts))
            with torch.inference_mode():
                # Right padding and causal attention: no mask is needed.
                hidden = hidden_states(model, torch.from_numpy(ids[:, :-1]).to(device), use_cache=False)
                yield hidden[torch.from_numpy(mask[:, 1:]).to(hidden.device)].float().cpu(), torch.cat(where)
            advance(sum(len(data.items[i]) for i in batch))
