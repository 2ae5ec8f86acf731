"""Where every token is a chunk, the path of chunks and that of tokens are one: scores to the bit, the loss to 1e-6."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chunk_toys import byte_level
from conftest import make_model

from collm.cuts import Cuts
from collm.data.chunks import Chunked, Reader
from collm.data.examples import Example
from collm.data.formatting import Formatter
from collm.data.scores import CHUNKS, TOKENS, load_scores
from collm.data.scoring import openings_of, score
from collm.models.codec import ByteCodec
from collm.models.head import DeferralHead
from collm.training.model import IGNORED, BaseWithGate, LossConfig, Objective

TEXTS = ("12 + 30 = 42\n#### 42", "x = [1, 22, 333]\n    return sum(values)", "The end.")
EXAMPLES = [
    Example(
        id=str(n),
        messages=[{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": text}],
    )
    for n, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def reader() -> Reader:
    """Of a tokenizer whose tokens are bytes: its table has a cut at every place of an English text."""
    tokenizer = byte_level(vocab_size=259)
    codec = ByteCodec(tokenizer)
    assert all(piece is None or len(piece) == 1 for piece in codec.pieces)
    return Reader(Formatter(tokenizer), ByteCodec(tokenizer, Cuts.of([codec.pieces])))


def test_scores_are_equal_to_the_bit(reader: Reader, tmp_path: Path) -> None:
    model = make_model(seed=3, vocab_size=264)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(10):  # so that it is right here and there
        ids = torch.tensor([reader.read(EXAMPLES[0]).token_ids])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, chunks in (("tokens", None), ("chunks", reader)):
        score(EXAMPLES, model, reader.formatter, tmp_path / name, chunks=chunks, progress=False)
    rights: list[bool] = []
    for ours, theirs in zip(load_scores(tmp_path / "chunks"), load_scores(tmp_path / "tokens"), strict=True):
        assert ours["id"] == theirs["id"]
        (scores, right, starts), (log_probs, top1) = (
            [row[key] for key in keys] for row, keys in ((ours, CHUNKS), (theirs, TOKENS))
        )
        assert starts == list(range(len(log_probs)))
        assert np.array(scores).tobytes() == np.array(log_probs).tobytes()
        assert right == top1
        rights += right
    assert 5 < sum(rights) < len(rights) - 5


@pytest.mark.parametrize("objective", ["marginal", "weak_supervision"])
@pytest.mark.parametrize("training", [True, False])
def test_losses_figures_and_gradients_are_equal(reader: Reader, objective: Objective, training: bool) -> None:
    """Cross-entropy and its gradient are computed in another order: 1e-6."""
    found = []
    size = len(reader.formatter.tokenizer)
    for in_chunks in (False, True):
        model = make_model(seed=3, vocab_size=264)
        head = DeferralHead(model.config.hidden_size, 1)
        torch.manual_seed(0)
        torch.nn.init.normal_(head.weight)
        openings = openings_of(model, reader, size) if in_chunks else None
        module = BaseWithGate(model, head, LossConfig(objective), size, openings).train(training)
        told = []
        for example in EXAMPLES:
            item = reader.read(example) if in_chunks else reader.formatter.encode(example)
            ids, labelled = torch.tensor([item.token_ids]), torch.tensor([item.labelled])
            draws = torch.Generator().manual_seed(len(item))
            shape = (*ids.shape, 1)
            out = module(
                ids,
                torch.ones_like(ids),
                torch.where(labelled, ids, IGNORED),
                -3 * torch.rand(shape, generator=draws),
                torch.rand(shape, generator=draws) < 0.5,
                torch.randint(0, 2, ids.shape, generator=draws),
                opens=torch.tensor([item.opens]) if isinstance(item, Chunked) else None,
            )
            if training:
                out["loss"].backward()
            told.append(out)
        found.append((told, [parameter.grad for parameter in module.parameters()]))
    (tokens, plain), (chunks, ours) = found
    for by_tokens, by_chunks in zip(tokens, chunks, strict=True):
        assert by_chunks.pop("chunks") == by_tokens["count"]
        assert by_chunks.keys() == by_tokens.keys()
        for name, value in by_tokens.items():
            torch.testing.assert_close(by_chunks[name], value, atol=1e-6, rtol=1e-6)
    for one, other in zip(plain, ours, strict=True):
        assert (one is not None) == training
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
