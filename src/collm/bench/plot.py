"""The benchmark as a picture: speed against deferral rate, measured and at best."""

from __future__ import annotations

import statistics
from pathlib import Path

from collm.bench.cells import ASSISTANT_ALONE, BASE_ALONE, PLAIN, SPECULATIVE
from collm.bench.figures import ceilings, facts
from collm.bench.result import BenchResult, Cell, check_plot
from collm.errors import CollmError
from collm.files import replacing

COLOURS = {BASE_ALONE: "#8a8f98", ASSISTANT_ALONE: "#b8860b", PLAIN: "#0072b2", SPECULATIVE: "#d55e00"}
LIMITS = ((PLAIN, "plain"), (SPECULATIVE, "speculative"))


def save_plot(result: BenchResult, path: Path) -> None:
    """One panel for each pair and batch size: tokens/s of each system, dashed their ceilings, dotted the oracle.

    Raises as `check_plot`, and CollmError where there is nothing to draw or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], list[Cell]] = {}
    for cell in result.cells:
        if cell.kind == "pair":
            panels.setdefault((cell.pair, cell.batch), []).append(cell)
    if not panels:
        raise CollmError("there are no pair cells to draw; leave --plot out, or add --only pair")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, ((pair, batch), cells) in zip(grid.flat, panels.items(), strict=False):
        cells = sorted(cells, key=lambda cell: cell.rate)
        rates = [100 * facts(cell).rate for cell in cells]
        for system, colour in COLOURS.items():
            if system in cells[0].runs:
                speeds = [[run.tokens_per_second for run in cell.runs[system]] for cell in cells]
                axes.plot(rates, [statistics.median(s) for s in speeds], "o-", color=colour, markersize=4, label=system)
        for system, limit in LIMITS:
            best = [_best(cell, limit) for cell in cells]
            axes.plot(rates, best, "--_", color=COLOURS[system], linewidth=1, label=f"ceiling: {limit}")
        best = [_best(cell, "oracle") for cell in cells]
        axes.plot(rates, best, ":_", color="#555", linewidth=1, label="ceiling: oracle")
        axes.set_title(f"{pair}, batch {batch}", fontsize=9)
        axes.set_xlabel("deferred tokens (%)", fontsize=8)
        axes.set_ylabel("tokens/s", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(frameon=False, fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix("."))


def _best(cell: Cell, limit: str) -> float:
    """Tokens/s at a ceiling, the median over the rounds."""
    tokens = cell.runs[PLAIN][0].tokens
    return statistics.median(tokens / float(getattr(best, limit)) for best in ceilings(cell))
