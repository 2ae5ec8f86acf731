"""Score each gold token under one model, once: its log-probability, and whether it is the model's first choice.

Assistants never run in training; this is all that training knows of them. Batches are made of examples of like
length, the longest first; each finished batch is kept at once, so a run may be stopped anyhow and started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from collm.data.chunk_scoring import score_chunks
from collm.data.chunks import Chunked, Reader, encode
from collm.data.examples import Example
from collm.data.formatting import Encoded, Formatter
from collm.data.resumable import already_scored, run
from collm.data.scores import TokenScores, load_scores, prompt_notes, scores_fingerprint
from collm.errors import CollmError
from collm.identity.finding import local_identity, writer_identity
from collm.identity.known import Opened
from collm.models.backbone import check_project, hidden_states, logits_rows, project, rope_switches
from collm.models.codec import ByteCodec
from collm.models.devices import input_device, output_device
from collm.models.loading import eos_ids, weights_fingerprint
from collm.models.openings import Openings
from collm.models.tokenizers import shared_vocab_size
from collm.values import Answer, Fault, LanguageModel, Query

__all__ = [
    "load_scores",
    "score",
    "score_batch",
    "score_tool",
    "scores_fingerprint",
]

BATCH_TOKENS = 4096
"""Padded tokens in a batch; a longer example is a batch of its own."""


def score(
    examples: Sequence[Example],
    model: PreTrainedModel | str | Opened,
    formatter: Formatter,
    out: str | Path,
    *,
    completions_from: Formatter | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resume: bool = True,
    progress: bool | str = True,
    dtype: str = "float32",
    device: str = "cpu",
    wait: bool = False,
    chunks: Reader | None = None,
) -> Path:
    """Score examples under a transformer and write them to the folder `out` (see `load_scores`).

    Args:
        model: a model, or a spec, which is loaded with `dtype` and `device` where there is something to score.
        completions_from: the base's formatter, where the model is an assistant with its own template.
        chunks: how the model reads examples, where those that write together have different tokenizers: chunks are
            scored, not tokens.
        max_length: tokens to keep of each sequence; never more than the model's context.
        resume: go on where an interrupted run stopped, and leave finished scores alone; False begins anew and
            replaces them.
        progress: a bar on stderr; a text says whose scores these are.
        wait: for another process that makes them at this moment, instead of refusing.

    Raises:
        CollmError: scores of something else are in the way; NaN; out of memory or disk. Finished batches are kept.
    """
    opened = Opened(model, dtype=dtype, device=device) if isinstance(model, str) else model
    told: dict[str, Any] = {"completions_from": completions_from, "max_length": max_length}
    told["cuts"] = None if chunks is None else chunks.cuts.fingerprint
    who = opened.identity if isinstance(opened, Opened) else local_identity(opened)
    fingerprint = scores_fingerprint(examples, who, formatter, **told)
    if already_scored(Path(out), fingerprint, resume):
        return Path(out)
    lm = opened.model if isinstance(opened, Opened) else opened
    if isinstance(opened, Opened):  # what is loaded has the last word
        fingerprint = scores_fingerprint(examples, opened.identity, formatter, **told)
    check_project(lm)
    config: Any = lm.config.get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    limit = min((n for n in (max_length, context) if n is not None), default=None)
    encoded = encode(examples, formatter, chunks, max_length=limit, completions_from=completions_from)
    vocab_size = shared_vocab_size(formatter.tokenizer)
    if max(max(item.token_ids) for item in encoded.items) >= config.vocab_size:
        raise CollmError(
            f"the tokenizer has more tokens ({vocab_size}) than the model ({config.vocab_size}): they do not belong "
            "together; give the model's own tokenizer"
        )

    openings = None if chunks is None else openings_of(lm, chunks, vocab_size)

    def work(batch: Sequence[Encoded]) -> list[TokenScores]:
        try:
            if openings is not None:
                return score_chunks(lm, [item for item in batch if isinstance(item, Chunked)], openings, vocab_size)
            return score_batch(lm, batch, vocab_size)
        except torch.OutOfMemoryError as error:
            raise CollmError(
                f"out of memory with batch_tokens={batch_tokens}; finished batches are kept: run the same again with "
                "fewer batch_tokens"
            ) from error

    # What a checkpoint keeps of an assistant: it agrees across dtypes.
    notes = {**prompt_notes(formatter, completions_from), "weights_fingerprint": weights_fingerprint(lm)}
    switches = rope_switches(lm)
    return run(examples, encoded, fingerprint, Path(out), work, batch_tokens, resume, progress, notes, switches, wait)


def openings_of(model: PreTrainedModel, reader: Reader, vocab_size: int) -> Openings:
    """Where the tokens of a model may stand; what ends its texts is known from its configuration and template."""
    ends = eos_ids(model, reader.formatter.tokenizer) | reader.formatter.end_ids
    codec = ByteCodec(reader.formatter.tokenizer, reader.cuts, ends, name=reader.codec.name)
    return Openings.of(reader.cuts, codec.first_bytes, vocab_size)


def score_tool(
    examples: Sequence[Example],
    tool: LanguageModel,
    formatter: Formatter,
    out: str | Path,
    *,
    completions_from: Formatter | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resume: bool = True,
    progress: bool | str = True,
    wait: bool = False,
    chunks: Reader | None = None,
) -> Path:
    """`score` for anything that answers queries. Where it abstains, log-probability -inf and not top-1: a token that
    cannot be deferred to it, which is a lower bound of decoding, where the base then writes the token.

    Where models share chunks, a tool's tokens are chunks: a longer one cannot be deferred to it."""
    fingerprint = scores_fingerprint(
        examples,
        writer_identity(tool),
        formatter,
        completions_from=completions_from,
        max_length=max_length,
        cuts=None if chunks is None else chunks.cuts.fingerprint,
    )
    if already_scored(Path(out), fingerprint, resume):
        return Path(out)
    encoded = encode(examples, formatter, chunks, max_length=max_length, completions_from=completions_from)

    def work(batch: Sequence[Encoded]) -> list[TokenScores]:
        return [_of_chunks(item, _ask_tool(tool, item)) for item in batch]

    notes = prompt_notes(formatter, completions_from)
    return run(examples, encoded, fingerprint, Path(out), work, batch_tokens, resume, progress, notes, wait=wait)


@torch.inference_mode()
def score_batch(model: PreTrainedModel, batch: Sequence[Encoded], vocab_size: int | None = None) -> list[TokenScores]:
    """Scores of the labelled tokens of each sequence, `[N]` float32 and bool, in one forward pass.

    Rows are padded on the right and no mask is given: causal attention keeps a token from seeing what follows.
    (Rows on different sides of one of `rope_switches` must not share a batch.)
    Logits exist only at labelled positions, `logits_rows` at a time.

    Args:
        vocab_size: of the shared tokenizer; logits beyond it are padding and take no part in the law.
    """
    length = max(len(item) for item in batch) - 1
    inputs = np.zeros((len(batch), length), np.int64)
    gold = np.zeros_like(inputs)
    labelled = np.zeros_like(inputs, np.bool_)
    for row, item in enumerate(batch):
        n = len(item) - 1
        inputs[row, :n], gold[row, :n], labelled[row, :n] = item.token_ids[:-1], item.token_ids[1:], item.labelled[1:]
    mask, gold_ids = torch.from_numpy(labelled), torch.from_numpy(gold)[torch.from_numpy(labelled)]
    hidden = hidden_states(model, torch.from_numpy(inputs).to(input_device(model)), use_cache=False)
    # The parts of a model may lie on several devices.
    hidden, gold_ids = hidden[mask.to(hidden.device)], gold_ids.to(output_device(model))
    parts, rows = [], logits_rows(model)
    for states, ids in zip(hidden.split(rows), gold_ids.split(rows), strict=True):
        logits = project(model, states)[:, :vocab_size].float()
        at_gold = logits.gather(-1, ids[:, None])[:, 0]
        parts.append(torch.stack([at_gold - logits.logsumexp(-1), (logits.argmax(-1) == ids).float()]))
    # One copy from the device: it waits for the computation.
    log_prob, top1 = torch.cat(parts, dim=1).cpu().numpy()
    ends = np.cumsum([item.num_labelled for item in batch])[:-1]
    return list(zip(np.split(log_prob, ends), np.split(top1 > 0, ends), strict=True))


def _of_chunks(item: Encoded, scores: TokenScores) -> TokenScores:
    """What a tool makes of chunks, from its scores of the tokens: a chunk of one token may be its."""
    if not isinstance(item, Chunked):
        return scores
    labelled = np.cumsum(item.labelled) - 1
    alone = np.array([stop is None or stop == start + 1 for start, stop in item.spans], np.bool_)
    at = np.array([labelled[start] for start, _ in item.spans], np.int64)
    log_prob, top1 = scores
    return np.where(alone, log_prob[at], -np.inf).astype(np.float32), top1[at] & alone


def _ask_tool(tool: LanguageModel, item: Encoded) -> TokenScores:
    flags = [False, *item.labelled, False]
    starts = [i - 1 for i in range(1, len(flags)) if flags[i] and not flags[i - 1]]
    ends = [i - 1 for i in range(1, len(flags)) if flags[i - 1] and not flags[i]]
    # One query a turn: predict after each prefix that ends right before a token of the turn.
    spans = list(zip(starts, ends, strict=True))
    ids = item.token_ids
    answers = tool.predict([Query.of(ids[: e - 1], e - s, model=1, given=ids[s:e]) for s, e in spans])
    log_prob, top1 = [], []
    for (start, end), replies in zip(spans, answers, strict=True):
        for gold, reply in zip(ids[start:end], replies, strict=True):
            if isinstance(reply, Fault):
                raise CollmError(f"{tool.name}: {reply.reason}")
            given = reply.given_log_prob if isinstance(reply, Answer) else None
            log_prob.append(-np.inf if given is None else given)
            top1.append(reply is not None and reply.top_token_id == gold)
    return np.array(log_prob, np.float32), np.array(top1, np.bool_)
