"""What was answered so far, kept in a folder so that a killed run goes on; and figures made of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm.data.journal import Journal
from collm.errors import CollmError
from collm.evaluation.likelihood import Likelihood
from collm.evaluation.runs import HEADER_VERSION
from collm.files import claimed
from collm.identity.comparing import differences
from collm.report.trace import HEADER_KEY, Trace, trace_from_dict, trace_to_dict
from collm.types import unit_of

TRACES = "traces.jsonl"
"""Generated texts, in the form of all traces."""
LIKELIHOODS = "likelihoods.jsonl"
Row = dict[str, Any]


def fingerprint(*parts: Any) -> str:
    """The name of a request: all that decides its answer, hashed."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


class Records:
    """Answers by the fingerprint of their request.

    Args:
        folder: where each is kept as it comes; None: in memory only.
        settings: what decides all answers (models, weights, who writes); answers given under others are refused.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        self.traces: dict[str, Trace] = {}
        self.likelihoods: dict[str, Likelihood] = {}

    @contextmanager
    def keeping_traces(self) -> Iterator[Callable[[Trace], None]]:
        """Takes in what an earlier run has left; what is given to the function is safe when it returns."""
        with self._journal(TRACES) as (rows, append):
            self.traces |= {row["id"]: trace_from_dict(row) for row in rows}

            def keep(trace: Trace) -> None:
                append(trace_to_dict(trace))
                self.traces[trace.id] = trace

            yield keep

    @contextmanager
    def keeping_likelihoods(self) -> Iterator[Callable[[str, Likelihood], None]]:
        """As `keeping_traces`."""
        with self._journal(LIKELIHOODS) as (rows, append):
            self.likelihoods |= {row["id"]: _from_row(row) for row in rows}

            def keep(name: str, found: Likelihood) -> None:
                append({"id": name, **_to_row(found)})
                self.likelihoods[name] = found

            yield keep

    def figures(self, names: Collection[str], models: Sequence[str]) -> Row:
        """Of the answers to some requests."""
        written = [self.traces[name] for name in names if name in self.traces]
        scored = [self.likelihoods[name] for name in names if name in self.likelihoods]
        return {
            **(generation_figures(written, models) if written else {}),
            **(likelihood_figures(scored, models) if scored else {}),
        }

    @contextmanager
    def _journal(self, name: str) -> Iterator[tuple[Sequence[Row], Callable[[Row], None]]]:
        if self.folder is None:
            yield [], lambda row: None
            return
        path = self.folder / name
        # JSON has no tuples: what is compared has been through it, too.
        settings = json.loads(json.dumps(self.settings))
        with (
            claimed(self.folder, folder=True),
            Journal(path, {HEADER_KEY: HEADER_VERSION, "settings": settings}) as journal,
        ):
            there = journal.found.get("settings")
            what = differences(there if isinstance(there, dict) else {}, settings)
            if what and journal.found[HEADER_KEY] != HEADER_VERSION:
                raise CollmError(
                    f"{path} was begun by another version of collm, which noted otherwise what decides an answer: give "
                    "another --out folder, or delete this one to answer anew"
                )
            if what:
                raise CollmError(f"{path} holds a run with other settings ({what}); give another --out folder")
            yield journal.records, journal.append


def _to_row(found: Likelihood) -> Row:
    log_prob = found.log_prob if math.isfinite(found.log_prob) else None
    return {"log_prob": log_prob, "greedy": found.greedy, "credit": list(found.credit)}


def _from_row(row: Mapping[str, Any]) -> Likelihood:
    log_prob = -math.inf if row["log_prob"] is None else float(row["log_prob"])
    return Likelihood(log_prob, bool(row["greedy"]), tuple(row["credit"]))


def generation_figures(traces: Sequence[Trace], names: Sequence[str]) -> Row:
    """What written texts cost and who wrote them; forward passes count for every text that took part."""
    steps = [step for trace in traces for step in trace.generation.steps]
    passes = [trace.generation.forward_passes for trace in traces]
    return {
        "texts": len(traces),
        "tokens": sum(len(step.all_token_ids) for step in steps),
        "unit": unit_of(steps),
        "deferral_rate": sum(step.deferred for step in steps) / max(1, len(steps)),
        "written_by": {name: sum(step.author == z for step in steps) for z, name in enumerate(names)},
        "changed_tokens": sum(step.changed for step in steps),
        "abstained": sum(step.abstained for step in steps),
        "forward_passes": {name: sum(each[z] for each in passes) for z, name in enumerate(names)},
        "finish_reasons": dict(Counter(trace.generation.finish_reason for trace in traces)),
        "seconds": round(sum(trace.seconds for trace in traces), 3),
    }


def likelihood_figures(found: Sequence[Likelihood], names: Sequence[str]) -> Row:
    """How many given tokens were scored, and which share of them the marginal credits to each model."""
    tokens = sum(each.tokens for each in found)
    credit = {name: sum(each.credit[z] for each in found) / max(1, tokens) for z, name in enumerate(names)}
    return {"scored_texts": len(found), "scored_tokens": tokens, "credit": credit}
