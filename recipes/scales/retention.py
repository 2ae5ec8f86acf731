"""How much of the large model's gain is kept, and what each system costs: the study's table and picture.

python recipes/scales/retention.py runs/scales/test_b --bench runs/scales/cost.json --out runs/scales/test_b

Cost is in passes of the large model for each written token: a pass of the small one counts what a bare pass of it takes
beside one of the large (`collm bench`). Gain kept: (system - small base) : (large fine-tuned - small base), with a
paired bootstrap interval over the same questions. p: paired tests over whole groups against both models alone, the
small base fine-tuned and the large one not fine-tuned (which is given every chance: any number in its answer counts).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collm.bench.figures import facts
from collm.bench.result import BenchResult
from collm.errors import CollmError
from collm.evaluation.result import EvalResult
from collm.evaluation.stats import paired_difference
from collm.files import replacing, write_text

SMALL, UNTOUCHED, LARGE = "small", "full", "full_tuned"
"""Results (file names) of the small base alone and of the large model, as published and fine-tuned."""
LARGE_ALONE = (UNTOUCHED, LARGE)
"""Results in which `base` is the large model."""
SMALL_MODELS = ("base", "untuned")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Row:
    """One system. `cost` in passes of the large model for each token, `kept` with its 95 % interval.

    `p_values`: against the small base alone and against the large model not fine-tuned.
    """

    name: str
    result: EvalResult
    cost: float
    kept: tuple[float, float, float]
    p_values: tuple[float, float]


def cost_per_token(name: str, result: EvalResult, small_pass: float) -> float:
    """Passes for each written token, those of small models weighted with `small_pass`, the share of a large one's."""
    small = () if name in LARGE_ALONE else SMALL_MODELS
    return sum(passes * (small_pass if model in small else 1) for model, passes in result.passes_per_token.items())


def gain_kept(system: EvalResult, small: EvalResult, large: EvalResult, seed: int = 0) -> tuple[float, float, float]:
    """(system - small) : (large - small) with its paired bootstrap interval; NaN where the large one gains nothing.

    Near-duplicates are resampled together, as in every other interval.

    Raises:
        CollmError: the three did not answer the same questions.
    """
    if not system.ids == small.ids == large.ids:
        raise CollmError(f"{system.name}, {small.name} and {large.name} did not answer the same questions")
    scores = np.array([system.scores, small.scores, large.scores])
    groups = np.unique(small.groups or small.ids, return_inverse=True)[1]
    sums = np.array([np.bincount(groups, weights=row) for row in scores])
    drawn = np.random.default_rng(seed).integers(0, sums.shape[1], size=(RESAMPLES, sums.shape[1]))
    resampled = sums[:, drawn].sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        point = (scores[0] - scores[1]).sum() / (scores[2] - scores[1]).sum()
        ratios = (resampled[0] - resampled[1]) / (resampled[2] - resampled[1])
    low, high = np.nanquantile(np.where(np.isfinite(ratios), ratios, np.nan), [0.025, 0.975])
    return float(point), float(low), float(high)


def p_value(system: EvalResult, rival: EvalResult) -> float:
    """Of the paired test that `collm compare` makes, whatever counts as an answer of either."""
    return paired_difference(rival.scores, system.scores, groups=system.groups or None).p_value


def load_rows(folder: Path, small_pass: float) -> list[Row]:
    """All systems evaluated in a folder, in the order of their cost."""
    results = {path.stem: EvalResult.load(path) for path in sorted(folder.glob("*.json"))}
    missing = [name for name in (SMALL, UNTOUCHED, LARGE) if name not in results]
    if missing:
        raise CollmError(f"{folder} has no {' and no '.join(f'{name}.json' for name in missing)}: evaluate them first")
    rows = [
        Row(
            name,
            result,
            cost_per_token(name, result, small_pass),
            gain_kept(result, results[SMALL], results[LARGE]),
            (p_value(result, results[SMALL]), p_value(result, results[UNTOUCHED])),
        )
        for name, result in results.items()
    ]
    return sorted(rows, key=lambda row: (row.cost, row.name))


def table(rows: Sequence[Row], small_pass: float) -> str:
    """Markdown."""
    lines = [
        f"A pass of the small base costs {small_pass:.3f} of one of the large model.",
        "",
        "| system | cost per token | exact match | 95 % interval | deferred | gain kept | 95 % interval "
        "| p, small | p, full |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, (low, high), (kept, from_, to) = row.result.value, row.result.ci95, row.kept
        lines.append(
            f"| {row.result.name} | {row.cost:.2f} | {value:.1%} | {low:.1%} to {high:.1%} | "
            f"{row.result.deferral_rate:.1%} | {kept:.0%} | {from_:.0%} to {to:.0%} | "
            f"{row.p_values[0]:.2g} | {row.p_values[1]:.2g} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Exact match against cost; systems whose names differ in a number at the end alone are joined by a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.name.rstrip("0123456789").rstrip("_"), []).append(row)
    for number, (family, members) in enumerate(families.items()):
        marker = "osD^v<>Ph*X"[number % 11]
        x, y = [row.cost for row in members], [100 * row.result.value for row in members]
        axes.plot(x, y, marker + "-", markersize=6, linewidth=1.2, label=family.replace("_", " "))
    axes.set_xlabel("passes of the large model for each token (small ones weighted by their cost)")
    axes.set_ylabel("exact match (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the results (.json) of `collm eval`")
    parser.add_argument("--bench", type=Path, required=True, help="what `collm bench --json` wrote for the two models")
    parser.add_argument("--out", type=Path, required=True, help="folder for retention.md and retention.svg")
    args = parser.parse_args()
    try:
        small_pass = 1 / facts(BenchResult.load(args.bench, "figures").cells[0]).cost_ratio
        rows = load_rows(args.folder, small_pass)
        text = table(rows, small_pass)
        write_text(args.out / "retention.md", text)
        plot(rows, args.out / "retention.svg")
    except CollmError as error:
        sys.exit(str(error))
    print(text)


if __name__ == "__main__":
    main()
