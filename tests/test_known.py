"""What is known of a model's weights is not read again; and what is read in another precision is known again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from torch import Tensor

from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scoring import score
from collm.errors import CollmError
from collm.identity import known
from collm.identity.finding import local_identity
from collm.identity.known import Opened
from collm.models.info import same_weights
from collm.models.loading import load_model, named_fingerprint, place_model, weights_fingerprint
from collm.models.placement import Placement
from collm.training import preparation
from collm.training.recipe import Recipe, parse_recipe
from collm.training.train import train


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name, seed in (("base", 0), ("helper", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    for name, count in (("train", 8), ("validation", 4)):
        rows = [{"prompt": f"{n} + 30 =", "completion": f" {n + 30}"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The specs of what is loaded, in order."""
    specs: list[str] = []

    def counting(spec: str, placement: Any) -> Any:
        specs.append(Path(spec).name)
        return place_model(spec, placement)

    monkeypatch.setattr(known, "place_model", counting)
    monkeypatch.setattr(
        preparation, "load_model", lambda spec, *, dtype, device: counting(spec, Placement(dtype, device))
    )
    return specs


def recipe(place: Path, out: str) -> Recipe:
    values = {
        "out": str(place / out),
        "cache": str(place / "cache"),
        "base": {"model": str(place / "base")},
        "assistants": [{"name": "helper", "model": str(place / "helper")}],
        "data": {"train": str(place / "train.jsonl"), "validation": str(place / "validation.jsonl")},
        "init": {"max_tokens": 100},
        "objective": "weak_supervision",
        "tune": "gate",
    }
    return parse_recipe(values)


def run(place: Path, out: str) -> Path:
    return train(recipe(place, out), progress=False)


def test_an_assistant_that_is_scored_is_not_loaded_again(place: Path, loaded: list[str]) -> None:
    run(place, "first")
    assert loaded == ["base", "helper"]  # both splits by one loading
    run(place, "second")
    assert loaded == ["base", "helper", "base"]
    run(place, "second")  # finished
    assert loaded == ["base", "helper", "base"]


def test_only_the_first_of_several_processes_opens_an_assistant(
    place: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight of them once read 140 GB each, at the same time, to learn what the first had just learnt."""
    run(place, "first")
    scores = [
        {split: next((place / "cache").glob(f"{name}-{split}-*[!l]")) for split in ("train", "validation")}
        for name in ("base", "helper")
    ]
    (place / "helper" / "model.safetensors").unlink()
    loaded.clear()
    monkeypatch.setattr(preparation, "broadcast_object_list", lambda objects: [scores])
    second: Any = SimpleNamespace(is_main_process=False, num_processes=8, main_process_first=nullcontext)
    found = preparation.prepare(recipe(place, "first"), second, progress=False)
    assert loaded == ["base"] and len(found.train.items) == 8
    assert (
        found.info.assistants[0].weights_fingerprint
        == json.loads((scores[1]["train"] / "scores.json").read_text())["weights_fingerprint"]
    )


def test_a_command_that_is_done_loads_nothing(place: Path, loaded: list[str]) -> None:
    examples, formatter = load_examples(place / "train.jsonl"), Formatter(make_tokenizer())
    for _ in range(2):
        score(examples, str(place / "helper"), formatter, place / "scores")
    assert loaded == ["helper"]
    with pytest.raises(CollmError, match="the model's dtype"):
        score(examples, str(place / "helper"), formatter, place / "scores", dtype="bfloat16")
    score(examples, str(place / "helper"), formatter, place / "scores", resume=False)
    assert loaded == ["helper"] * 3


def in_place(folder: Path) -> None:
    """One bit, in the file as it lies, with its old times."""
    path = folder / "model.safetensors"
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        [last] = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def by_copy(folder: Path) -> None:
    """As `rsync -a` does: another file of the same length, with times from elsewhere."""
    path = folder / "model.safetensors"
    found = path.stat()
    make_model(seed=9).save_pretrained(folder / "other")
    os.replace(folder / "other" / "model.safetensors", path)
    shutil.rmtree(folder / "other")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def configured(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "told"), [(in_place, "weights"), (by_copy, "weights"), (configured, r"model\.config\.rms_norm_eps")]
)
def test_files_that_changed_are_read_again(
    place: Path, loaded: list[str], change: Callable[[Path], None], told: str
) -> None:
    examples, formatter = load_examples(place / "train.jsonl"), Formatter(make_tokenizer())
    score(examples, str(place / "helper"), formatter, place / "scores")
    change(place / "helper")
    with pytest.raises(CollmError, match=f"stale.*{told}"):
        score(examples, str(place / "helper"), formatter, place / "scores")
    assert loaded == ["helper"] * 2


def test_files_that_change_while_they_are_loaded_are_not_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(spec: str, placement: Any) -> Any:
        model = place_model(spec, placement)
        by_copy(Path(spec))
        return model

    monkeypatch.setattr(known, "place_model", slowly)
    first = Opened(str(place / "helper")).identity
    monkeypatch.undo()
    assert Opened(str(place / "helper")).identity["weights"] != first["weights"]


def test_a_damaged_note_is_no_note(place: Path, loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLM_CACHE", str(place / "noted"))
    spec = str(place / "helper")
    expect = local_identity(load_model(spec))
    assert Opened(spec).identity == expect == Opened(spec).identity
    [note] = (place / "noted" / "weights").iterdir()
    for damage in ("", "[]", "{", '{"identity": 1, "fingerprint": ""}'):
        note.write_text(damage)
        opened = Opened(spec)
        assert opened.identity == expect and opened.fingerprint == weights_fingerprint(opened.model)
    shutil.rmtree(place / "noted")
    (place / "noted").write_text("")  # no place for a cache
    assert Opened(spec).identity == expect


def test_a_spec_and_its_settings_are_known_apart(place: Path, loaded: list[str]) -> None:
    spec = str(place / "helper")
    full, half = Opened(spec).identity, Opened(f"{spec}?dtype=bfloat16").identity
    assert differing_keys(full, half) == {"dtype", "weights"}
    assert Opened(f"{spec}?dtype=bfloat16").identity == half == Opened(spec, dtype="bfloat16").identity
    assert loaded == ["helper"] * 2


def differing_keys(one: Any, other: Any) -> set[str]:
    return {key for key in one if one[key] != other[key]}


# ---- fingerprints across precisions


def values(*, seed: int = 0) -> Tensor:
    """Over all magnitudes that weights have, those that float16 holds with fewer digits, or not at all, too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4096, generator=generator) * 10 ** torch.empty(4096).uniform_(-9, 5, generator=generator)


def print_of(tensor: Tensor) -> str:
    return named_fingerprint([("weight", tensor)])


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_weights_in_another_precision_agree(kept: torch.dtype) -> None:
    """What is in a file, and how it is loaded at training and later."""
    in_file = values().to(kept)
    trained = print_of(in_file.float())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert same_weights(print_of(in_file.to(dtype)), trained), dtype
        assert not same_weights(print_of(values(seed=1).to(kept).to(dtype)), trained)
    if kept is torch.bfloat16:  # trained in float16, used in the file's own
        assert same_weights(print_of(in_file), print_of(in_file.half()))


def test_fingerprints_of_older_checkpoints_still_count() -> None:
    found = print_of(values())
    old = found.partition("-")[0]
    assert len(old) == 16 and same_weights(found, old) and same_weights(print_of(values().bfloat16()), old)
    assert not same_weights(found, "0" * 16)
