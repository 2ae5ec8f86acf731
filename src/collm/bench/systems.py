"""One system, one batch of texts: what is timed, and what is noted about it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from collm.bench.paired import synchronise
from collm.bench.pairs import Pair
from collm.bench.result import Issued, Run
from collm.decoding.policies import Random
from collm.llm import CollaborativeLM
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams
from collm.types import ForwardPass, Generation
from collm.values import Answer, Draw


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds (and one to warm up), tokens of a text, tokens of its prompt."""

    rounds: int = 8
    tokens: int = 64
    prompt_tokens: int = 64
    seed: int = 0


Texts = tuple[Run, list[tuple[int, ...]]]
"""What a run cost, and what it wrote."""
System = Callable[[int], Texts]
"""Called with the number of a round, whose prompts no other round shares: nothing of one is in a cache in the next."""


def deferring(pair: Pair, rate: float, speculative: bool) -> SamplingParams:
    """By the checkpoint's own gate where it has been calibrated, else at random."""
    if pair.gated:
        return SamplingParams(deferral_rate=rate, speculative=speculative)
    return randomly(rate, speculative)


def randomly(rate: float, speculative: bool) -> SamplingParams:
    return SamplingParams(deferral="random", threshold=rate, speculative=speculative)


def engine(
    pair: Pair,
    effort: Effort,
    batch: int,
    params: SamplingParams | None = None,
    alone: int | None = None,
    llm: CollaborativeLM | None = None,
) -> System:
    """`batch` texts at once in this engine. What it learns about speeds it keeps from round to round."""
    llm = llm or pair.system()

    def run(number: int) -> Texts:
        prompts = [spelt(ids) for ids in pair.prompts(batch, effort.prompt_tokens, effort.seed + number)]
        # Random deferrals are keyed by seed and position: a seed of its own for each row, or all would defer at once.
        each = [
            replace(params or SamplingParams(), max_tokens=effort.tokens, seed=number * 1000 + row)
            for row in range(batch)
        ]
        with watching(llm) as seen:
            start = time.perf_counter()
            written = llm.generate_batch(prompts, each, batch, alone=alone)
            seconds = time.perf_counter() - start
        return summed(seconds, written, seen), [generation.token_ids for generation in written]

    return run


def streamed(pair: Pair, effort: Effort, params: SamplingParams) -> System:
    """One text, timed from its first token on.

    That one is deferred in every text, so that both models have read the prompt when the time begins.
    """
    llm = pair.system()
    assert params.threshold is not None
    policy, unread = Random(params.threshold, 1), Answer(0, 0.0, 0, 0.0, 0.0)

    def run(number: int) -> Texts:
        [prompt] = pair.prompts(1, effort.prompt_tokens, effort.seed + number)
        seed = next(s for s in range(number * 1000, 10**9) if policy.decide(unread, Draw(seed=s), 0).authors[0] != 0)
        begun, generation = 0.0, None
        for chunk in llm.stream(spelt(prompt), replace(params, max_tokens=effort.tokens + 1, seed=seed)):
            begun = begun or time.perf_counter()
            generation = chunk.generation
        seconds = time.perf_counter() - begun
        assert generation is not None
        later = replace(generation, steps=generation.steps[1:])
        return summed(seconds, [later], []), [later.token_ids]

    return run


def reference(
    pair: Pair, effort: Effort, batch: int, network: PreTrainedModel, draft: PreTrainedModel | None = None
) -> System:
    """`generate` of transformers; with `draft`, its assisted generation."""

    def run(number: int) -> Texts:
        prompts = pair.prompts(batch, effort.prompt_tokens, effort.seed + number)
        ids = torch.tensor(prompts, device=network.device)
        more = {} if draft is None else {"assistant_model": draft}
        start = time.perf_counter()
        with torch.inference_mode():
            out = network.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=effort.tokens, **more
            )
        synchronise(network.device)
        seconds = time.perf_counter() - start
        texts = [tuple(row[effort.prompt_tokens :]) for row in out.tolist()]
        return Run(seconds=seconds, tokens=sum(map(len, texts)), distinct=distinct(texts)), texts

    return run


@contextmanager
def watching(llm: CollaborativeLM) -> Iterator[list[list[ForwardPass]]]:
    """The forward passes of each model, as they are issued; of a tool there are none."""
    seen: list[list[ForwardPass]] = [[] for _ in llm.models]
    watched = [(model, own) for model, own in zip(llm.models, seen, strict=True) if isinstance(model, LocalModel)]
    for model, own in watched:
        model.on_pass = own.append
    try:
        yield seen
    finally:
        for model, _ in watched:
            model.on_pass = None


def summed(seconds: float, written: Sequence[Generation], seen: Sequence[Sequence[ForwardPass]]) -> Run:
    """What some texts cost together."""
    steps = [step for generation in written for step in generation.steps]
    queries = [generation.forward_passes for generation in written]
    return Run(
        seconds=seconds,
        tokens=len(steps),
        deferred=sum(step.deferred for step in steps),
        abstained=sum(step.abstained for step in steps),
        again=sum(a.deferred and b.deferred for text in written for a, b in pairwise(text.steps)),
        changed=sum(step.changed for step in steps),
        queries=tuple(sum(counts) for counts in zip(*queries, strict=True)),
        issued=tuple(by_shape(own) for own in seen),
        drafted=sum(generation.usage.drafted for generation in written),
        accepted=sum(generation.usage.accepted for generation in written),
        recovered=sum(generation.usage.recovered for generation in written),
        distinct=distinct([generation.token_ids for generation in written]),
    )


def by_shape(passes: Sequence[ForwardPass]) -> list[Issued]:
    """Passes of the same number of rows and tokens together."""
    shapes: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for each in passes:
        shapes[each.rows, each.tokens].append(each.seconds)
    return [(rows, tokens, len(seconds), sum(seconds)) for (rows, tokens), seconds in sorted(shapes.items())]


def distinct(texts: Sequence[tuple[int, ...]]) -> float:
    """The share of pairs of neighbouring tokens that their text has not had before: 1 if it never repeats itself."""
    number = sum(max(0, len(text) - 1) for text in texts)
    return sum(len(set(pairwise(text))) for text in texts) / number if number else 1.0


def spelt(token_ids: tuple[int, ...]) -> str:
    """As `pairs.Verbatim` reads it."""
    return " ".join(map(str, token_ids))
