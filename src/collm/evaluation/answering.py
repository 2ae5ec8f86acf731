"""Answers for other judges: dialogues, batched, with progress, resumable.

Every answer is traced, as in an evaluation, and a stopped run goes on from its traces; the judge's file is written
whole when the last answer is there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from collm.data.sources import read_source
from collm.errors import CollmError
from collm.evaluation.evaluate import Writer, example_seed
from collm.evaluation.judges import JUDGES, Dialogue
from collm.evaluation.runs import kept
from collm.files import beside, require_apart, write_text
from collm.report.trace import Trace, base_pieces
from collm.sampling_params import SamplingParams
from collm.types import Message


def traces_path(out: Path) -> Path:
    """Where the traces of answers in `out` go; not `.jsonl`, of which FastChat reads every file in its folder."""
    return beside(out, ".traces", instead_of=(".jsonl", ".json"))


def answer(
    llm: Writer,
    judge: str,
    data: Path,
    out: Path,
    params: SamplingParams,
    *,
    generator: str,
    temperature: float | None = None,
    limit: int | None = None,
    alone: int | str | None = None,
    batch_size: int = 16,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> int:
    """Answer the questions of a judge and write the file that it reads; how many questions there were.

    Args:
        judge: one of `JUDGES`.
        data: the judge's own questions (`alpaca_eval.json`, `question.jsonl`).
        params: how answers are written; its temperature holds where the judge has no rule (MT-bench: by category).
        generator: what the system is called in the file.
        temperature: for all questions, whatever the judge's rule.
        alone, identity: as in `evaluate`.

    Raises:
        CollmError: bad data; an `out` that another run or somebody else wrote; a model that failed.
    """
    known = JUDGES[judge]
    dialogues = known.dialogues(list(read_source(judge, data)))[:limit]
    if temperature is not None:
        fixed = [dialogue.id for dialogue in dialogues if dialogue.row.get("required_temperature") is not None]
        if fixed:
            raise CollmError(f"{data} requires a temperature for {fixed[0]}: leave out the one for all questions")
        dialogues = [replace(dialogue, temperature=temperature) for dialogue in dialogues]
    from collm.evaluation.system import settings_of  # it knows the models, and so torch

    settings = {
        "judge": judge,
        "questions": hashlib.sha256(json.dumps([[d.id, d.turns] for d in dialogues]).encode()).hexdigest()[:16],
        "temperatures": [dialogue.temperature for dialogue in dialogues],
        **settings_of(llm, params, None, alone, identity),
    }
    settings["params.stop"] = list(params.stop)
    settings["params.stop_token_ids"] = list(params.stop_token_ids)
    require_free(out, [data])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with kept(traces_path(out), settings) as (done, keep):
        with Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not progress
        ) as bar:
            row = bar.add_task(judge, total=sum(len(dialogue.turns) for dialogue in dialogues), completed=len(done))
            for trace in _answers(llm, dialogues, done, params, batch_size, alone):
                keep(trace)
                bar.advance(row)
        answers = {dialogue: [_text(done[key]) for key in dialogue.traces] for dialogue in dialogues}
        write_text(out, known.file(answers, generator))
    return len(dialogues)


def require_free(out: Path, data: Sequence[Path] = ()) -> None:
    """Refuse a judge's file that would replace something else.

    Raises:
        CollmError: naming the file that is in the way.
    """
    traces = traces_path(out)
    for path in (out, traces):
        require_apart(path, data)
    if out.exists() and not traces.exists():
        raise CollmError(f"{out} exists, without {traces.name} of a run beside it: give another file")


def _text(trace: Trace) -> str:
    return trace.generation.text.strip()


def _answers(
    llm: Writer,
    dialogues: Sequence[Dialogue],
    done: Mapping[str, Trace],
    params: SamplingParams,
    batch_size: int,
    alone: int | str | None,
) -> Iterator[Trace]:
    """Answers that are not yet in `done`, which they are to join: all first turns, then all second ones."""
    for number in range(max(len(dialogue.turns) for dialogue in dialogues)):
        todo = [d for d in dialogues if len(d.turns) > number and d.traces[number] not in done]
        prompts: list[list[Message]] = []
        each: list[SamplingParams] = []
        for dialogue in todo:
            messages = [{"role": "user", "content": dialogue.turns[0]}]
            for before, turn in zip(dialogue.traces, dialogue.turns[1 : number + 1], strict=False):
                messages += [
                    {"role": "assistant", "content": _text(done[before])},
                    {"role": "user", "content": turn},
                ]
            prompts.append(messages)
            heat = params.temperature if dialogue.temperature is None else dialogue.temperature
            each.append(replace(params, seed=example_seed(params.seed, dialogue.traces[number]), temperature=heat))
        begin = time.perf_counter()
        for index, generation in llm.generate_each(prompts, each, batch_size, policy=None, alone=alone):
            key = todo[index].traces[number]
            if generation.error is not None:  # what is finished is kept, and the next start goes on from there
                raise CollmError(f"{key}: {generation.error}")
            now = time.perf_counter()
            pieces = base_pieces(generation, lambda token_id: llm.decode([token_id]))
            yield Trace(key, generation, tuple(prompts[index]), pieces, seconds=now - begin)
            begin = now
