"""What is timed side by side: one cell of the benchmark is some systems, interleaved on the same prompts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from collm.bench import card
from collm.bench.paired import in_turn
from collm.bench.pairs import Pair
from collm.bench.passes import BarePasses, Measured, measure_passes
from collm.bench.result import Cell, Kind, Run
from collm.bench.systems import Effort, System, Texts, deferring, engine, randomly, reference, streamed
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams

WIDTHS = (1, 2, 4, 8, 16)
PLAIN, SPECULATIVE = "pair, plain", "pair, speculative"
BASE_ALONE, ASSISTANT_ALONE = "base alone", "assistant alone"
SAMPLED = "assistant alone, drawn"
REFERENCE = "{} (transformers)"
ASSISTED = "assisted generation (transformers)"
Passes = tuple[Measured, ...]
"""Bare passes of base and assistant."""


def pair_cell(pair: Pair, effort: Effort, batch: int, rate: float) -> Cell:
    """Base and assistant alone, the pair plain and speculative, and bare passes of the shapes these issue."""
    alone = pair.system()  # of each model in turn: caches and costs are kept by model
    runs = {
        BASE_ALONE: engine(pair, effort, batch, alone=0, llm=alone),
        PLAIN: engine(pair, effort, batch, deferring(pair, rate, False)),
        SPECULATIVE: engine(pair, effort, batch, deferring(pair, rate, True)),
    }
    if pair.networks[1] is not None:
        runs[ASSISTANT_ALONE] = engine(pair, effort, batch, alone=1, llm=alone)
    bare = _bare(pair, sorted({1, batch}), effort.prompt_tokens + effort.tokens // 2, effort.prompt_tokens)
    found, passes = _beside(bare, runs, effort)
    written = [[text for _, texts in found[system] for text in texts] for system in (PLAIN, SPECULATIVE)]
    same = [plain == fast for plain, fast in zip(*written, strict=True)]
    cell = _cell("pair", pair, effort, found, batch=batch, rate=rate, context=effort.prompt_tokens)
    return cell.model_copy(update={"passes": passes, "texts": len(same), "same_texts": sum(same)})


def engine_cell(pair: Pair, effort: Effort, batch: int) -> Cell:
    """Each model alone: in this engine, and as transformers' own `generate` runs it."""
    base, assistant = pair.networks
    alone = pair.system()
    runs = {
        BASE_ALONE: engine(pair, effort, batch, alone=0, llm=alone),
        REFERENCE.format(BASE_ALONE): reference(pair, effort, batch, base),
    }
    if assistant is not None:
        runs[ASSISTANT_ALONE] = engine(pair, effort, batch, alone=1, llm=alone)
        runs[REFERENCE.format(ASSISTANT_ALONE)] = reference(pair, effort, batch, assistant)
        if batch == 1:  # all that transformers' assisted generation can do
            runs[ASSISTED] = reference(pair, effort, batch, assistant, draft=base)
    return _cell("engine", pair, effort, in_turn(runs, effort.rounds), batch=batch, context=effort.prompt_tokens)


def batch_cell(pair: Pair, effort: Effort, batch: int, rate: float) -> Cell:
    """The same systems with one text at a time and with `batch`."""
    runs = {}
    for size in (1, batch):
        runs[f"{BASE_ALONE}, batch {size}"] = engine(pair, effort, size, alone=0)
        runs[f"{PLAIN}, batch {size}"] = engine(pair, effort, size, deferring(pair, rate, False))
        runs[f"{SPECULATIVE}, batch {size}"] = engine(pair, effort, size, deferring(pair, rate, True))
    found = in_turn(runs, effort.rounds)
    return _cell("batch", pair, effort, found, batch=batch, rate=rate, context=effort.prompt_tokens)


def growth_cell(pair: Pair, effort: Effort, context: int, rate: float) -> Cell:
    """The pair behind a long prompt, from its first token on, and bare passes behind the same context."""
    longer = replace(effort, prompt_tokens=context)
    runs = {
        PLAIN: streamed(pair, longer, randomly(rate, False)),
        SPECULATIVE: streamed(pair, longer, randomly(rate, True)),
    }
    found, passes = _beside(_bare(pair, [1], context + effort.tokens // 2, WIDTHS[-1]), runs, effort)
    cell = _cell("growth", pair, longer, found, rate=rate, context=context)
    return cell.model_copy(update={"passes": passes})


def card_cell(pair: Pair, effort: Effort, compiled: bool = True) -> Cell:
    """What the card's memory allows, how near to it the passes of both models come, what a whole engine adds to them,
    and what drawing costs; all of 16 texts, but for the passes. `compiled`: of compiled modules, too."""
    began = time.perf_counter()
    llm = pair.system()
    llm.warm_up()
    found = {"ready_seconds": time.perf_counter() - began}
    models = {name: model for name, model in zip(("base", "assistant"), llm.models, strict=True)
              if isinstance(model, LocalModel)}  # fmt: skip
    again = {name: partial(LocalModel, model.model, formatter.tokenizer, model.head, name=name)
             for (name, model), formatter in zip(models.items(), llm.formatters, strict=False)}  # fmt: skip
    device = next(iter(models.values())).model.device
    found["copy_bytes_per_second"] = bandwidth = card.copy_bandwidth(device)
    for name, model in models.items():
        for tokens in card.TOKENS:
            bound = card.bytes_read(model.model, tokens=tokens) / bandwidth
            seconds = card.pass_seconds(model, tokens)
            found |= {f"pass_seconds.{name}.T{tokens}": seconds, f"pass.{name}.T{tokens}": seconds / bound}
    if "assistant" in models:
        found |= _long(again["assistant"], models["assistant"].context_length, bandwidth)
    for key in ("modules", "compiled") if compiled else ("modules",):
        found |= _modules(again["base"], models["base"].model, bandwidth, key)
    _, whole = card.filled(models["base"], [card.CONTEXT] * 16, [1] * 16)
    found["launches_a_pass"], found["waits_a_pass"] = card.launches_and_waits(card.runtime_calls(whole))
    plain = {batch: engine(pair, effort, batch, deferring(pair, 0.3, False), llm=llm) for batch in (1, 16)}
    for run in plain.values():
        run(0)
    spent = [card.Spent(model, effort.prompt_tokens + effort.tokens // 2) for model in models.values()]
    for batch, run in plain.items():
        for model in models.values():
            card.emptied(model)
        for each in spent:
            each.anew()
        done, _ = run(1)
        for each, issued in zip(spent, done.issued, strict=False):
            for _, tokens, _, seconds in issued:
                each.add(tokens, seconds)
        found[f"overhead.b{batch}"] = done.seconds / sum(each.seconds for each in spent)
        found[f"launches_a_token.b{batch}"] = sum(each.launches for each in spent) / done.tokens
        found[f"waits_a_token.b{batch}"] = sum(each.waits for each in spent) / done.tokens
    runs = {}
    if len(models) > 1:
        drawn = SamplingParams(temperature=1.0, top_p=0.9)
        runs = {
            ASSISTANT_ALONE: engine(pair, effort, 16, alone=1, llm=llm),
            SAMPLED: engine(pair, effort, 16, drawn, alone=1, llm=llm),
        }
    cell = _cell("card", pair, effort, in_turn(runs, effort.rounds), batch=16, context=effort.prompt_tokens)
    return cell.model_copy(update={"card": found})


def _long(again: Callable[..., LocalModel], longest: int | None, bandwidth: float) -> dict[str, float]:
    """Nothing where texts cannot be so long, or there is no memory for them."""
    if longest is not None and longest <= card.LONG:
        return {}
    longer = again(max_cache_tokens=card.room_for_long(card.LONG))
    try:
        ratios = {key: s / bound for key, s, bound in card.long_passes(longer, bandwidth, card.LONG)}
        return {f"long.assistant.{key}": ratio for key, ratio in ratios.items()}
    except torch.OutOfMemoryError:
        told = f"no memory for {card.ROWS} texts of {card.LONG} positions beside the models: these are not measured"
        warnings.warn(told, stacklevel=2)
        return {}
    finally:
        longer.forget()


def _modules(
    again: Callable[..., LocalModel], network: PreTrainedModel, bandwidth: float, key: str
) -> dict[str, float]:
    began = time.perf_counter()
    found = card.of_modules(again, network, compiled=key == "compiled")
    if found is None:
        return {}
    try:
        ratio = card.pass_seconds(found, 16) * bandwidth / card.bytes_read(network, tokens=16)
        return {f"{key}.base.T16": ratio, f"{key}_seconds": time.perf_counter() - began}
    finally:
        found.forget()


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


def _beside(
    bare: Callable[[], Passes], runs: dict[str, System], effort: Effort
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


def _bare(pair: Pair, rows: Sequence[int], context: int, widest: int) -> Callable[[], Passes]:
    """Measures bare passes of both models; a tool has none."""
    widths = sorted({*WIDTHS, widest})
    benches = [
        [] if network is None else [BarePasses(network, r, context, widths[-1]) for r in rows]
        for network in pair.networks
    ]
    return lambda: tuple(measure_passes(own, widths) for own in benches)
