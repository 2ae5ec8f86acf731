"""What a system wrote, read from the traces beside its result: counts over all tokens, and a few texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from collm.evaluation.evaluate import example_seed
from collm.evaluation.result import EvalResult, trace_path
from collm.identity.comparing import differences
from collm.report.tokens import TokenFigures, token_figures
from collm.report.trace import HEADER_KEY, Trace, read_rows, stream_traces


@dataclass(frozen=True)
class Written:
    """What a system wrote: counts over all of its tokens, and a few texts.

    `missing` says why there is nothing but the result, as a sentence.
    """

    result: EvalResult
    figures: TokenFigures | None = None
    samples: tuple[Trace, ...] = ()
    missing: str = ""

    @property
    def gated(self) -> bool:
        return self.figures is not None and bool(self.figures.gates)

    @property
    def threshold(self) -> float | None:
        """The gate's threshold as log-odds; None where it was not the gate's, or came from a calibration."""
        settings = self.result.settings
        if settings.get("params.deferral") != "threshold" or settings.get("policy") is not None:
            return None
        eta = settings.get("params.threshold")
        if eta is None:
            eta = None if settings.get("params.deferral_rate") is not None else 0.5
        return None if eta is None or not 0 < eta < 1 else math.log(eta) - math.log1p(-eta)


def read_written(path: Path, result: EvalResult, *, samples: int = 6, seed: int = 0) -> Written:
    """Read the traces beside a result, one text at a time.

    Args:
        samples: how many texts are kept, half of them right and half wrong where there are as many.
        seed: draws them; the same questions for every system as far as they got them alike.

    Raises:
        CollmError: damaged traces.
    """
    file = trace_path(path)
    if not file.is_file():
        return Written(result, missing=f"There are no traces beside {path.name}: {file.name} is missing.")
    _, header = next(read_rows(file), (0, {}))
    if HEADER_KEY in header and differences(header.get("settings", {}), result.settings):
        return Written(result, missing=f"The traces in {file.name} are of a run with other settings than {path.name}.")
    chosen = choose(result, samples, seed)
    kept: dict[str, Trace] = {}
    seen: set[str] = set()

    def passing() -> Iterator[Trace]:
        for trace in stream_traces(file):
            seen.add(trace.id)
            if trace.id in chosen:
                kept[trace.id] = trace
            yield trace

    figures = token_figures(passing())
    if seen != set(result.ids):
        return Written(result, missing=f"The traces in {file.name} are not those of the questions in {path.name}.")
    return Written(result, figures, tuple(kept[id] for id in chosen))


def choose(result: EvalResult, count: int, seed: int) -> list[str]:
    """Ids of `count` examples, right ones first, in an order drawn by `seed` that is the same for every system."""
    drawn = sorted(zip(result.ids, result.scores, strict=True), key=lambda row: example_seed(seed, row[0]))
    right = [id for id, score in drawn if score == 1]
    wrong = [id for id, score in drawn if score != 1]
    half = max(count // 2, count - len(wrong))
    return [*right[:half], *wrong[: count - min(half, len(right))]]
