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
TRAINING = {BASE: 65.0, ARITHMETIC: 48.0, FACTS: 33.0}
"""Seconds of one process, as of the other parts: what share of the whole each is."""


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    plan: Plan | None = None,
    workers: int = 2,
    threads: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train three small models from scratch, teach them to write together, evaluate, and show it.

    Writes `results.json`, `report.html`, `curve.csv` and `curve.svg` into `out`, beside the models, data and traces
    they come from. A stopped demo goes on where it was. The figures do not depend on `workers`.

    Args:
        workers: processes that work side by side; 0 does all in this process, with as many threads as torch has here.
            Processes are spawned, so a script that calls this needs the usual `if __name__ == "__main__":`.
        threads: of each process. With another number sums of floats are taken in another order, and training makes
            other models of it.
        console: where table and samples go; progress goes to stderr.

    Returns:
        What `results.json` holds.

    Raises:
        CollmError: `out` holds something else.
    """
    begin = time.monotonic()
    out, plan = Path(out), plan or Plan()
    resumed = _claim(out, {"seed": seed, "threads": threads, "plan": plan.to_dict()})
    leaders = [s for s in SYSTEMS if s.like is None]
    alone = {name: [s for s in leaders if s.alone == name] for name in TRAINING}
    # The longest first, so that no process waits long for the other.
    singles = sorted(((_work_single(name, alone[name]), name) for name in TRAINING), reverse=True)
    pairs = sorted((s for s in leaders if s.assistants), key=_work, reverse=True)
    work = sum(work for work, _ in singles) + sum(map(_work, pairs))
    say = Progress(begin, Console(file=sys.stderr), work, workers)  # this one: stages write theirs to the log
    if resumed:
        say(f"going on in {out}: what an earlier start has finished is not done again")
    say("inventing a world: people, sums, questions")
    with Workers(workers, out / LOG, say, say.finished, threads) as pool:
        pool.all([Job("write_files", (out, plan, seed)), *[Job("nothing")] * (workers - 1)])
        say("training three models from scratch: the base, and an expert each for facts and arithmetic")
        say("(what each can do alone is tried, and what each makes of the training questions is kept)")
        found = pool.all([Job("run_single", (out, name, alone[name], plan, seed), work) for work, name in singles])
        say(
            "teaching the base when to ask: training, calibrating on validation questions, evaluating on test questions"
        )
        say("(a base with an expert gets worse by itself: it leaves to the expert what that knows)")
        found += pool.all([Job("run_system", (out, s, _followers(s), plan, seed), _work(s)) for s in pairs])
    lines = {line["name"]: line for part in found for line in part}
    results = {
        "seconds": round(time.monotonic() - begin, 1),
        "resumed": resumed,
        "seed": seed,
        "workers": workers,
        "threads": threads,
        "test_questions": plan.sizes.test,
        "systems": [lines[system.name] for system in SYSTEMS],
        "plan": plan.to_dict(),
    }
    _show(out, results, console or Console())
    return results


def _followers(system: System) -> list[System]:
    return [other for other in SYSTEMS if other.like == system.name]


def _work(system: System) -> float:
    """As `TRAINING`, of a system: its training, where it is not done already, its calibration, its answers."""
    if system.checkpoint in EXPERTS:
        return 1.0
    return (12.0, 18.0, 21.0)[len(system.assistants)] + 6.0 * len(_followers(system))


def _work_single(name: str, alone: list[System]) -> float:
    return TRAINING[name] + 3.0 + sum(map(_work, alone))


def _claim(out: Path, settings: dict[str, Any]) -> bool:
    """Make `out` the folder of a demo with these settings; whether an earlier start of it was there."""
    settings = json.loads(json.dumps(settings))
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
    footer = f"collm demo, seed {results['seed']}, {results['seconds']:.0f} s, {results['workers']} processes."
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
