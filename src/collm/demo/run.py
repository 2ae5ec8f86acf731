"""The demo from beginning to end: the order of things, in two processes, and what is shown of it."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from collm.data.examples import load_examples
from collm.demo.corpus import KINDS
from collm.demo.places import data_file, model_folder, trace_file
from collm.demo.plan import ARITHMETIC, BASE, BOTH, EXPERTS, FACTS, SYSTEMS, Plan, System
from collm.demo.workers import Job, Progress, Workers
from collm.errors import CollmError
from collm.files import write_text
from collm.models.info import load_info
from collm.report.html import Page, write_html
from collm.report.plots import save_curve
from collm.report.systems import SystemRow, systems_table
from collm.report.terminal import print_table, print_traces
from collm.report.trace import Trace, read_traces

SETTINGS, RESULTS, REPORT, LOG = "demo.json", "results.json", "report.html", "log.txt"
SAMPLES_OF_KIND = 2
TRAINING = {BASE: 80.0, ARITHMETIC: 55.0, FACTS: 30.0}
SCORING = 3.0
"""Seconds of one process on a busy machine: what share of the whole each part is."""


def run_demo(
    out: str | Path, *, seed: int = 0, plan: Plan | None = None, workers: int = 2, console: Console | None = None
) -> dict[str, Any]:
    """Train three small models from scratch, teach them to write together, evaluate, and show it.

    Writes `results.json`, `report.html`, `curve.csv` and `curve.svg` into `out`, beside the models, data and traces
    they come from. A stopped demo goes on where it was. The figures do not depend on `workers`.

    Args:
        workers: processes that work side by side, one thread each; 0 does all in this process. Processes are spawned,
            so a script that calls this needs the usual `if __name__ == "__main__":`.
        console: where table and samples go; progress goes to stderr.

    Returns:
        What `results.json` holds.

    Raises:
        CollmError: `out` holds something else.
    """
    begin = time.monotonic()
    out, plan = Path(out), plan or Plan()
    resumed = _claim(out, plan, seed)
    leaders = sorted((s for s in SYSTEMS if s.like is None), key=lambda s: -len(s.assistants))
    work = sum(TRAINING.values()) + len(TRAINING) * SCORING + sum(map(_work, leaders))
    say = Progress(begin, Console(file=sys.stderr), work, workers)  # this one: stages write theirs to the log
    if resumed:
        say(f"going on in {out}: what an earlier start has finished is not done again")
    say("inventing a world: people, sums, questions")
    with Workers(workers, out / LOG, say, say.finished) as pool:
        pool.all([Job("write_files", (out, plan, seed)), *[Job("nothing")] * (workers - 1)])
        say("training three models from scratch: the base, and an expert each for facts and arithmetic")
        pool.all([Job("train_single", (out, name, plan, seed), work) for name, work in TRAINING.items()])
        say("scoring the training questions under each of them")
        pool.all([Job("score_training_data", (out, name), SCORING) for name in TRAINING])
        say("training the systems, calibrating on validation questions, evaluating on test questions")
        say("(a base with an expert gets worse by itself: it leaves to the expert what that knows)")
        found = pool.all(
            [
                Job(
                    "run_system",
                    (out, system, [s for s in SYSTEMS if s.like == system.name], plan, seed),
                    _work(system),
                )
                for system in leaders
            ]
        )
    lines = {line["name"]: line for part in found for line in part}
    results = {
        "seconds": round(time.monotonic() - begin, 1),
        "resumed": resumed,
        "seed": seed,
        "workers": workers,
        "test_questions": plan.sizes.test,
        "systems": [lines[system.name] for system in SYSTEMS],
        "plan": plan.to_dict(),
    }
    _show(out, results, console or Console())
    return results


def _work(system: System) -> float:
    """As `TRAINING`, of a system: its training, where it is not done already, its calibration, its answers."""
    return 4.0 if system.checkpoint in EXPERTS else (14.0, 20.0, 28.0)[len(system.assistants)]


def _claim(out: Path, plan: Plan, seed: int) -> bool:
    """Make `out` this demo's folder; whether an earlier start of it was there."""
    settings = json.loads(json.dumps({"seed": seed, "plan": plan.to_dict()}))
    path = out / SETTINGS
    if path.is_file():
        if json.loads(path.read_text()) != settings:
            raise CollmError(f"{out} holds a demo with other settings: choose another folder, or delete it")
        return True
    if out.is_dir() and any(out.iterdir()):
        raise CollmError(f"{out} is not empty and holds no demo: choose another folder")
    write_text(path, json.dumps(settings, indent=1))
    return False


def _show(out: Path, results: dict[str, Any], console: Console) -> None:
    """Table and samples in the terminal; results.json, report.html and the curve in the folder."""
    rows = [
        SystemRow(
            line["name"],
            line["exact_match"],
            (line["ci95"][0], line["ci95"][1]),
            line["kind"],
            line["deferral_rate"],
            line["changed_share"],
            note=" ".join(f"{kind} {line['by_kind'][kind]:.0%}" for kind in KINDS),
        )
        for line in results["systems"]
    ]
    joint = next(system for system in SYSTEMS if system.name == BOTH)
    info = load_info(model_folder(out, joint.checkpoint))
    assert info is not None
    [curve] = info.calibration
    save_curve(curve, out)
    traces = read_traces(trace_file(out, joint))
    lead = (
        f"A base that knows neither, an assistant that knows facts ({FACTS}) and one that can calculate ({ARITHMETIC}) "
        f"answer {results['test_questions']} held-out questions, token by token together. Nobody told the base when "
        "to ask whom."
    )
    footer = f"collm demo, seed {results['seed']}, {results['seconds']:.0f} s with {results['workers']} processes."
    page = Page("collm demo", lead, tuple(rows), "exact match", curve, footer=footer)
    write_html(_by_kind(out, traces), out / REPORT, page)
    write_text(out / RESULTS, json.dumps(results, indent=1, ensure_ascii=False))
    plain = [dataclasses.replace(row, note="") for row in rows]
    print_table(systems_table(plain, title=f"{results['test_questions']} held-out questions"), console)
    print_traces(_by_kind(out, traces, SAMPLES_OF_KIND), console)
    console.print(
        Text(f"{results['seconds']:.0f} s. More in {out / REPORT}; figures in {out / RESULTS}."), highlight=False
    )


def _by_kind(out: Path, traces: list[Trace], most: int | None = None) -> list[Trace]:
    """Those that need both experts first.

    Args:
        most: of each kind, the first ones, right or wrong as they come.
    """
    by_id = {trace.id: trace for trace in traces}
    examples = load_examples(data_file(out, "test"))
    ids = [[e.id for e in examples if e.fields["kind"] == kind][:most] for kind in reversed(KINDS)]
    return [by_id[id] for of_kind in ids for id in of_kind]
