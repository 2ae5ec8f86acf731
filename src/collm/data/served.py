"""Scores of a model behind a server: many texts at a time, in the same files, and resumed in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from collm.data.chunks import Reader
from collm.data.encoding import encode_examples
from collm.data.examples import Example
from collm.data.formatting import Encoded, Formatter
from collm.data.resumable import already_scored, run
from collm.data.scores import TokenScores, prompt_notes, scores_fingerprint
from collm.errors import CollmError
from collm.identity.finding import writer_identity
from collm.remote.connecting import require_plain
from collm.remote.model import RemoteModel

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

    Args:
        batch_tokens: tokens that are asked for before they are kept; `KEPT_TOKENS` at least.

    Raises:
        CollmError: the server does not tell what is needed, or was gone for too long: what is finished is kept.
    """
    if chunks is not None:
        raise CollmError(
            f"{model.name}: models with different tokenizers write in chunks, whose closing is a sum over a whole law, "
            "which no server tells; score where the weights are"
        )
    require_plain(model)
    fingerprint = scores_fingerprint(
        examples, writer_identity(model), formatter, completions_from=completions_from, max_length=max_length
    )
    if already_scored(Path(out), fingerprint, resume):
        return Path(out)
    limit = min((n for n in (max_length, model.context_length) if n is not None), default=None)
    encoded = encode_examples(examples, formatter, max_length=limit, completions_from=completions_from)

    def work(batch: Sequence[Encoded]) -> list[TokenScores]:
        return [
            _labelled(item, told) for item, told in zip(batch, model.given([e.token_ids for e in batch]), strict=True)
        ]

    notes = prompt_notes(formatter, completions_from)
    tokens = max(batch_tokens, KEPT_TOKENS)
    return run(examples, encoded, fingerprint, Path(out), work, tokens, resume, progress, notes, wait=wait)


def _labelled(item: Encoded, told: Sequence[tuple[float, bool]]) -> TokenScores:
    mask = np.array(item.labelled[1:], np.bool_)
    log_prob, top1 = (np.array(column) for column in zip(*told, strict=True))
    return log_prob[mask].astype(np.float32), top1[mask].astype(np.bool_)
