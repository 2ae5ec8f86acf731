"""Hidden states in a mapped file: the same as in memory, by parts, resumed, refused where damaged."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from collm.data.formatting import Encoded
from collm.errors import CollmError
from collm.training import hidden as module
from collm.training.dataset import ScoredSet
from collm.training.gate_only import GateData, evaluate_gate, train_gate
from collm.training.hidden import all_hidden, collect_hidden, mapped
from collm.training.initialisation import Standardiser, fit
from collm.training.model import LossConfig


def scored(count: int = 40) -> ScoredSet:
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        ids = torch.randint(3, 300, (8 + i % 17,), generator=generator).tolist()
        items.append(Encoded(tuple(ids), tuple([False] * 5 + [True] * (len(ids) - 5))))
    tokens = sum(item.num_labelled for item in items)
    scores = -torch.rand(tokens, 1, generator=generator)
    return ScoredSet(tuple(items), scores[:, 0] - 0.5, scores[:, 0] > -0.2, scores, scores > -0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_what_the_model_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    model, data = make_model().to(dtype), scored()
    found = all_hidden(model, data, tmp_path, "train", progress=False)
    assert found.dtype == dtype and found.shape == (data.count, 32)
    expected, where = collect_hidden(model, data, limit=10**9, progress=False)
    assert where.tolist() == list(range(data.count))
    torch.testing.assert_close(found.float(), expected, atol=0, rtol=0)
    [path] = tmp_path.glob("*.safetensors")
    assert torch.equal(load_file(path)["hidden"], found)  # a file like any other
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [path.name]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    rows = torch.randn(7, 5)
    save_file({"hidden": rows}, tmp_path / "old.safetensors")
    assert torch.equal(mapped(tmp_path / "old.safetensors"), rows)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make_model(), scored()
    monkeypatch.setattr(module._batches, "__defaults__", (100,))
    whole = all_hidden(model, data, tmp_path / "whole", "train", progress=False)
    quick, seen = module._hidden_of, []

    def stops(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, found in enumerate(quick(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(module, "_hidden_of", stops)
    with pytest.raises(KeyboardInterrupt):
        all_hidden(model, data, tmp_path, "train", progress=False)

    def counts(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(len(args[2]))
        return quick(*args)

    monkeypatch.setattr(module, "_hidden_of", counts)
    assert torch.equal(all_hidden(model, data, tmp_path, "train", progress=False), whole)
    assert seen == [len(module._batches(model, data, range(40))) - 3]


def test_what_was_done_in_a_file_that_was_removed_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To make room, say; and the run that began it anew was stopped before its first batch."""
    model, data = make_model(), scored(40)
    monkeypatch.setattr(module, "_batches", lambda model, data, chosen: [[i] for i in chosen])
    quick, whole = module._hidden_of, all_hidden(model, data, tmp_path / "whole", "train", progress=False)

    def stops_after(number: int) -> None:
        def stops(*args: Any) -> Iterator[tuple[Tensor, Tensor]]:
            yield from itertools.islice(quick(*args), number)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_hidden_of", stops)
        with pytest.raises(KeyboardInterrupt):
            all_hidden(model, data, tmp_path, "train", progress=False)

    stops_after(3)
    next(tmp_path.glob("*.partial")).unlink()
    stops_after(0)
    monkeypatch.setattr(module, "_hidden_of", quick)
    assert torch.equal(all_hidden(model, data, tmp_path, "train", progress=False), whole)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"hidden": torch.randn(7, 5)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CollmError, match="damaged.*remove it"):
        mapped(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CollmError, match="damaged"):
        mapped(path)


def test_by_parts_is_as_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = 50 + 3 * torch.randn(5000, 16, generator=generator)
    wanted = hidden[:, 0] > 52
    log_probs = torch.stack([torch.where(wanted, -3.0, -0.3), torch.where(wanted, -0.3, -3.0)], 1)
    data = GateData(hidden, log_probs)
    head = fit(hidden, torch.zeros(5000, dtype=torch.long), 1)
    whole, figures = Standardiser.of(hidden), evaluate_gate(head, data, LossConfig())

    def trained() -> float:
        made = train_gate(
            fit(hidden, torch.zeros(5000, dtype=torch.long), 1),
            data,
            data,
            LossConfig(),
            learning_rate=0.05,
            epochs=5,
            batch_tokens=128,
            patience=9,
            seed=0,
            log=lambda record: None,
        )
        return evaluate_gate(made, data, LossConfig()).nll

    in_memory = trained()
    monkeypatch.setattr(module, "PART_BYTES", 1100 * 16 * 4)  # five parts, of one block of 1,024 tokens each
    parts = Standardiser.of(hidden)
    torch.testing.assert_close(parts.mean, whole.mean, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(parts.std, whole.std, atol=1e-5, rtol=1e-5)
    found = evaluate_gate(head, data, LossConfig())
    assert found.nll == pytest.approx(figures.nll, rel=1e-6)
    torch.testing.assert_close(found.gate, figures.gate)
    # Another order of the same tokens: as good a gate.
    assert trained() == pytest.approx(in_memory, abs=0.02) and in_memory < 0.5
    # Every token is seen once an epoch, never more than a part at a time.
    seen = [part.hidden for part in data.parts(torch.device("cpu"), torch.Generator().manual_seed(1))]
    assert max(map(len, seen)) <= 1100
    assert torch.equal(torch.cat(seen)[:, 0].sort().values, hidden[:, 0].sort().values)
    sampled, where = module.sample(hidden, 0)
    assert len(where) == 1100 and torch.equal(sampled, hidden[where])
