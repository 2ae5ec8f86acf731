"""From raw runs to figures, and from figures to verdicts: what was asked of them, and whether that holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from collm.bench.card import DEMANDS
from collm.bench.ceilings import Ceilings
from collm.bench.cells import ASSISTANT_ALONE, BASE_ALONE, PLAIN, REFERENCE, SAMPLED, SPECULATIVE
from collm.bench.paired import Ratio
from collm.bench.result import BenchResult, Cell, Run

DEAR_RATES = (0.2, 0.3)
EQUAL = 1e-9
SAME = "speculative texts = plain texts"


@dataclass(frozen=True, slots=True)
class Facts:
    """What a cell's ceilings depend on, as measured over all its rounds."""

    cost_ratio: float
    rate: float
    agreement: float
    again: float
    distinct: float


def facts(cell: Cell) -> Facts:
    """Raises ValueError for a cell without plain runs and bare passes."""
    runs = cell.runs[PLAIN]
    deferred = sum(run.deferred for run in runs)
    costs = [cell.costs(number) for number in range(len(cell.passes))]
    return Facts(
        cost_ratio=statistics.median(assistant(1) / base(1) for base, assistant in costs),
        rate=deferred / sum(run.tokens for run in runs),
        agreement=1 - sum(run.changed for run in runs) / deferred if deferred else 1.0,
        again=sum(run.again for run in runs) / deferred if deferred else 0.0,
        distinct=statistics.mean(run.distinct for run in runs),
    )


def ceilings(cell: Cell) -> list[Ceilings]:
    """For each round, the seconds in which its texts could have been written at best, prompts included.

    The plain ceiling knows how many tokens this very round deferred; the others how often the models agree on the
    whole. Reading a prompt costs what a pass over it costs beyond that over one token.
    """
    known, found = facts(cell), []
    for number, run in enumerate(cell.runs[PLAIN]):
        base, assistant = cell.costs(number)
        rate = run.deferred / run.tokens
        each = Ceilings.of(base, assistant, rate, known.agreement, known.again, cell.batch)
        reading = base(cell.context, cell.batch) - base(1, cell.batch) if cell.kind == "pair" else 0.0
        if rate and cell.kind == "pair":
            reading += assistant(cell.context, cell.batch) - assistant(1, cell.batch)
        steps = run.tokens / cell.batch
        found.append(Ceilings(*(seconds * steps + reading for seconds in (each.plain, each.speculative, each.oracle))))
    return found


def speed_ratio(fast: Sequence[Run], slow: Sequence[Run]) -> Ratio:
    """Tokens/s of one system over another's, round by round."""
    return Ratio.of([a.tokens_per_second / b.tokens_per_second for a, b in zip(fast, slow, strict=True)])


def of_ceiling(cell: Cell, system: str, which: Callable[[Ceilings], float]) -> Ratio:
    """The share of a ceiling that a system reaches: seconds at best over seconds measured."""
    return Ratio.of([which(best) / run.seconds for best, run in zip(ceilings(cell), cell.runs[system], strict=True)])


def beyond_passes(runs: Sequence[Run]) -> Ratio | None:
    """Wall time over the time of the forward passes issued; None where these were not timed."""
    if not all(run.pass_seconds for run in runs):
        return None
    return Ratio.of([run.seconds / run.pass_seconds for run in runs])


def beyond_bare_passes(cell: Cell, system: str) -> Ratio:
    """Wall time over what bare passes of the shapes issued would have taken."""
    ratios = []
    for number, run in enumerate(cell.runs[system]):
        costs = zip(cell.costs(number), run.issued, strict=True)
        bare = sum(count * cost(tokens / rows, rows) for cost, own in costs for rows, tokens, count, _ in own)
        ratios.append(run.seconds / bare)
    return Ratio.of(ratios)


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one cell. It fails only if its whole interval lies beyond the limit."""

    demand: str
    where: str
    ratio: Ratio
    limit: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.ratio.low <= self.limit if self.at_most else self.ratio.high >= self.limit

    @property
    def margin(self) -> float:
        """How far the median is on the right side of the limit, as a ratio."""
        return self.limit / self.ratio.median if self.at_most else self.ratio.median / self.limit


def figures(result: BenchResult) -> list[Figure]:
    """Every figure that has a limit, in every cell where it applies."""
    found: list[Figure] = []
    for cell in result.cells:
        if cell.kind == "pair":
            found += _pair_figures(cell)
            # A pass over a block rounds otherwise than one token's, and in lower precision that often breaks a tie.
            if result.settings.get("dtype", "float32") == "float32":
                where = f"{cell.pair}, batch {cell.batch}, rate {cell.rate:g}"
                found.append(Figure(SAME, where, _certain(cell.same_texts == cell.texts), 1.0))
        elif cell.kind == "engine" and cell.batch == 1:
            ratio = speed_ratio(cell.runs[BASE_ALONE], cell.runs[REFERENCE.format(BASE_ALONE)])
            found.append(Figure("base alone : transformers generate, batch 1", cell.pair, ratio, 1.1))
        elif cell.kind == "batch" and cell.batch >= 16:
            for system in (BASE_ALONE, PLAIN, SPECULATIVE):
                many, one = cell.runs[f"{system}, batch {cell.batch}"], cell.runs[f"{system}, batch 1"]
                where = f"{cell.pair}, {system}, rate {cell.rate:g}"
                found.append(Figure(f"batch {cell.batch} : batch 1, tokens/s", where, speed_ratio(many, one), 5.0))
        elif cell.kind == "card":
            found += _card_figures(cell)
        if str(result.settings.get("device", "")).startswith("cuda") and result.settings.get("shape") == "gpu":
            found += _gpu_figures(cell)
    return found + list(_growth_figures(result))


def _pair_figures(cell: Cell) -> Iterator[Figure]:
    known, where = facts(cell), f"{cell.pair}, batch {cell.batch}, rate {cell.rate:g}"
    plain, fast = cell.runs[PLAIN], cell.runs[SPECULATIVE]
    if cell.batch == 1:
        for system in (BASE_ALONE, PLAIN, SPECULATIVE):
            beyond = beyond_passes(cell.runs[system])
            if beyond is not None:
                demand = "measured time : time of the passes issued, batch 1"
                yield Figure(demand, f"{where}, {system}", beyond, 1.1, at_most=True)
        share = of_ceiling(cell, SPECULATIVE, lambda best: best.speculative)
        yield Figure("speculative : its ceiling, batch 1", where, share, 0.85)
    gain = speed_ratio(fast, plain)
    yield Figure("speculative : plain, never a loss", where, gain, 1.0)
    if cell.batch == 1 and known.cost_ratio >= 7.5 and known.agreement >= 0.875 and cell.rate >= DEAR_RATES[0]:
        yield Figure("speculative : plain, cost ratio 8, agreement 0.9, rate from 0.2", where, gain, 1.3)
    dear = known.cost_ratio >= 4 and DEAR_RATES[0] - EQUAL <= cell.rate <= DEAR_RATES[1] + EQUAL
    if cell.batch == 1 and dear and ASSISTANT_ALONE in cell.runs:
        faster = speed_ratio(fast, cell.runs[ASSISTANT_ALONE])
        yield Figure("pair : assistant alone, cost ratio 4, rate 0.2 to 0.3, batch 1", where, faster, 1.5)
    # A count has no interval: it is the number that was asked for, or it is not.
    exact = all(run.queries == (run.tokens, run.deferred + run.abstained) for run in plain)
    yield Figure("plain: one base pass a token, one assistant pass a deferral", where, _certain(exact), 1.0)


def _card_figures(cell: Cell) -> Iterator[Figure]:
    """How near the passes come to what the card's memory allows."""
    for key, value in cell.card.items():
        if key in DEMANDS:
            at_most, limit = DEMANDS[key]
            yield Figure(f"card: {key}", cell.pair, Ratio(value, value, value), limit, at_most)
    if SAMPLED in cell.runs:
        yield _gpu_figure("sampled.b16 : greedy.b16", cell, SAMPLED, ASSISTANT_ALONE)


def _gpu_figures(cell: Cell) -> Iterator[Figure]:
    """What the pair of `--shape gpu` gains on a GPU, over its assistant in the same engine."""
    if cell.kind == "engine" and cell.batch == 1 and ASSISTANT_ALONE in cell.runs:
        yield _gpu_figure("alone.b1 : generate.b1", cell, ASSISTANT_ALONE, REFERENCE.format(ASSISTANT_ALONE))
    if cell.kind == "pair" and abs(cell.rate - 0.3) < EQUAL and ASSISTANT_ALONE in cell.runs:
        for name, system in (("plain", PLAIN), ("speculative", SPECULATIVE)):
            if (key := f"{name}.b{cell.batch} : alone.b{cell.batch}") in DEMANDS:
                yield _gpu_figure(key, cell, system, ASSISTANT_ALONE)


def _gpu_figure(key: str, cell: Cell, fast: str, slow: str) -> Figure:
    at_most, limit = DEMANDS[key]
    return Figure(f"card: {key}", cell.pair, speed_ratio(cell.runs[fast], cell.runs[slow]), limit, at_most)


def _growth_figures(result: BenchResult) -> Iterator[Figure]:
    """Time per token against bare passes behind the same context, relative to the shortest context."""
    for pair in dict.fromkeys(cell.pair for cell in result.cells if cell.kind == "growth"):
        cells = sorted((c for c in result.cells if c.kind == "growth" and c.pair == pair), key=lambda c: c.context)
        for system in (PLAIN, SPECULATIVE):
            first = _against_bare(cells[0], system)
            for cell in cells[1:]:
                ratios = [a / b for a, b in zip(_against_bare(cell, system), first, strict=False)]
                where = f"{pair}, {system}, {cells[0].context} to {cell.context} tokens"
                yield Figure("cost per token : cost of bare passes, growth", where, Ratio.of(ratios), 1.1, at_most=True)


def _against_bare(cell: Cell, system: str) -> list[float]:
    return [run.seconds / best.plain for run, best in zip(cell.runs[system], ceilings(cell), strict=True)]


def _certain(is_so: bool) -> Ratio:
    return Ratio(float(is_so), float(is_so), float(is_so))
