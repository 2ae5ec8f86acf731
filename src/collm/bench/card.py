"""How near a GPU's passes come to what its memory allows: the weights read once, at the speed of a plain copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from collm.bench.paired import synchronise
from collm.models.attention import Row
from collm.models.laws import Asked
from collm.models.local import LocalModel
from collm.models.memory import bytes_per_token
from collm.models.paged import experts
from collm.models.paged.blocks import BLOCK
from collm.models.paged.cache import PagedCache
from collm.models.paged.graphs import BUCKETS, Bucket
from collm.models.paged.machinery import machinery_for
from collm.models.paged.stepping import Stepper

COPIED = 2**31
"""Bytes of the copy that a card is measured by."""
TOKENS = (1, 16, 64, 128)
"""Of the passes that have a demand."""
CONTEXT = 100
"""Positions behind which passes are measured."""
LONG = 8000
"""Positions of a long text."""
ROWS = 16
"""Texts of a pass at most."""

DEMANDS: dict[str, tuple[bool, float]] = {
    **{f"pass.{name}.T{tokens}": (True, most) for name in ("base", "assistant")
       for tokens, most in zip(TOKENS, (1.30, 1.40, 1.50, 1.65), strict=True)},
    "overhead.b1": (True, 1.10),
    "overhead.b16": (True, 1.15),
    "modules.base.T16": (True, 2.5),
    "compiled.base.T16": (True, 1.8),
    "long.assistant.rows1": (True, 1.35),
    "long.assistant.rows16": (True, 1.25),
    "long.assistant.one_of_16": (True, 1.4),
    "launches_a_pass": (True, 1.0),
    "waits_a_pass": (True, 1.0),
    "ready_seconds": (True, 15.0),
    "alone.b1 : generate.b1": (False, 4.5),
    "plain.b1 : alone.b1": (False, 1.9),
    "speculative.b1 : alone.b1": (False, 3.5),
    "plain.b16 : alone.b16": (False, 1.35),
    "speculative.b16 : alone.b16": (False, 2.4),
    "sampled.b16 : greedy.b16": (False, 0.85),
}  # fmt: skip
"""Limits, at most or at least, of bfloat16 on an H100 or H200: pass times over their bound, wall time over the times of
graphs, and speeds over speeds. Those of speeds hold for the pair of `--shape gpu` at a rate of 0.3."""


def timed(work: Callable[[], object], device: torch.device, repeats: int = 10, rounds: int = 3) -> float:
    """Seconds of `work`: the median of some means."""
    work()
    synchronise(device)
    means = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronise(device)
        means.append((time.perf_counter() - began) / repeats)
    return statistics.median(means)


def copy_bandwidth(device: torch.device, size: int = COPIED) -> float:
    """Bytes that a copy in the memory of a device reads and writes a second."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / timed(lambda: b.copy_(a), device, 5)


def bytes_read(network: PreTrainedModel, positions: int = 0, tokens: int = 1) -> int:
    """What a pass over `tokens` tokens reads at least: the weights, but for an embedding that is not the head, too; of
    experts those that it is expected to use (`experts.share_used`); and `positions` of keys and values."""
    parts: Any = network.get_input_embeddings(), network.get_output_embeddings()
    embedding, head = (part.weight for part in parts)
    weights: int = sum(parameter.nbytes for parameter in network.parameters())
    if embedding is not head:
        weights -= embedding.nbytes
    routed = sum(parameter.nbytes for parameter in experts.expert_weights(network))
    left_out = round((1 - experts.share_used(network, tokens)) * routed)
    return weights - left_out + positions * bytes_per_token(network)


def graphs_of(model: LocalModel) -> tuple[Stepper, PagedCache]:
    """What runs a model's passes as graphs.

    Raises:
        RuntimeError: nothing does.
    """
    stepper, cache = model.graphs
    if stepper is None or cache is None:
        raise RuntimeError(f"the passes of {model.name} run without graphs")
    return stepper, cache


def emptied(model: LocalModel) -> None:
    """Nothing is in the caches any more, and graphs stay."""
    _, cache = model.graphs
    if cache is not None:
        cache.clear_all()


@torch.inference_mode()
def filled(model: LocalModel, starts: Sequence[int], widths: Sequence[int]) -> tuple[Bucket, Callable[[], object]]:
    """The graph of a pass over texts of these lengths, ready to be replayed; and the same pass with the work of the
    host. Their keys are what the storage holds: what a pass costs does not depend on them."""
    stepper, cache = graphs_of(model)
    emptied(model)
    cache.open()
    pool = cache.paged
    rows = [Row(n, start, width) for n, (start, width) in enumerate(zip(starts, widths, strict=True))]
    for row in rows:
        pool.blocks.write(row.slot, 0, row.end)
    for table in pool.tables.values():
        known = torch.from_numpy(pool.blocks.table)
        table[: len(known)] = known.to(table.device)
    count = sum(widths)
    ids, asked = [n % model.model.config.get_text_config().vocab_size for n in range(count)], Asked.of([])

    @torch.inference_mode()
    def whole() -> None:
        stepper.step(rows, ids, range(count), asked)

    whole()
    bucket = stepper.graph(next(size for size in BUCKETS if size >= count))
    if bucket is None:
        raise RuntimeError(f"{model.name}: there is no graph of {count} tokens")
    return bucket, whole


def pass_seconds(model: LocalModel, tokens: int, context: int = CONTEXT) -> float:
    """Of a graph over so many tokens, of 16 texts at most."""
    rows = min(tokens, ROWS)
    bucket, _ = filled(model, [context] * rows, [tokens // rows] * rows)
    with torch.inference_mode():
        return timed(bucket.replay, graphs_of(model)[1].paged.device)


def long_passes(model: LocalModel, bandwidth: float, length: int) -> Iterator[tuple[str, float, float]]:
    """What a pass over one token of each text takes behind long ones, for which there must be room: what is measured
    (one text, sixteen, one beside fifteen short ones), its seconds, and those of reading weights and keys."""
    short = [CONTEXT] * (ROWS - 1)
    for key, starts in (("rows1", [length]), ("rows16", [length] * ROWS), ("one_of_16", [length, *short])):
        bucket, _ = filled(model, starts, [1] * len(starts))
        with torch.inference_mode():
            seconds = timed(bucket.replay, graphs_of(model)[1].paged.device)
        yield key, seconds, bytes_read(model.model, sum(starts), len(starts)) / bandwidth


def room_for_long(length: int) -> int:
    """`max_cache_tokens` of a model for `long_passes`."""
    return (ROWS + 1) * (length + 600)


def of_modules(again: Callable[..., LocalModel], network: PreTrainedModel, compiled: bool = False) -> LocalModel | None:
    """A model once more (`again`), run by transformers' modules as an architecture without a pass of its own is; None
    where nothing runs it as graphs."""
    own = machinery_for(network, "base")
    if own is None:
        return None
    return again(machinery=replace(own, dense=None), max_cache_tokens=2 * ROWS * BLOCK, compiled=compiled)


class Spent:
    """What the passes of a model would take as bare graphs, from now on. Prompts are read without: `add` these."""

    def __init__(self, model: LocalModel, context: int) -> None:
        stepper, _ = graphs_of(model)
        self._counts = stepper.counts
        self._curve = {size: pass_seconds(model, size, context) for size in stepper.buckets}
        self.anew()

    def add(self, tokens: int, seconds: float) -> None:
        """A pass, or some passes of so many tokens each: it counts if it ran without a graph."""
        if tokens > BUCKETS[-1]:
            self._eager += seconds

    def anew(self) -> None:
        self._before, self._eager = dict(self._counts.passes), 0.0
        self._launched, self._waited = self._counts.launches, self._counts.waits

    @property
    def launches(self) -> int:
        """Of graphs."""
        return self._counts.launches - self._launched

    @property
    def waits(self) -> int:
        """For passes, without graphs, too."""
        return self._counts.waits - self._waited

    @property
    def passes(self) -> dict[int, int]:
        """How many graphs of each size have been replayed."""
        found = {size: number - self._before.get(size, 0) for size, number in self._counts.passes.items()}
        return {size: number for size, number in sorted(found.items()) if number}

    @property
    def seconds(self) -> float:
        return self._eager + sum(number * self._curve[size] for size, number in self.passes.items())


def runtime_calls(work: Callable[[], object], repeats: int = 5) -> dict[str, float]:
    """Calls of the CUDA runtime that `work` makes, by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            work()
    calls = {e.key: e.count for e in seen.key_averages() if e.key.startswith(("cuda", "cu")) and "::" not in e.key}
    # The profiler itself waits when it ends.
    return {key: count / repeats for key, count in calls.items() if key != "cudaDeviceSynchronize"}


def launches_and_waits(calls: dict[str, float]) -> tuple[float, float]:
    """Of `runtime_calls`."""
    launches = sum(number for key, number in calls.items() if "Launch" in key)
    return launches, sum(number for key, number in calls.items() if "Synchronize" in key)
