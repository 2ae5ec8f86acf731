"""What every model makes of gold text: for each gold token, who would have written it and how sure each model is.

Teacher-forced: each token is predicted after the gold tokens before it, whoever would have written something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm.cuts import END, START
from collm.data.chunks import Chunked, Reader
from collm.data.examples import Example, examples_fingerprint
from collm.data.formatting import Encoded, Formatter
from collm.data.journal import Journal
from collm.data.resumable import progress_bar
from collm.errors import CollmError
from collm.files import claimed
from collm.identity.comparing import differences
from collm.identity.finding import system_identity
from collm.llm.sharing import Sharing
from collm.models.codec import ByteCodec
from collm.types import BASE
from collm.values import Answer, Fault, LanguageModel, Query, Reply

READING_VERSION = 2
"""2: the header tells all that decides what is read."""
LAWS = 256
"""Tokens whose laws over the vocabulary exist at a time."""


@dataclass(frozen=True)
class Reading:
    """N gold tokens under 1+K models, base first.

    `right` `[N, 1+K]`: the model's most probable token is the gold one. `answers` `[N, 1+K]`: it does not abstain
    (where it does, it is not right). `top_log_prob` `[N, 1+K]`: log of its largest probability, -inf where it abstains.
    `entropy` `[N]`: of the base's law, in nats. `log_gate` `[N, 1+K]`, or None without a gate. `example` `[N]`: the
    example a token stands in, by number.
    """

    right: NDArray[np.bool_]
    answers: NDArray[np.bool_]
    top_log_prob: NDArray[np.float64]
    entropy: NDArray[np.float64]
    log_gate: NDArray[np.float64] | None
    example: NDArray[np.int64]


def read(
    models: Sequence[LanguageModel],
    formatters: Sequence[Formatter],
    examples: Sequence[Example],
    *,
    max_length: int = 1024,
    out: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
    sharing: Sharing | None = None,
) -> Reading:
    """Ask every model about every gold token; where they have different tokenizers, about every chunk.

    Args:
        sharing: how models with different tokenizers share a text.
        max_length: tokens of each model's sequence; what any model has no room for is left out.
        out: a `.jsonl` file that keeps each example as it is finished; a stopped run goes on from there.
        identity: tells this system from others, see `evaluate`.

    Raises:
        CollmError: no gold tokens, a model cannot answer, or an `out` of something else.
    """
    for model in models:
        for what in ("entropy", "top", "blocks"):
            if what in model.lacks:
                raise CollmError(f"{model.name} cannot be read token by token: {model.lacks[what]}")
    header = {
        "reading": READING_VERSION,
        "examples": examples_fingerprint(examples),
        "models": [model.name for model in models],
        "max_length": max_length,
        **({} if sharing is None else {"cuts": sharing.cuts.fingerprint}),
        "identity": {**(identity or {}), **system_identity(models, formatters)},
    }
    readers = None if sharing is None else sharing.readers(formatters)
    lengths = [len(formatters[BASE].encode(example, max_length)) for example in examples]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        journal = None
        if out is not None:
            path = _checked(Path(out))
            stack.enter_context(claimed(path))
            journal = stack.enter_context(Journal(path, header))
            _require_same(journal, header)
            rows += journal.records
        advance = stack.enter_context(progress_bar(sum(lengths), progress, "reading"))
        advance(sum(lengths[: len(rows)]))
        for example, length in list(zip(examples, lengths, strict=True))[len(rows) :]:
            if readers is None:
                rows.append(_read_one(models, formatters, example, max_length))
            else:
                rows.append(_read_chunks(models, readers, example, max_length))
            if journal is not None:
                journal.append(rows[-1])
            advance(length)
    if not any(row["right"] for row in rows):
        raise CollmError(f"no example has a gold token within its first {max_length} tokens; raise max_length")
    return _joined(rows, len(models))


def _checked(path: Path) -> Path:
    if path.suffix == ".json":
        raise CollmError(f"{path}: what was read is written as .jsonl; the figures go to the .json beside it")
    return path


def _require_same(journal: Journal, header: Mapping[str, Any]) -> None:
    what = differences(journal.found, header)
    if what:
        raise CollmError(
            f"{journal.path} was read by another system or from another text ({what}): give another file, or delete it"
        )


def _read_one(
    models: Sequence[LanguageModel], formatters: Sequence[Formatter], example: Example, max_length: int
) -> dict[str, Any]:
    """Columns of one example's tokens, as they are kept in the file."""
    completions = formatters[BASE].completions(example)
    seen = [formatter.encode(example, max_length, completions) for formatter in formatters]
    count = min(item.num_labelled for item in seen)
    columns = [_of_model(model, z, item, count) for z, (model, item) in enumerate(zip(models, seen, strict=True))]
    return _row(example, columns, count)


def _read_chunks(
    models: Sequence[LanguageModel], readers: Sequence[Reader], example: Example, max_length: int
) -> dict[str, Any]:
    """As `_read_one`, of one example's chunks."""
    seen = [reader.read(example, max_length) for reader in readers]
    count = min(item.num_starts for item in seen)
    columns = [
        _of_chunks(model, z, item.first(count), reader.codec)
        for z, (model, item, reader) in enumerate(zip(models, seen, readers, strict=True))
    ]
    return _row(example, columns, count)


def _row(example: Example, columns: Sequence[Sequence[Mapping[str, Any]]], count: int) -> dict[str, Any]:
    return {
        "id": example.id,
        "right": [[int(column[t]["right"]) for column in columns] for t in range(count)],
        "top": [[column[t]["top"] for column in columns] for t in range(count)],
        "entropy": [told["doubt"] for told in columns[BASE]],
        "gate": [told["gate"] for told in columns[BASE]],
    }


def _of_chunks(model: LanguageModel, number: int, item: Chunked, codec: ByteCodec) -> list[dict[str, Any]]:
    """The chunks of an example under one model. It is right where it would write the whole chunk, and then open one."""
    answers: dict[int, Answer | None] = {}
    for start, end in _runs([t for t, scored in enumerate(item.scored) if scored]):
        query = Query.of(item.token_ids[: end - 1], end - start, model=number)
        # Within a chunk nothing is to open: any byte will do.
        query = query._replace(last_bytes=[last if last >= 0 else START for last in item.opens[start:end]])
        [replies] = model.predict([query])
        model.release(query.view)
        for t, reply in zip(range(start, end), replies, strict=True):
            if isinstance(reply, Fault):
                raise CollmError(reply.reason)
            answers[t] = reply
    return [_chunk(answers, start, stop, item, codec, number) for start, stop in item.spans]


def _chunk(
    answers: Mapping[int, Answer | None], start: int, stop: int | None, item: Chunked, codec: ByteCodec, number: int
) -> dict[str, Any]:
    first = answers[start]
    if first is None:
        return {"right": False, "top": None}
    gold, choice = item.token_ids[start], first.top_token_id
    assert choice is not None
    right = codec.first_bytes[choice] == END if stop is None else choice == gold
    for t in range(start + 1, stop or start + 1):
        inner = answers[t]
        right = right and isinstance(inner, Answer) and inner.token_id == item.token_ids[t]
    closing = None if stop is None else answers[stop]
    if stop is not None and isinstance(closing, Answer):  # a tool that says no more has closed its chunk
        assert codec.cuts is not None
        right = right and codec.cuts.opens(item.opens[stop], codec.first_bytes[closing.token_id])
    told: dict[str, Any] = {"right": right, "top": first.top_log_prob - first.log_close}
    return told if number != BASE else {**told, **_of_base(first)}


def _of_model(model: LanguageModel, number: int, item: Encoded, count: int) -> list[dict[str, Any]]:
    """The first `count` labelled tokens of an example under one model."""
    rows: list[dict[str, Any]] = []
    for start, end in _pieces(item, count):
        query = Query.of(item.token_ids[: end - 1], end - start, model=number)
        [answers] = model.predict([query])
        model.release(query.view)
        gold = item.token_ids[start:end]
        rows += [_token(answer, token_id, number) for answer, token_id in zip(answers, gold, strict=True)]
    return rows


def _token(answer: Reply, gold: int, number: int) -> dict[str, Any]:
    if isinstance(answer, Fault):
        raise CollmError(answer.reason)
    if answer is None:
        return {"right": False, "top": None}
    told: dict[str, Any] = {"right": answer.top_token_id == gold, "top": answer.top_log_prob}
    return told if number != BASE else {**told, **_of_base(answer)}


def _of_base(answer: Answer) -> dict[str, Any]:
    return {"doubt": answer.entropy, "gate": None if answer.log_gate is None else list(answer.log_gate)}


def _pieces(item: Encoded, count: int) -> Iterator[tuple[int, int]]:
    """Runs of labelled positions, from `start` to before `end`: the first `count` of them, `LAWS` at a time."""
    return _runs([position for position, labelled in enumerate(item.labelled) if labelled][:count])


def _runs(at: Sequence[int]) -> Iterator[tuple[int, int]]:
    starts = [i for i in range(len(at)) if i == 0 or at[i] != at[i - 1] + 1]
    for first, last in zip(starts, [*starts[1:], len(at)], strict=True):
        for i in range(first, last, LAWS):
            yield at[i], at[min(i + LAWS, last) - 1] + 1


def _joined(rows: Sequence[Mapping[str, Any]], num_models: int) -> Reading:
    def column(name: str) -> list[Any]:
        return list(chain.from_iterable(row[name] for row in rows))

    top = np.array([[np.nan if value is None else value for value in values] for values in column("top")])
    gates = column("gate")
    return Reading(
        right=np.array(column("right"), np.bool_).reshape(-1, num_models),
        answers=~np.isnan(top),
        top_log_prob=np.where(np.isnan(top), -np.inf, top),
        entropy=np.array(column("entropy"), np.float64),
        log_gate=None if gates[0] is None else np.array(gates, np.float64),
        example=np.repeat(np.arange(len(rows)), [len(row["right"]) for row in rows]),
    )
