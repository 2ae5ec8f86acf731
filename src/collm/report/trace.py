"""Traces: one JSON line per text, telling who wrote which token; what `eval` and `generate` write and `trace` shows.

    {"id", "prompt" | "messages", "text", "finish_reason", "models": [...], "prompt_tokens", "usage": {...}, "error",
     "steps": [{"piece", "token_id", "author", "log_prob", "gate", "changed", "abstained", "fault", "draft",
     "discarded", "base_token_id", "base_piece"}], "score", "answer", "gold", "seconds"}

Where models have different tokenizers a step is a chunk, and has "token_ids", the base's, and "token_lengths", their
bytes, too.
`log_prob` is null where it is -inf (JSON has no infinity). A line that is an object with the key `collm_run` is the
header of a run; readers of traces skip it.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from collm.errors import CollmError
from collm.files import claimed, require_own
from collm.types import Generation, Message, Step, Usage

HEADER_KEY = "collm_run"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """A generation with what it answers and what it scored.

    `base_pieces`: per step the text of the token that the base would have written, None where it is not known.
    """

    id: str
    generation: Generation
    prompt: str | tuple[Message, ...]
    base_pieces: tuple[str | None, ...] = ()
    score: float | None = None
    answer: str | None = None
    gold: str | None = None
    seconds: float = 0.0


def is_graded(score: float | None) -> bool:
    """Is it between right and wrong, as F1 of a list may be?"""
    return score is not None and 0 < score < 1


def systems_of(traces: Iterable[Trace]) -> list[tuple[str, ...]]:
    """The models of each system among the writers, base first: their numbers (and colours) mean others in another one.

    A system whose models are the first ones of another (a base alone, say) is no other.
    """
    found = list(dict.fromkeys(trace.generation.model_names for trace in traces))
    return [names for names in found if not any(names == other[: len(names)] for other in found if other != names)]


def base_pieces(generation: Generation, decode: Callable[[int], str]) -> tuple[str | None, ...]:
    """The texts of the tokens the base would have written, where an assistant wrote another one."""
    return tuple(
        decode(step.base_token_id) if step.changed and step.base_token_id is not None else None
        for step in generation.steps
    )


def generation_to_dict(generation: Generation, base_pieces: tuple[str | None, ...] = ()) -> dict[str, Any]:
    """The part of a trace line that tells of the generation itself; strict JSON."""
    bases = base_pieces or (None,) * len(generation.steps)
    steps = [
        {
            "piece": piece,
            "token_id": step.token_id,
            "author": step.author,
            "log_prob": step.log_prob if math.isfinite(step.log_prob) else None,
            "gate": list(step.gate),
            "changed": step.changed,
            "abstained": step.abstained,
            "fault": step.fault,
            "draft": step.draft,
            "discarded": step.discarded,
            "signal": step.signal,
            "base_token_id": step.base_token_id,
            "base_piece": base,
            # What a chunk is made of; what few texts have is left out of the others.
            **({} if step.data is None else _tokens(step)),
        }
        for step, piece, base in zip(generation.steps, generation.pieces, bases, strict=True)
    ]
    return {
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "models": list(generation.model_names),
        "prompt_tokens": generation.prompt_tokens,
        "usage": asdict(generation.usage),
        "error": generation.error,
        "steps": steps,
    }


def _tokens(step: Step) -> dict[str, Any]:
    return {"token_ids": list(step.token_ids), "token_lengths": list(step.token_lengths)}


def trace_to_dict(trace: Trace) -> dict[str, Any]:
    """One trace line."""
    asked = {"prompt": trace.prompt} if isinstance(trace.prompt, str) else {"messages": list(trace.prompt)}
    told = {"score": trace.score, "answer": trace.answer, "gold": trace.gold, "seconds": round(trace.seconds, 4)}
    return {"id": trace.id, **asked, **generation_to_dict(trace.generation, trace.base_pieces), **told}


def trace_from_dict(row: Mapping[str, Any]) -> Trace:
    """The inverse of `trace_to_dict`; raises KeyError or TypeError for a row that is none."""
    steps = tuple(
        Step(
            token_id=int(step["token_id"]),
            author=int(step["author"]),
            log_prob=-math.inf if step["log_prob"] is None else float(step["log_prob"]),
            gate=tuple(float(gate) for gate in step.get("gate") or ()),
            base_token_id=step.get("base_token_id"),
            abstained=bool(step.get("abstained")),
            fault=step.get("fault"),
            draft=step.get("draft", ""),
            discarded=int(step.get("discarded", 0)),
            signal=step.get("signal"),
            token_ids=tuple(int(each) for each in step.get("token_ids", ())),
            data=str(step["piece"]).encode() if "token_ids" in step else None,
            token_lengths=tuple(int(each) for each in step.get("token_lengths", ())),
        )
        for step in row["steps"]
    )
    generation = Generation(
        text=row["text"],
        steps=steps,
        pieces=tuple(str(step["piece"]) for step in row["steps"]),
        finish_reason=row["finish_reason"],
        prompt_tokens=int(row.get("prompt_tokens", 0)),
        model_names=tuple(row["models"]),
        usage=_usage(row.get("usage") or {}),
        error=row.get("error"),
    )
    if any(not 0 <= step.author < len(generation.model_names) for step in steps):
        raise KeyError("models: a step has an author that is not among them")
    return Trace(
        id=str(row.get("id", "")),
        generation=generation,
        prompt=tuple(row["messages"]) if row.get("messages") is not None else str(row.get("prompt", "")),
        base_pieces=tuple(step.get("base_piece") for step in row["steps"]),
        score=row.get("score"),
        answer=row.get("answer"),
        gold=row.get("gold"),
        seconds=float(row.get("seconds", 0.0)),
    )


def _usage(row: Mapping[str, Any]) -> Usage:
    told: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return Usage(**told)


def append_json(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows as JSON lines in one write: they outlive the process, however that ends."""
    data = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise CollmError(
            f"could not write to {path}: {error}; what was written before is kept, free some space and run again"
        ) from None


def append_trace(path: str | Path, trace: Trace) -> None:
    """Append one trace line durably; makes the folder if it is missing. Other processes that append wait for it.

    Raises:
        CollmError: the file holds something else than traces.
    """
    path = Path(path)
    with claimed(path, wait=True):
        require_own(path, _holds_traces, "collm generate or collm eval")
        if path.exists():
            drop_torn_line(path)
        append_json(path, [trace_to_dict(trace)])


def _holds_traces(path: Path) -> bool:
    """Does a file begin with a trace, or is it empty?"""
    try:
        _, first = next(read_rows(path), (0, {HEADER_KEY: 0}))
        return HEADER_KEY in first or bool(trace_from_dict(first))
    except (CollmError, KeyError, TypeError, ValueError, AttributeError):
        return False


def drop_torn_line(path: Path) -> None:
    """Cut off a last line that a killed process wrote only half of (it lacks its newline)."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        _log.warning("%s: dropped a half-written last line", path)
        os.truncate(path, whole)


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSONL file; a last line without newline that is no JSON is passed over.

    Raises:
        CollmError: naming the file and the line that is no JSON object.
    """
    path = Path(path)
    try:
        lines = path.open("rb")
    except OSError as error:
        raise CollmError(f"cannot read {path}: {error.strerror}") from None
    with lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            torn = number > 1 and not line.endswith(b"\n")
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:  # both JSONDecodeError and UnicodeDecodeError
                if torn:
                    _log.warning("%s: ignored a half-written last line", path)
                    return
                what = f"not JSON ({error})" if isinstance(error, json.JSONDecodeError) else "not UTF-8 text"
                raise CollmError(f"{path}, line {number}: {what}; expected a trace object") from None
            if not isinstance(row, dict):
                raise CollmError(f"{path}, line {number}: expected a trace object, not {type(row).__name__}")
            yield number, row


def read_traces(path: str | Path) -> list[Trace]:
    """All traces of a file; see `stream_traces`."""
    return list(stream_traces(path))


def stream_traces(path: str | Path) -> Iterator[Trace]:
    """The traces of a file written by `eval` or `generate`, one after the other: it may be larger than the memory.

    Raises:
        CollmError: unreadable file, or a line that is no trace; names the line and the field.
    """
    for number, row in read_rows(path):
        if HEADER_KEY in row:
            continue
        try:
            yield trace_from_dict(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CollmError(
                f"{path}, line {number}: not a trace ({type(error).__name__}: {error}); "
                "expected the output of collm eval or collm generate"
            ) from None
