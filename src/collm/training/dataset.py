"""Training data: each gold token of the base's sequences with its scores under every model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm.data.chunks import Chunked, Reader, encode
from collm.data.collate import IGNORED, Row
from collm.data.encoding import EncodedSet
from collm.data.examples import Example, examples_fingerprint, hold_out, load_examples
from collm.data.formatting import Encoded, Formatter
from collm.data.scores import CHUNKS, TOKENS, load_scores
from collm.errors import CollmError
from collm.gate import pseudo_labels
from collm.training.recipe import DataSection, Recipe


@dataclass(frozen=True)
class ScoredSet:
    """Encoded examples and, flat over all their `N` labelled tokens (or chunks) in order, the scores of the *untuned*
    models."""

    items: tuple[Encoded, ...]
    base_log_probs: Tensor
    """`[N]` float32."""
    base_top1: Tensor
    """`[N]` bool."""
    log_probs: Tensor
    """`[N, K]` float32, assistants; -inf where one abstains or saw less of the text."""
    top1: Tensor
    """`[N, K]` bool."""

    def pseudo_labels(self, method: str) -> Tensor:
        """`[N]` in 0..K."""
        return pseudo_labels(self.base_top1, self.top1, self.log_probs, method)

    @property
    def count(self) -> int:
        return len(self.base_log_probs)

    @property
    def ends(self) -> NDArray[np.int64]:
        """Where each example's part of the flat arrays ends."""
        return np.cumsum([item.num_starts for item in self.items])

    @property
    def labelled_tokens(self) -> int:
        """Of the base: what losses are divided by."""
        return sum(item.num_labelled for item in self.items)

    def rows(self, labels: Tensor) -> list[Row]:
        """What the collator wants, with `labels` `[N]` as pseudo-labels."""
        rows: list[Row] = []
        num_assistants = self.log_probs.shape[1]
        for item, end in zip(self.items, self.ends, strict=True):
            span = slice(int(end) - item.num_starts, int(end))
            ids, mask = np.array(item.token_ids, np.int32), np.array(item.starts)
            log_probs = np.zeros((len(ids), num_assistants), np.float32)
            log_probs[mask] = self.log_probs[span].numpy()
            top1 = np.zeros((len(ids), num_assistants), np.bool_)
            top1[mask] = self.top1[span].numpy()
            weak = np.zeros(len(ids), np.int32)
            weak[mask] = labels[span].numpy()
            row = Row(
                input_ids=ids,
                labels=np.where(np.array(item.labelled), ids, IGNORED).astype(np.int32),
                assistant_log_probs=log_probs,
                assistant_top1=top1,
                pseudo_labels=weak,
            )
            if isinstance(item, Chunked):
                row["opens"] = np.array(item.opens, np.int32)
            rows.append(row)
        return rows


def joined(sets: Sequence[ScoredSet]) -> ScoredSet:
    """One after the other."""
    if len(sets) == 1:
        return sets[0]
    return ScoredSet(
        tuple(item for each in sets for item in each.items),
        torch.cat([each.base_log_probs for each in sets]),
        torch.cat([each.base_top1 for each in sets]),
        torch.cat([each.log_probs for each in sets]),
        torch.cat([each.top1 for each in sets]),
    )


def load_split(data: DataSection) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""
    options: dict[str, Any] = {"skip_bad": data.skip_bad, "last_turn": data.last_turn}
    train = load_examples(data.train, **options)
    if data.validation is not None:
        return train, load_examples(data.validation, **options)
    return hold_out(train, data.validation_share)


def load_asked(recipe: Recipe, train: Sequence[Example]) -> Sequence[Example]:
    """What writers of own texts are asked, what is held out among it."""
    if recipe.own_texts is None or recipe.own_texts.data is None:
        return train
    return load_examples(recipe.own_texts.data, skip_bad=recipe.data.skip_bad, last_turn=recipe.data.last_turn)


def digest(value: object) -> str:
    """Eight hexadecimal digits of a JSON value's hash."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def assemble(
    examples: Sequence[Example],
    formatter: Formatter,
    max_length: int,
    paths: Sequence[Path],
    chunks: Reader | None = None,
) -> ScoredSet:
    """Encode examples with the base's `formatter` and put every model's scores beside them, matched by id.

    Args:
        paths: scores of the base, then of each assistant; none for plain fine-tuning, which needs no scores.
        chunks: how the base reads examples, where the models share chunks. A chunk that is not whole for every model is
            left out.

    Raises:
        CollmError: an example has no scores, or was scored as something else.
    """
    encoded = encode(examples, formatter, chunks, max_length=max_length)
    kept = encoded.kept
    tables = []
    for path in paths:
        found = {str(row["id"]): row for row in _loaded(path, chunks is not None)}
        missing = [
            examples[i]
            for i in kept
            if examples[i].id not in found or found[examples[i].id]["example"] != examples_fingerprint([examples[i]])
        ]
        if missing:
            raise CollmError(
                f"{path} has no scores for {len(missing)} of {len(examples)} examples as they now are "
                f"(such as {missing[0].label}): score the same data again"
            )
        tables.append(found)
    if chunks is not None:
        encoded = EncodedSet(
            tuple(_shared(item, example, tables) for item, example in zip(encoded.items, examples, strict=True))
        )
        kept = encoded.kept
        if not kept:
            raise CollmError(f"no chunk is whole for every model within {max_length} tokens: raise max_length")
    items = tuple(encoded.items[i] for i in kept)
    names = TOKENS if chunks is None else CHUNKS
    count, num_models = sum(item.num_starts for item in items), max(1, len(paths))
    log_probs = torch.full((count, num_models), -torch.inf)
    top1 = torch.zeros(count, num_models, dtype=torch.bool)
    for k, found in enumerate(tables):
        start = 0
        for i, item in zip(kept, items, strict=True):
            row = found[examples[i].id]
            # A longer prompt may have left an assistant fewer tokens within max_length: always the first ones.
            n = min(len(row[names[0]]), item.num_starts)
            log_probs[start : start + n, k] = torch.tensor(row[names[0]][:n])
            top1[start : start + n, k] = torch.tensor(row[names[1]][:n])
            start += item.num_starts
    return ScoredSet(items, log_probs[:, 0], top1[:, 0], log_probs[:, 1:], top1[:, 1:])


def _loaded(path: Path, chunks: bool) -> Iterator[dict[str, Any]]:
    """Rows of scores, of tokens or of chunks.

    Raises:
        CollmError: they are of the other kind.
    """
    data = load_scores(path)
    if (CHUNKS[0] in data.column_names) != chunks:
        there, here = ("chunks", "tokens") if not chunks else ("tokens", "chunks")
        raise CollmError(
            f"{path} holds scores of {there}, and these models share {here} (they have "
            f"{'different tokenizers' if chunks else 'one tokenizer'}): score again, with all of them named"
        )
    return _rows(data)


def _rows(data: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Rows with lists as arrays. Read one by one, they take longer than a small base."""
    for table in data.with_format("arrow").iter(1000):
        columns = [_values(table.column(name)) for name in table.column_names]
        for values in zip(*columns, strict=True):
            yield dict(zip(table.column_names, values, strict=True))


def _values(column: Any) -> Sequence[Any]:
    """Of an Arrow column: a list of arrays, or of plain values."""
    array = column.combine_chunks()
    if not hasattr(array, "value_lengths"):
        values: list[Any] = array.to_pylist()
        return values
    ends = np.cumsum(array.value_lengths().to_numpy())
    return np.split(array.flatten().to_numpy(zero_copy_only=False), ends[:-1])


def _shared(item: Encoded, example: Example, tables: Sequence[Mapping[str, Any]]) -> Chunked:
    """The chunks that every model has scored."""
    assert isinstance(item, Chunked)
    rows = [found[example.id] for found in tables if example.id in found]
    for row in rows:
        n = min(len(row[CHUNKS[2]]), item.num_starts)
        assert tuple(row[CHUNKS[2]][:n]) == item.base_starts[:n], f"{example.label}: chunks that do not agree"
    return item.first(min([item.num_starts, *(len(row[CHUNKS[0]]) for row in rows)]))
