"""Chunks scored: closing factors cancel over a text, batches and interruptions change nothing, bad text is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chunk_toys import byte_level, sentencepiece_like
from conftest import make_model
from transformers import PreTrainedModel

from collm.cuts import START, Cuts
from collm.data.chunk_scoring import score_chunks
from collm.data.chunks import Chunked, Reader, read_examples
from collm.data.examples import Example
from collm.data.formatting import Formatter
from collm.data.scores import load_scores
from collm.data.scoring import openings_of, score
from collm.errors import CollmError
from collm.evaluation.reading import _of_chunks
from collm.models.codec import ByteCodec
from collm.models.fake import FakeModel
from collm.models.openings import Openings, places
from collm.models.pairing import cuts_between
from collm.values import Fault, Query, Replies

TEXTS = [
    "12 + 30 = 42\n#### 42",
    "Paris is the capital of France.\n\n\nAnd café 你好!",
    "x = [1, 22, 333]\n    return sum(values)",
    "",
]
EXAMPLES = [
    Example(
        id=str(i),
        messages=[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": text}],
    )
    for i, text in enumerate(TEXTS[:3])
]
TALK = Example(
    id="talk",
    messages=[
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "12 apples"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "The train carries 56 books."},
    ],
)


@pytest.fixture(scope="module")
def system() -> tuple[Reader, Reader, Reader]:
    tokenizers = [byte_level("gpt2", 420), byte_level("llama3", 460, seed=1), sentencepiece_like()]
    cuts = cuts_between(tokenizers, ["base", "one", "two"])
    assert cuts is not None
    codecs = [ByteCodec(t, cuts, name=n) for t, n in zip(tokenizers, ("base", "one", "two"), strict=True)]
    base = Reader(Formatter(tokenizers[0]), codecs[0])
    return base, *(Reader(Formatter(t), c, base) for t, c in zip(tokenizers[1:], codecs[1:], strict=True))  # type: ignore[return-value]


def model_of(reader: Reader, seed: int = 0, **more: Any) -> PreTrainedModel:
    return make_model(seed=seed, vocab_size=len(reader.formatter.tokenizer) + 5, **more)


def scored(reader: Reader, items: list[Chunked], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    model = model_of(reader, seed)
    size = len(reader.formatter.tokenizer)
    return score_chunks(model, items, openings_of(model, reader, size), size)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("example", [*EXAMPLES, TALK], ids=lambda e: e.id)
def test_one_writer_has_its_ordinary_likelihood(system: Any, which: int, example: Example) -> None:
    """The closing factors cancel: a text's chunks come to the probability of the model's own tokens and its end."""
    reader = system[which]
    item = reader.read(example)
    model, size = model_of(reader), len(reader.formatter.tokenizer)
    [(log_score, _)] = scored(reader, [item])
    with torch.inference_mode():
        laws = model(torch.tensor([item.token_ids])).logits[0, :, :size].log_softmax(-1)
    ends = sorted(openings_ends(model, reader))
    plain = 0.0
    for t, is_gold in enumerate(item.labelled):
        if is_gold:
            ending = item.token_ids[t] in ends
            plain += float(laws[t - 1, ends].logsumexp(-1) if ending else laws[t - 1, item.token_ids[t]])
    assert log_score.sum() == pytest.approx(plain, abs=2e-4)


def openings_ends(model: PreTrainedModel, reader: Reader) -> frozenset[int]:
    from collm.models.loading import eos_ids

    return eos_ids(model, reader.formatter.tokenizer) | reader.formatter.end_ids


def test_all_models_share_the_chunks(system: Any) -> None:
    for example in [*EXAMPLES, TALK]:
        found = [reader.read(example) for reader in system]
        assert len({item.num_starts for item in found}) == 1
        assert len({item.base_starts for item in found}) == 1
        for reader, item in zip(system, found, strict=True):
            assert reader.read(example, 10_000) == item
            data = b"".join(reader.codec.data(item.token_ids[a:b]) for a, b in item.spans if b is not None)
            assert data.decode() == "".join(m["content"] for m in example.messages if m["role"] == "assistant")


def test_scores_by_the_definition(system: Any) -> None:
    """Each chunk against a plain computation of log q and of the greedy chunk, from whole laws."""
    base, one, _ = system
    model, size = model_of(one, 3), len(one.formatter.tokenizer)
    item = one.read(EXAMPLES[1])
    [(log_score, right)] = score_chunks(model, [item], openings_of(model, one, size), size)
    laws = model(torch.tensor([item.token_ids])).logits[0, :, :size].double().log_softmax(-1)
    first = ByteCodec(one.formatter.tokenizer, one.cuts, openings_ends(model, one)).first_bytes

    def opening(last: int) -> list[int]:
        return [v for v, byte in enumerate(first) if one.cuts.opens(last, byte)]

    def close(t: int) -> float:
        last = item.opens[t]
        return 0.0 if last == START or one.cuts.free[last] else float(laws[t - 1, opening(last)].logsumexp(-1))

    for number, (start, stop) in enumerate(item.spans):
        may = opening(item.opens[start])
        choice = may[int(laws[start - 1, may].argmax())]
        if stop is None:
            ends = [v for v, byte in enumerate(first) if byte == 256]
            expected = float(laws[start - 1, ends].logsumexp(-1)) - close(start)
            greedy = choice in ends
        else:
            gold = item.token_ids[start:stop]
            expected = sum(float(laws[start - 1 + i, v]) for i, v in enumerate(gold)) + close(stop) - close(start)
            text = [v for v, byte in enumerate(first) if byte >= 0]
            greedy = choice == gold[0]
            for i, v in enumerate(gold[1:], start=start):
                greedy &= text[int(laws[i, text].argmax())] == v
            greedy &= text[int(laws[stop - 1, text].argmax())] in opening(item.opens[stop])
        assert log_score[number] == pytest.approx(expected, abs=1e-4)
        assert right[number] == greedy


def test_a_chunk_that_cannot_be_read_to_its_end_is_not_wrong(system: Any) -> None:
    """A model that fails behind its first token has said nothing of the chunk."""
    base = system[0]
    item = base.read(EXAMPLES[0], None).first(1)

    class Failing(FakeModel):
        def predict(self, queries: Sequence[Query]) -> Replies:
            [replies] = super().predict(queries)
            return [[*replies[:-1], Fault("fails")]]

    model = Failing("model", len(base.formatter.tokenizer))
    with pytest.raises(CollmError, match="^fails$"):
        _of_chunks(model, 1, item, base.codec)


def test_batches_change_nothing(system: Any) -> None:
    reader = system[1]
    items = [reader.read(example) for example in [*EXAMPLES, TALK]]
    for (one, right), (many, all_right) in zip(
        [found for item in items for found in scored(reader, [item])], scored(reader, items), strict=True
    ):
        np.testing.assert_allclose(one, many, atol=2e-4)
        np.testing.assert_array_equal(right, all_right)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_cut_off_leaves_whole_chunks(system: Any, which: int) -> None:
    """Scores of a sequence cut off anywhere are the first ones of the whole."""
    reader = system[which]
    whole = reader.read(TALK)
    [(scores, right)] = scored(reader, [whole])
    counts = []
    for length in range(8, len(whole) + 1):
        item = reader.read(TALK, length)
        counts.append(item.num_starts)
        assert len(item) == length and item.base_starts == whole.base_starts[: item.num_starts]
        if item.num_starts:
            [(some, some_right)] = scored(reader, [item])
            np.testing.assert_allclose(some, scores[: len(some)], atol=2e-4)
            np.testing.assert_array_equal(some_right, right[: len(some)])
    assert counts == sorted(counts) and counts[-1] == whole.num_starts and len(set(counts)) > 3
    for count in range(1, whole.num_starts):
        fewer = whole.first(count)
        assert fewer.num_starts == count
        [(some, _)] = scored(reader, [fewer])
        np.testing.assert_allclose(some, scores[:count], atol=2e-4)


def test_files_say_where_chunks_begin(system: Any, tmp_path: Path) -> None:
    base, one, _ = system
    for name, reader in (("base", base), ("one", one)):
        model = model_of(reader)
        for _ in range(2):  # the second time it is there
            score(EXAMPLES, model, reader.formatter, tmp_path / name, chunks=reader, progress=False)
    rows = [load_scores(tmp_path / name) for name in ("base", "one")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours["chunk_start"] == theirs["chunk_start"]
        assert len(ours["log_score"]) == len(ours["right"]) == len(ours["chunk_start"])
    # Another assistant makes another table, of which these are not.
    table = cuts_between([base.formatter.tokenizer, one.formatter.tokenizer], ["base", "one"])
    assert table is not None and table.fingerprint != base.cuts.fingerprint
    other = Reader(base.formatter, ByteCodec(base.formatter.tokenizer, table))
    with pytest.raises(CollmError, match="take turns"):
        score(EXAMPLES, model_of(base), base.formatter, tmp_path / "base", chunks=other, progress=False)


def test_chunks_are_not_gone_on_with_as_tokens(system: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring with the other models named was stopped; the next time nobody names them."""
    base, out = system[0], tmp_path / "s"
    model, batches = model_of(base), []

    def stopping(*arguments: Any) -> Any:
        batches.append(arguments)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return score_chunks(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("collm.data.scoring.score_chunks", stopping)
        score(EXAMPLES, model, base.formatter, out, chunks=base, batch_tokens=1, progress=False)
    with pytest.raises(CollmError, match=r"s\.partial is stale.*take turns"):
        score(EXAMPLES, model, base.formatter, out, progress=False)
    score(EXAMPLES, model, base.formatter, out, chunks=base, progress=False)
    with pytest.raises(CollmError, match="s is stale.*take turns"):
        score(EXAMPLES, model, base.formatter, out, progress=False)


def test_text_that_is_not_kept_is_refused(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = system

    def saying(text: str) -> Example:
        return Example(id="x", messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}])

    with pytest.raises(CollmError, match="no text to the other models"):
        base.read(saying("a <|im_start|> b"))
    from tokenizers import normalizers

    changed = byte_level("llama3", 460, seed=1)
    changed.backend_tokenizer.normalizer = normalizers.NFC()
    nfc = Reader(Formatter(changed), ByteCodec(changed, base.cuts, name="changed"), base)
    nfc.read(saying("café"))
    with pytest.raises(CollmError, match="changed does not give .* back byte for byte"):
        nfc.read(saying("cafe\u0301"))
    spaced = sentencepiece_like()
    spaced.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    with pytest.raises(CollmError, match="puts a space in front"):
        ByteCodec(spaced, base.cuts)
    assert len(read_examples(EXAMPLES, two).kept) == 3
    monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", 1)
    with pytest.raises(CollmError, match=r"example '?x.*a chunk of \d+ tokens of base, more than the 1 .*--skip-bad"):
        base.read(saying("return sum(values)"))


def test_cuts_of_nothing(system: Any) -> None:
    cuts = system[0].cuts
    assert isinstance(cuts, Cuts)
    assert cuts.offsets(b"") == [0] and cuts.chunks(b"") == []
    check: Callable[[bytes], bool] = lambda data: b"".join(cuts.chunks(data)) == data  # noqa: E731
    assert all(check(text.encode()) for text in TEXTS)


def test_gradients_of_scores() -> None:
    """Against finite differences, a few rows at a time; ends of several ids, free bytes, tokens that are no text."""
    numbers = np.random.default_rng(0)
    allowed = numbers.random((257, 257)) < 0.6
    allowed[START], allowed[:, 256], allowed[80] = True, True, True
    first = [*numbers.integers(0, 256, 37).tolist(), 256, 256, -1]
    openings = Openings.of(Cuts(allowed), first, 40)
    logits = torch.randn(8, 40, dtype=torch.float64, requires_grad=True)
    gold, last = torch.tensor([0, 1, 2, 37, 38, 5, 6, 8]), torch.tensor([-1, 65, 66, 67, START, -1, 80, 71])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("collm.models.openings.BLOCK", 100)
        assert torch.autograd.gradcheck(lambda x: tuple(places(x, gold, last, openings, choices=False)[:2]), (logits,))
