"""What is timed side by side: one cell of the benchmark is some systems, interleaved on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from collm.bench.paired import in_turn, synchronise
from collm.bench.pairs import Endless, Pair
from collm.bench.passes import BarePasses, Measured, measure_passes
from collm.bench.result import Cell, Kind, Run
from collm.decoding.collaborative import TokenIds
from collm.decoding.policies import Random
from collm.types import ForwardPass, Generation, SamplingParams, Step

WIDTHS = (1, 2, 4, 8, 16)
PLAIN, SPECULATIVE = "pair, plain", "pair, speculative"
BASE_ALONE, ASSISTANT_ALONE = "base alone", "assistant alone"
REFERENCE = "{} (transformers)"
ASSISTED = "assisted generation (transformers)"


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds (and one to warm up), tokens of a text, tokens of its prompt."""

    rounds: int = 8
    tokens: int = 64
    prompt_tokens: int = 64
    seed: int = 0


Texts = tuple[Run, list[TokenIds]]
"""What a run cost, and what it wrote."""
Passes = tuple[Measured, ...]
"""Bare passes of base and assistant."""


def pair_cell(pair: Pair, effort: Effort, batch: int, rate: float) -> Cell:
    """Base and assistant alone, the pair plain and speculative, and bare passes of the shapes these issue."""
    runs = {
        BASE_ALONE: _engine(pair, effort, batch, alone=0),
        PLAIN: _engine(pair, effort, batch, _params(pair, effort, rate, False)),
        SPECULATIVE: _engine(pair, effort, batch, _params(pair, effort, rate, True)),
    }
    if pair.networks[1] is not None:
        runs[ASSISTANT_ALONE] = _engine(pair, effort, batch, alone=1)
    bare = _bare(pair, sorted({1, batch}), effort.prompt_tokens + effort.tokens // 2, effort.prompt_tokens)
    found, passes = _beside(bare, runs, effort)
    written = [[text for _, texts in found[system] for text in texts] for system in (PLAIN, SPECULATIVE)]
    same = [plain == fast for plain, fast in zip(*written, strict=True)]
    cell = _cell("pair", pair, effort, found, batch=batch, rate=rate, context=effort.prompt_tokens)
    return cell.model_copy(update={"passes": passes, "texts": len(same), "same_texts": sum(same)})


def engine_cell(pair: Pair, effort: Effort, batch: int) -> Cell:
    """Each model alone: in this engine, and as transformers' own `generate` runs it."""
    base, assistant = pair.networks
    runs = {
        BASE_ALONE: _engine(pair, effort, batch, alone=0),
        REFERENCE.format(BASE_ALONE): _transformers(pair, effort, batch, base),
    }
    if assistant is not None:
        runs[ASSISTANT_ALONE] = _engine(pair, effort, batch, alone=1)
        runs[REFERENCE.format(ASSISTANT_ALONE)] = _transformers(pair, effort, batch, assistant)
        if batch == 1:  # all that transformers' assisted generation can do
            runs[ASSISTED] = _transformers(pair, effort, batch, assistant, draft=base)
    return _cell("engine", pair, effort, in_turn(runs, effort.rounds), batch=batch, context=effort.prompt_tokens)


def batch_cell(pair: Pair, effort: Effort, batch: int, rate: float) -> Cell:
    """The same systems with one text at a time and with `batch`."""
    runs = {}
    for size in (1, batch):
        runs[f"{BASE_ALONE}, batch {size}"] = _engine(pair, effort, size, alone=0)
        runs[f"{PLAIN}, batch {size}"] = _engine(pair, effort, size, _params(pair, effort, rate, False))
        runs[f"{SPECULATIVE}, batch {size}"] = _engine(pair, effort, size, _params(pair, effort, rate, True))
    found = in_turn(runs, effort.rounds)
    return _cell("batch", pair, effort, found, batch=batch, rate=rate, context=effort.prompt_tokens)


def growth_cell(pair: Pair, effort: Effort, context: int, rate: float) -> Cell:
    """The pair behind a long prompt, from its first token on, and bare passes behind the same context.

    The first token is deferred in every text, so that both models have read the prompt when the time begins.
    """
    longer = replace(effort, prompt_tokens=context)
    runs: dict[str, Callable[[int], Texts]] = {
        PLAIN: _streamed(pair, longer, _random(rate, False)),
        SPECULATIVE: _streamed(pair, longer, _random(rate, True)),
    }
    found, passes = _beside(_bare(pair, [1], context + effort.tokens // 2, WIDTHS[-1]), runs, effort)
    cell = _cell("growth", pair, longer, found, rate=rate, context=context)
    return cell.model_copy(update={"passes": passes})


def _beside(
    bare: Callable[[], Passes], runs: dict[str, Callable[[int], Texts]], effort: Effort
) -> tuple[dict[str, list[Texts]], list[Passes]]:
    """The runs in turn with one another and with bare passes."""
    measured: list[Passes] = []

    def measure(number: int) -> Texts:
        passes = bare()
        if number:
            measured.append(passes)
        return Run(seconds=0.0, tokens=0), []

    found = in_turn({**runs, "bare": measure}, effort.rounds)
    del found["bare"]
    return found, measured


def _cell(
    kind: Kind,
    pair: Pair,
    effort: Effort,
    found: dict[str, list[Texts]],
    *,
    batch: int = 1,
    rate: float = 0.0,
    context: int = 0,
) -> Cell:
    runs = {name: [run for run, _ in each] for name, each in found.items()}
    return Cell(kind=kind, pair=pair.name, batch=batch, rate=rate, context=context, tokens=effort.tokens, runs=runs)


def _random(rate: float, speculative: bool) -> SamplingParams:
    return SamplingParams(deferral="random", deferral_rate=rate, speculative=speculative)


def _params(pair: Pair, effort: Effort, rate: float, speculative: bool) -> SamplingParams:
    """By the checkpoint's own gate where it has been calibrated, else at random."""
    if pair.llm.has_gate and pair.llm.info.calibration:
        return SamplingParams(deferral_rate=rate, speculative=speculative)
    return _random(rate, speculative)


def _engine(
    pair: Pair, effort: Effort, batch: int, params: SamplingParams | None = None, alone: int | None = None
) -> Callable[[int], Texts]:
    """`batch` texts at once in this engine, whose caches are empty when it begins."""

    def run(number: int) -> Texts:
        prompts = pair.prompts(batch, effort.prompt_tokens, effort.seed + number)
        # Random deferrals are keyed by seed and position: a seed of its own for each row, or all would defer at once.
        each = [
            replace(params or SamplingParams(), max_tokens=effort.tokens, seed=number * 1000 + row)
            for row in range(batch)
        ]
        _forget(pair)
        with _watching(pair) as seen:
            start = time.perf_counter()
            written = pair.llm.generate_batch([_spelt(ids) for ids in prompts], each, batch, alone=alone)
            seconds = time.perf_counter() - start
        return _summed(seconds, written, seen), [generation.token_ids for generation in written]

    return run


def _streamed(pair: Pair, effort: Effort, params: SamplingParams) -> Callable[[int], Texts]:
    """One text, timed from its first token."""

    def run(number: int) -> Texts:
        [prompt] = pair.prompts(1, effort.prompt_tokens, effort.seed + number)
        assert params.deferral_rate is not None
        policy = Random(params.deferral_rate, 1)
        seed = next(s for s in range(number * 1000, 10**9) if policy.authors(None, s, 0)[0] != 0)
        own = replace(params, max_tokens=effort.tokens + 1, seed=seed)
        _forget(pair)
        begun, generation = 0.0, None
        for chunk in pair.llm.stream(_spelt(prompt), own):
            begun = begun or time.perf_counter()
            generation = chunk.generation
        seconds = time.perf_counter() - begun
        assert generation is not None
        run = _summed(seconds, [generation], [[], []])
        return run.model_copy(update={"tokens": effort.tokens}), [generation.token_ids]

    return run


def _transformers(
    pair: Pair, effort: Effort, batch: int, network: PreTrainedModel, draft: PreTrainedModel | None = None
) -> Callable[[int], Texts]:
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
        return Run(seconds=seconds, tokens=sum(map(len, texts)), distinct=_distinct(texts)), texts

    return run


def _bare(pair: Pair, rows: Sequence[int], context: int, widest: int) -> Callable[[], Passes]:
    """Measures bare passes of both models; a tool has none."""
    widths = sorted({*WIDTHS, widest})
    benches = [
        [] if network is None else [BarePasses(network, r, context, widths[-1]) for r in rows]
        for network in pair.networks
    ]
    return lambda: tuple(measure_passes(own, widths) for own in benches)


def _forget(pair: Pair) -> None:
    """Empty the caches: the same prompts come again, and what an earlier run computed must not help this one."""
    for model in pair.llm.models:
        if isinstance(model, Endless):
            model.reserve(2)
            model.reserve(1)


@contextmanager
def _watching(pair: Pair) -> Iterator[list[list[ForwardPass]]]:
    """The forward passes of each model, as they are issued."""
    seen: list[list[ForwardPass]] = [[] for _ in pair.llm.models]
    watched = [(model, own) for model, own in zip(pair.llm.models, seen, strict=True) if isinstance(model, Endless)]
    for model, own in watched:
        model.on_pass = own.append
    try:
        yield seen
    finally:
        for model, _ in watched:
            model.on_pass = None


def _summed(seconds: float, written: Sequence[Generation], seen: Sequence[Sequence[ForwardPass]]) -> Run:
    steps = [step for generation in written for step in generation.steps]
    queries = [generation.forward_passes for generation in written]
    return Run(
        seconds=seconds,
        tokens=len(steps),
        deferred=sum(step.deferred for step in steps),
        again=sum(_again(generation.steps) for generation in written),
        changed=sum(step.changed for step in steps),
        queries=tuple(sum(counts) for counts in zip(*queries, strict=True)),
        passes=tuple(len(own) for own in seen),
        pass_seconds=tuple(sum(each.seconds for each in own) for own in seen),
        drafted=sum(generation.usage.drafted for generation in written),
        accepted=sum(generation.usage.accepted for generation in written),
        recovered=sum(generation.usage.recovered for generation in written),
        distinct=_distinct([generation.token_ids for generation in written]),
    )


def _again(steps: Sequence[Step]) -> int:
    return sum(a.deferred and b.deferred for a, b in pairwise(steps))


def _distinct(texts: Sequence[TokenIds]) -> float:
    pairs = [pair for text in texts for pair in pairwise(text)]
    own = sum(len(set(pairwise(text))) for text in texts)
    return own / len(pairs) if pairs else 1.0


def _spelt(token_ids: TokenIds) -> str:
    return " ".join(map(str, token_ids))
