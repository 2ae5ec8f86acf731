"""Scores of a model behind a server: many texts at a time, in the same files, and resumed in the same way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from collm.data.chunks import Chunked, Reader, encode
from collm.data.examples import Example
from collm.data.formatting import Encoded, Formatter
from collm.data.resumable import already_scored, run
from collm.data.scores import TokenScores, prompt_notes, scores_fingerprint
from collm.errors import CollmError
from collm.identity.finding import writer_identity
from collm.remote.connecting import require_plain
from collm.remote.model import RemoteModel

APPROXIMATE = (
    "closing factors are taken for 1, for a server does not tell them: nearly right in prose and sums, wrong in code"
)
"""What `scores.json` says of chunks that a server has scored, under `approximate`."""
CODE = re.compile(r"^```|^(def|class|import|#include|function) \S", re.MULTILINE)
CODE_SHARE = 0.1
"""Share of examples that hold code, from which on they are taken for code."""
KEPT_TOKENS = 65_536
"""Tokens after which what has come is kept: a server is busy with as many texts at a time as it takes."""


def score_served(
    examples: Sequence[Example],
    model: RemoteModel,
    formatter: Formatter,
    out: str | Path,
    *,
    completions_from: Formatter | None = None,
    max_length: int | None = None,
    batch_tokens: int = KEPT_TOKENS,
    resume: bool = True,
    progress: bool | str = True,
    wait: bool = False,
    chunks: Reader | None = None,
) -> Path:
    """`scoring.score` through a server. What tells its model from others is in `identity.finding.remote_identity`.

    Scores of chunks are approximate (`APPROXIMATE`): a chunk's are the sum of its tokens', and it counts as what the
    model would have written if each of its tokens is the most probable one. They are refused for code, unless the URL
    says `closing=approximate`.

    Args:
        batch_tokens: tokens that are asked for before they are kept; `KEPT_TOKENS` at least.

    Raises:
        CollmError: the server does not tell what is needed, or was gone for too long: what is finished is kept; chunks
            of code.
    """
    if chunks is not None and not model.closing_approximated and is_code(examples):
        raise CollmError(
            f"these examples hold code, and {model.name} is behind a server: {APPROXIMATE}; score where the weights "
            "are, or add closing=approximate to the URL to go on all the same"
        )
    require_plain(model)
    fingerprint = scores_fingerprint(
        examples,
        writer_identity(model),
        formatter,
        completions_from=completions_from,
        max_length=max_length,
        cuts=None if chunks is None else chunks.cuts.fingerprint,
    )
    if already_scored(Path(out), fingerprint, resume):
        return Path(out)
    limit = min((n for n in (max_length, model.context_length) if n is not None), default=None)
    encoded = encode(examples, formatter, chunks, max_length=limit, completions_from=completions_from)

    def work(batch: Sequence[Encoded]) -> list[TokenScores]:
        return [
            _labelled(item, told) for item, told in zip(batch, model.given([e.token_ids for e in batch]), strict=True)
        ]

    notes = prompt_notes(formatter, completions_from)
    if chunks is not None:
        notes["approximate"] = APPROXIMATE
    tokens = max(batch_tokens, KEPT_TOKENS)
    return run(examples, encoded, fingerprint, Path(out), work, tokens, resume, progress, notes, wait=wait)


def is_code(examples: Sequence[Example]) -> bool:
    """Do the answers hold programs?"""
    return sum(bool(CODE.search(example.reference or "")) for example in examples) > CODE_SHARE * len(examples)


def _labelled(item: Encoded, told: Sequence[tuple[float, bool]]) -> TokenScores:
    if isinstance(item, Chunked):
        return _of_chunks(item, told)
    mask = np.array(item.labelled[1:], np.bool_)
    log_prob, top1 = (np.array(column) for column in zip(*told, strict=True))
    return log_prob[mask].astype(np.float32), top1[mask].astype(np.bool_)


def _of_chunks(item: Chunked, told: Sequence[tuple[float, bool]]) -> TokenScores:
    log_prob, top1 = (np.array(column) for column in zip((0.0, False), *told, strict=True))
    spans = [slice(start, start + 1 if stop is None else stop) for start, stop in item.spans]
    return (
        np.array([log_prob[span].sum() for span in spans], np.float32),
        np.array([top1[span].all() for span in spans], np.bool_),
    )
