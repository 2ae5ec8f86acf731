"""The scores of one model on one data set, as an Arrow dataset that knows what it was made from.

A folder written by `datasets` (`load_from_disk` reads it), with `scores.json` beside it. It comes into being by a
rename, so it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from collm.data.examples import Example, examples_fingerprint
from collm.data.formatting import Formatter
from collm.errors import CollmError
from collm.identity.comparing import DATE, Identity, differing, remedy
from collm.identity.finding import RULES, prompts_identity
from collm.models.tokenizers import tokenizer_fingerprint
from collm.models.whole import one_line

FORMAT_VERSION = 2
"""2: fingerprints tell dtype, prompts as they are rendered and versions of the rules, and all of the weights."""
INFO = "scores.json"

Fingerprint = dict[str, Any]
TokenScores = tuple[NDArray[np.float32], NDArray[np.bool_]]
"""`log_prob` and `top1` of one example's labelled tokens, `[N]` each."""

TOKENS = ("log_prob", "top1")
CHUNKS = ("log_score", "right", "chunk_start")
"""The columns, of scores of tokens and of chunks."""

MEANINGS = {
    "model": "the model",
    "model.kind": "the kind of model",
    "model.weights": "the model's weights",
    "model.dtype": "the model's dtype",
    "model.probe": "the served model's log-probabilities of a fixed text",
    "tokenizer": "the tokenizer",
    DATE: "the day that the chat template tells",
    "format": "the chat template, what it renders, the system prompt or BOS",
    "data": "the examples",
    "rules.prompts": "the rules by which text becomes tokens",
    "rules.scores": "the rules of scoring",
    "closing": "the closing factors of chunks",
    "cuts": "where the models may take turns (the tokenizers of all of them)",
}


def scores_fingerprint(
    examples: Iterable[Example],
    model: Identity,
    formatter: Formatter,
    *,
    completions_from: Formatter | None = None,
    max_length: int | None = None,
    cuts: str | None = None,
) -> Fingerprint:
    """What scores depend on: what `load_scores` is to `expect`.

    Args:
        model: `local_identity` of the model, or `writer_identity` of a tool.
        cuts: fingerprint of the table of cuts, where chunks are scored.
    """
    format = prompts_identity(formatter)
    shared = (completions_from or formatter).completions_fingerprint()
    if shared != formatter.completions_fingerprint():
        format += f"+{shared}"
    return {
        "model": dict(model),
        "tokenizer": tokenizer_fingerprint(formatter.tokenizer),
        "format": format,
        **({} if formatter.day is None else {DATE: formatter.day}),
        "data": examples_fingerprint(examples),
        "max_length": max_length,
        "rules": {name: RULES[name] for name in ("prompts", "scores")},
        **({} if cuts is None else {"cuts": cuts}),
        # A server tells no closing factors (`served.score_served`).
        **({"closing": "taken for 1"} if cuts is not None and model.get("kind") == "remote" else {}),
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
    compared = {key: found.get(key) for key in expect}
    found_out = differing(compared, expect)
    told = [f"{MEANINGS.get(key, key)} ({a} there, {b} here)" for key, (a, b) in found_out.items()]
    if told:
        raise CollmError(
            f"{what} is stale: it was made with something else in {', '.join(told)}{remedy(found_out)}; "
            "score again to another folder, or with --restart to replace it"
        )


def require_same(found: Fingerprint, now: Fingerprint, what: str) -> None:
    """`require_match` for whole fingerprints: a key that is told only there (chunks were scored, say) differs, too."""
    require_match(found, {**dict.fromkeys(found), **now}, what)


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
        info: Any = json.loads((path / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        if partial_path(path).exists() and not path.exists():
            raise CollmError(
                f"{path}: scoring was interrupted; run the same `collm score` again to finish it"
            ) from None
        state = "is not a folder of scores" if path.exists() else "does not exist"
        raise CollmError(f"{path} {state}; make scores with `collm score DATA --model M --out {path}`") from None
    found: dict[str, Any] = info if isinstance(info, dict) else {}
    version = found.get("format_version", 0)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CollmError(f"{path}: scores of a newer format than this collm knows; upgrade collm")
    kinds = {"fingerprint": dict, "num_examples": int}
    wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if wrong or not isinstance(version, int):
        what = wrong[0] if wrong else "format_version"
        raise CollmError(f"{path / INFO} is damaged (it has no {what}); remove the folder and score again")
    return found


def require_current(path: Path, info: Mapping[str, Any]) -> None:
    """Refuse scores of an older collm where it matters what they were made from.

    Raises:
        CollmError: with the command that makes them anew.
    """
    if info.get("format_version", 0) < FORMAT_VERSION:
        raise CollmError(
            f"{path} was scored by an older collm, which noted too little of what scores depend on (no dtype, for "
            f"one): make it anew with `collm score DATA --model M --out {path} --restart`"
        )


def load_scores(path: str | Path, *, expect: Fingerprint | None = None) -> datasets.Dataset:
    """Scores: `id`, `log_prob` and `top1` (lists over labelled tokens), a row for each example, in order; `example`
    is `examples_fingerprint` of the one example, for those who match rows by id.

    Where models have different tokenizers, `log_score`, `right` and `chunk_start` instead (lists over chunks, the end
    of a text being one): the log-probability of a chunk with its closing factors, whether the model would have written
    it, and the number of its first token among the base's labelled ones.

    An example whose labelled tokens were all truncated away has empty lists.

    Raises:
        CollmError: missing or partial scores; with `expect`, stale ones: the message says what differs.
    """
    path = Path(path)
    info = load_info(path)
    if expect is not None:
        require_current(path, info)
        require_match(info["fingerprint"], expect, str(path))
    try:
        data = datasets.load_from_disk(str(path))
        assert isinstance(data, datasets.Dataset)
        data.reset_format()  # a file beside the table may say that columns are left out
        if not {"id", *(CHUNKS if CHUNKS[0] in data.column_names else TOKENS)} <= set(data.column_names):
            raise ValueError(f"columns {', '.join(data.column_names)}")
        complete = len(data) == info["num_examples"]
    except Exception as error:  # of a damaged folder, datasets and Arrow raise nearly anything
        raise CollmError(
            f"{path}: the scores are damaged ({one_line(error)}); remove the folder and score again"
        ) from error
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
    starts: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write all scores to a temporary folder and rename it, replacing older scores there.

    Args:
        starts: of chunks, `chunk_start` of each example; None: tokens were scored.

    Raises:
        CollmError: the disk is full or cannot be written.
    """
    names = TOKENS if starts is None else CHUNKS
    offsets = pa.array(np.cumsum([0, *(len(log_prob) for log_prob, _ in scores)]), pa.int32())
    log_prob = np.concatenate([np.zeros(0, np.float32), *(log_prob for log_prob, _ in scores)])
    top1 = np.concatenate([np.zeros(0, np.bool_), *(top1 for _, top1 in scores)])
    table = pa.table(
        {
            "id": pa.array([example.id for example in examples], pa.string()),
            "example": pa.array([examples_fingerprint([example]) for example in examples], pa.string()),
            names[0]: pa.ListArray.from_arrays(offsets, pa.array(log_prob, pa.float32())),
            names[1]: pa.ListArray.from_arrays(offsets, pa.array(top1, pa.bool_())),
        }
    )
    if starts is not None:
        flat = np.concatenate([np.zeros(0, np.int32), *(np.array(each, np.int32) for each in starts)])
        table = table.append_column(CHUNKS[2], pa.ListArray.from_arrays(offsets, pa.array(flat, pa.int32())))
    info = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "num_examples": len(examples),
        "labelled_tokens" if starts is None else "chunks": len(log_prob),
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
        ) from None
    finally:
        if not bars_off:
            datasets.enable_progress_bars()
