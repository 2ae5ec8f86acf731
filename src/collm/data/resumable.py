"""The loop around scoring: plan batches, keep each as it is finished, go on after an interruption, show progress."""

from __future__ import annotations

import base64
import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from collm.data.chunks import Chunked
from collm.data.encoding import EncodedSet
from collm.data.examples import Example
from collm.data.formatting import Encoded
from collm.data.journal import Journal
from collm.data.scores import (
    Fingerprint,
    TokenScores,
    load_info,
    load_scores,
    partial_path,
    require_current,
    require_same,
    save_scores,
)
from collm.errors import CollmError
from collm.files import claimed

logger = logging.getLogger(__name__)


def plan_batches(
    lengths: Sequence[int], indices: Sequence[int], batch_tokens: int, switches: Sequence[int] = ()
) -> list[list[int]]:
    """Group `indices` into batches of at most `batch_tokens` padded tokens: longest first, so that running out of
    memory shows at once.

    Args:
        switches: `rope_switches`; the last token of each sequence is not read, only predicted.
    """
    batches: list[list[int]] = []
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest, and sets its width.
        first = batches[-1][0] if batches else i
        alike = bisect_left(switches, lengths[first] - 1) == bisect_left(switches, lengths[i] - 1)
        if batches and alike and (len(batches[-1]) + 1) * lengths[first] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def already_scored(out: Path, fingerprint: Fingerprint, resume: bool) -> bool:
    """Are these very scores there already? Anything but scores at `out` is refused, whether we resume or not."""
    if not out.exists():
        return False
    info = load_info(out)
    if not resume:
        return False
    require_current(out, info)
    require_same(info["fingerprint"], fingerprint, str(out))
    load_scores(out)
    partial_path(out).unlink(missing_ok=True)
    logger.info("%s: scored already", out)
    return True


def run(
    examples: Sequence[Example],
    encoded: EncodedSet,
    fingerprint: Fingerprint,
    out: Path,
    work: Callable[[Sequence[Encoded]], list[TokenScores]],
    batch_tokens: int,
    resume: bool,
    progress: bool | str,
    notes: Mapping[str, Any],
    switches: Sequence[int] = (),
    wait: bool = False,
) -> Path:
    """Do all that is not done yet, batch by batch, and write the scores.

    Args:
        work: scores a batch.
        batch_tokens: may differ from that of the run being resumed.
        progress: a bar on stderr; a text says whose scores these are.
        notes: what else `scores.json` is to tell.
        switches: `rope_switches` of the model.
        wait: for another process that makes them at this moment, instead of refusing.
    """
    with claimed(out, wait=wait):
        # Another process may have made them while this one waited or encoded.
        if already_scored(out, fingerprint, resume):
            return out
        _score(examples, encoded, fingerprint, out, work, batch_tokens, resume, progress, notes, switches)
    return out


def _score(
    examples: Sequence[Example],
    encoded: EncodedSet,
    fingerprint: Fingerprint,
    out: Path,
    work: Callable[[Sequence[Encoded]], list[TokenScores]],
    batch_tokens: int,
    resume: bool,
    progress: bool | str,
    notes: Mapping[str, Any],
    switches: Sequence[int],
) -> None:
    nothing = (np.zeros(0, np.float32), np.zeros(0, np.bool_))
    scores: dict[int, TokenScores] = {}
    kept = encoded.kept
    with Journal(partial_path(out), {"fingerprint": fingerprint}, resume=resume) as journal:
        require_same(journal.found["fingerprint"], fingerprint, str(journal.path))
        for record in journal.records:
            scores.update(_unpack(record))
        if scores:
            logger.info("%s: going on after %d of %d examples", out, len(scores), len(kept))
        lengths = [len(item) for item in encoded.items]
        batches = plan_batches(lengths, [i for i in kept if i not in scores], batch_tokens, switches)
        tokens, begin = sum(lengths[i] for batch in batches for i in batch), time.monotonic()
        try:
            doing = f"scoring by {progress}" if isinstance(progress, str) else "scoring"
            with progress_bar(tokens, bool(progress), doing) as advance:
                for batch in batches:
                    found = dict(zip(batch, work([encoded.items[i] for i in batch]), strict=True))
                    for i, (log_prob, _) in found.items():
                        if np.isnan(log_prob).any():
                            raise CollmError(f"{examples[i].label}: the model's log-probabilities are NaN")
                    journal.append(_pack(found))
                    scores.update(found)
                    advance(sum(lengths[i] for i in batch))
        except KeyboardInterrupt:
            logger.warning("stopped: %d of %d examples are scored; run the same again to go on", len(scores), len(kept))
            raise
        counts: dict[str, Any] = {
            # Prompts included; of this run, which may have resumed another one.
            "tokens_per_second": round(tokens / max(1e-9, time.monotonic() - begin), 1) if tokens else None,
            "dropped": encoded.dropped,
            "truncated": encoded.truncated,
            "truncated_tokens": encoded.truncated_tokens,
        }
        in_order = [scores.get(i, nothing) for i in range(len(examples))]
        starts = None
        if "cuts" in fingerprint:
            starts = [item.base_starts for item in encoded.items if isinstance(item, Chunked)]
            counts["labelled_tokens"] = encoded.labelled_tokens
        save_scores(out, examples, in_order, fingerprint, {**notes, **counts}, starts)
        journal.remove()


def _pack(scores: dict[int, TokenScores]) -> dict[str, Any]:
    """Base64 of raw arrays: exact, infinities included, and quick beside a forward pass."""
    log_prob = np.concatenate([log_prob for log_prob, _ in scores.values()])
    top1 = np.concatenate([top1 for _, top1 in scores.values()])
    return {
        "examples": list(scores),
        "lengths": [len(log_prob) for log_prob, _ in scores.values()],
        "log_prob": base64.b64encode(log_prob.astype("<f4").tobytes()).decode(),
        "top1": base64.b64encode(top1.tobytes()).decode(),
    }


def _unpack(record: dict[str, Any]) -> dict[int, TokenScores]:
    ends = np.cumsum(record["lengths"])[:-1]
    log_prob = np.split(np.frombuffer(base64.b64decode(record["log_prob"]), "<f4"), ends)
    top1 = np.split(np.frombuffer(base64.b64decode(record["top1"]), np.bool_), ends)
    return dict(zip(record["examples"], zip(log_prob, top1, strict=True), strict=True))


@contextmanager
def progress_bar(total: int, enabled: bool, doing: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with tokens/s and the time left; yields the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed and task.completed and task.elapsed:  # done at one blow
                speed = task.completed / task.elapsed
            return Text("" if not speed else f"{speed:,.0f} tokens/s")

    columns = (TextColumn(doing, markup=False), BarColumn(), TextColumn("{task.percentage:.0f} %"), Speed())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda tokens: bar.advance(task, tokens)
