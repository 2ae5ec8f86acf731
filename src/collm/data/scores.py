"""The scores of one model on one data set, as an Arrow dataset that knows what it was made from.

A folder written by `datasets` (`load_from_disk` reads it), with `scores.json` beside it. It comes into being by a
rename, so it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from collm.data.examples import Example, examples_fingerprint
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.models.tokenizers import tokenizer_fingerprint

FORMAT_VERSION = 1
INFO = "scores.json"

Fingerprint = dict[str, str | int | None]
TokenScores = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""`log_prob` and `top1` of one example's labelled tokens, `[N]` each."""

MEANINGS = {
    "model": "the model's weights",
    "tokenizer": "the tokenizer",
    "format": "the chat template, system prompt or BOS",
    "data": "the examples",
    "max_length": "max_length",
}


def scores_fingerprint(
    examples: Iterable[Example],
    model: str,
    formatter: Formatter,
    *,
    completions_from: Formatter | None = None,
    max_length: int | None = None,
) -> Fingerprint:
    """What scores depend on: what `load_scores` is to `expect`.

    Args:
        model: `weights_fingerprint` of the model, or `tool_fingerprint` of a tool.
    """
    format = formatter.fingerprint()
    shared = (completions_from or formatter).completions_fingerprint()
    if shared != formatter.completions_fingerprint():
        format += f"+{shared}"
    return {
        "model": model,
        "tokenizer": tokenizer_fingerprint(formatter.tokenizer),
        "format": format,
        "data": examples_fingerprint(examples),
        "max_length": max_length,
    }


def prompt_notes(formatter: Formatter, completions_from: Formatter | None) -> dict[str, Any]:
    """What `scores.json` tells of the prompts, so that training needs nothing else of the model: `prompt_format`, the
    arguments of its `PromptFormat`, and `completions`, a fingerprint of what settled the completions' tokens."""
    return {
        "prompt_format": formatter.format.to_dict(),
        "completions": (completions_from or formatter).completions_fingerprint(),
    }


def require_match(found: Fingerprint, expect: Fingerprint, what: str) -> None:
    """Refuse scores made from something else; only the keys of `expect` are compared.

    Raises:
        CollmError: naming all that differs.
    """
    differing = [
        f"{MEANINGS.get(key, key)} ({found.get(key)} there, {value} here)"
        for key, value in expect.items()
        if found.get(key) != value
    ]
    if differing:
        raise CollmError(
            f"{what} is stale: it was made with something else in {', '.join(differing)}; "
            "score again to another folder, or with --restart to replace it"
        )


def partial_path(path: Path) -> Path:
    """Where a run that is not finished keeps its work."""
    return path.with_name(path.name + ".partial")


def load_info(path: str | Path) -> dict[str, Any]:
    """What `scores.json` says: fingerprint, `prompt_notes`, counts and means.

    Raises:
        CollmError: no scores, half-written scores, or of a newer format.
    """
    path = Path(path)
    try:
        info: dict[str, Any] = json.loads((path / INFO).read_text())
    except (OSError, ValueError) as error:
        if partial_path(path).exists() and not path.exists():
            raise CollmError(
                f"{path}: scoring was interrupted; run the same `collm score` again to finish it"
            ) from error
        state = "is not a folder of scores" if path.exists() else "does not exist"
        raise CollmError(f"{path} {state}; make scores with `collm score DATA --model M --out {path}`") from error
    if info.get("format_version", 0) > FORMAT_VERSION:
        raise CollmError(f"{path}: scores of a newer format than this collm knows; upgrade collm")
    return info


def load_scores(path: str | Path, *, expect: Fingerprint | None = None) -> datasets.Dataset:
    """Scores: `id`, `log_prob` and `top1` (lists over labelled tokens), a row for each example, in order; `example`
    is `examples_fingerprint` of the one example, for those who match rows by id.

    An example whose labelled tokens were all truncated away has empty lists.

    Raises:
        CollmError: missing or partial scores; with `expect`, stale ones: the message says what differs.
    """
    path = Path(path)
    info = load_info(path)
    if expect is not None:
        require_match(info["fingerprint"], expect, str(path))
    try:
        data = datasets.load_from_disk(str(path))
        assert isinstance(data, datasets.Dataset)
        complete = len(data) == info["num_examples"]
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise CollmError(f"{path}: the scores are damaged ({error}); remove the folder and score again") from error
    if not complete:
        raise CollmError(
            f"{path}: {len(data)} rows of {info['num_examples']}: damaged; remove the folder and score again"
        )
    return data


def save_scores(
    path: Path,
    examples: Sequence[Example],
    scores: Sequence[TokenScores],
    fingerprint: Fingerprint,
    notes: dict[str, Any],
) -> None:
    """Write all scores to a temporary folder and rename it, replacing older scores there.

    Raises:
        CollmError: the disk is full or cannot be written.
    """
    offsets = pa.array(np.cumsum([0, *(len(log_prob) for log_prob, _ in scores)]), pa.int32())
    log_prob = np.concatenate([np.zeros(0, np.float32), *(log_prob for log_prob, _ in scores)])
    top1 = np.concatenate([np.zeros(0, np.bool_), *(top1 for _, top1 in scores)])
    table = pa.table(
        {
            "id": pa.array([example.id for example in examples], pa.string()),
            "example": pa.array([examples_fingerprint([example]) for example in examples], pa.string()),
            "log_prob": pa.ListArray.from_arrays(offsets, pa.array(log_prob, pa.float32())),
            "top1": pa.ListArray.from_arrays(offsets, pa.array(top1, pa.bool_())),
        }
    )
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "num_examples": len(examples),
        "labelled_tokens": len(log_prob),
        # JSON has no infinities; a tool's log-probability is -inf wherever it abstains.
        "mean_log_prob": float(log_prob.mean()) if len(log_prob) and np.isfinite(log_prob).all() else None,
        "answered_rate": float(np.isfinite(log_prob).mean()) if len(log_prob) else None,
        "top1_rate": float(top1.mean()) if len(top1) else None,
        **notes,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    bars_off = datasets.are_progress_bars_disabled()
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        datasets.disable_progress_bars()
        datasets.Dataset(table).save_to_disk(str(temporary))
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n")
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CollmError(
            f"{path}: the scores cannot be written ({error.strerror or error}); what was scored is kept in "
            f"{partial_path(path)}: make room and run the same again"
        ) from error
    finally:
        if not bars_off:
            datasets.enable_progress_bars()
