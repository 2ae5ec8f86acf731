"""Files of checkpoints, damaged at random: the model that was meant, or one line that says what is wrong.

`COLLM_FUZZ=5000 pytest --hypothesis-seed=N tests/test_fuzz_files.py` looks longer.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from collm.data.examples import Example
from collm.data.formatting import Formatter
from collm.data.scores import load_scores
from collm.data.scoring import score
from collm.errors import CollmError
from collm.identity.finding import local_identity
from collm.models.checkpoint import load_base, save_checkpoint
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo, load_info
from collm.models.loading import eos_ids, load_model, load_tokenizer

fuzz = settings(
    max_examples=int(os.environ.get("COLLM_FUZZ", "12")),
    deadline=None,
    # Making a failure smaller takes minutes where each try loads models.
    phases=[phase for phase in Phase if phase is not Phase.shrink or "COLLM_FUZZ" in os.environ],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "tie_word_embeddings": True,
}
TEXTS = [Example("0", prompt="12 + 30 =", completion=" 42"), Example("1", prompt="9 * 9 =", completion=" 81")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a pair made of an adapter and a gate, and scores."""
    root = tmp_path_factory.mktemp("whole")
    base = make_model(**SMALL)
    base.save_pretrained(root / "base")
    make_tokenizer().save_pretrained(root / "base")
    row = {"target_rate": 0.5, "achieved_rate": 0.5, "threshold": 0.5, "log_odds": 0.0, "metric_value": 1.0}
    table = CalibrationTable(
        task="t", metric="m", seed=0, num_prompts=1, rows=[CalibrationRow(**row), CalibrationRow(**row)]
    )
    info = CheckpointInfo(
        kind="lora",
        base_model=str(root / "base"),
        assistants=[AssistantInfo(name="calculator", spec="calculator")],
        calibration=[table],
    )
    torch.manual_seed(1)
    adapted = get_peft_model(make_model(**SMALL), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    head = DeferralHead(16, 1)
    torch.nn.init.normal_(head.weight)
    save_checkpoint(root / "pair", info, adapted, head, None)
    score(TEXTS, base, Formatter(make_tokenizer()), root / "scores", progress=False)
    return root


def loaded(root: Path) -> dict[str, Any]:
    """All that the files decide."""
    model, head, tokenizer, info = load_base(root / "pair", base=str(root / "base"))
    assert head is not None
    found = load_scores(root / "scores")
    plain = load_model(str(root / "base"))
    return {
        "base": local_identity(plain)["weights"],
        "ends": sorted(eos_ids(plain, tokenizer)),
        "pair": local_identity(model)["weights"],
        "gate": [tensor.tolist() for tensor in head.state_dict().values()],
        "info": info.model_dump(exclude={"base_place", "base_model"}),
        "tokens": [load_tokenizer(str(root / "base"))("12 + 30 = 42")["input_ids"], tokenizer("9")["input_ids"]],
        "scores": [found["log_prob"][:], found["top1"][:]],
    }


def same(one: Any, other: Any) -> bool:
    return json.dumps(one, default=str) == json.dumps(other, default=str)


def judged(root: Path, expect: dict[str, Any], harmless: Callable[[dict[str, Any], dict[str, Any]], bool]) -> None:
    """Right, refused in one line, or another thing that the file does say."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = loaded(root)
    except CollmError as error:
        assert "\n" not in str(error) and "Traceback" not in str(error), error
        assert len(str(error)) < 1200
        return
    assert same(found, expect) or harmless(found, expect), "something else was loaded, and nothing said"


FILES = [
    "base/model.safetensors",
    "base/config.json",
    "base/generation_config.json",
    "base/tokenizer.json",
    "base/tokenizer_config.json",
    "pair/adapter_model.safetensors",
    "pair/adapter_config.json",
    "pair/gate.safetensors",
    "pair/collm.json",
    "scores/scores.json",
    "scores/dataset_info.json",
    "scores/state.json",
]


@cache
def _expected(root: Path) -> dict[str, Any]:
    return loaded(root)


def in_a_copy(whole: Path, test: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        shutil.copytree(whole, root)
        test(root)


def _is_json(path: Path) -> bool:
    try:
        return path.is_file() and isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


@fuzz
@given(
    st.sampled_from(FILES),
    st.sampled_from(["cut", "longer", "overwritten", "removed", "empty", "pointer", "text", "folder", "swapped"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=12),
    st.sampled_from(FILES),
)
def test_damaged_files(whole: Path, name: str, damage: str, where: float, what: bytes, other: str) -> None:
    """Lengths, headers and JSON are looked at; what a bit of a tensor's inside should be, no file says."""
    expect = _expected(whole)

    def test(root: Path) -> None:
        path = root / name
        data = path.read_bytes()
        place = int(where * len(data))
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "removed":
            path.write_bytes(
                {
                    "cut": data[:place],
                    "longer": data + what,
                    "overwritten": data[:place] + what + data[place + len(what) :],
                    "empty": b"",
                    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n",
                    "text": b"<!DOCTYPE html><html>404</html>",
                    "swapped": (whole / other).read_bytes(),
                }[damage]
            )
        # What is written over the inside of a file may be a file as good as before, which says something else.
        says_otherwise = damage in ("overwritten", "swapped", "removed") or (path.suffix == ".json" and _is_json(path))
        judged(root, expect, lambda *_: says_otherwise)

    in_a_copy(whole, test)


OLD = ("bias", "masked_bias")
"""Constants of old versions of transformers, which may be there."""
TENSORS = ["base/model.safetensors", "pair/adapter_model.safetensors", "pair/gate.safetensors"]


@fuzz
@given(
    st.sampled_from(TENSORS),
    st.sampled_from(["missing", "renamed", "longer", "wider", "flat", "scalar", "empty", "added", "other dtype"]),
    st.integers(0, 100),
    st.text("abcdefghijklmnopqrstuvwxyz._0123456789", min_size=1, max_size=12),
)
def test_tensors_that_are_not_as_they_should_be(whole: Path, name: str, change: str, which: int, word: str) -> None:
    """No tensor is made up, dropped, cut or stretched."""
    expect = _expected(whole)

    def test(root: Path) -> None:
        tensors = load_file(root / name)
        key = sorted(tensors)[which % len(tensors)]
        tensor = tensors[key]
        changed: dict[str, Tensor | None] = {
            "missing": None,
            "renamed": None,
            "longer": torch.cat([tensor, tensor[:1]]),
            "wider": torch.cat([tensor, tensor[..., :1]], dim=-1),
            "flat": tensor.flatten().clone(),
            "scalar": torch.zeros(()),
            "empty": tensor[:0].clone(),
            "added": tensor,
            # Rounded, and rightly so: nothing is lost that the file has.
            "other dtype": tensor.double(),
        }
        made = changed[change]
        if made is None:
            del tensors[key]
        else:
            tensors[key] = made
        if change in ("renamed", "added"):
            tensors[f"{key}.{word}"] = tensor.clone()
        save_file(tensors, root / name, metadata={"format": "pt"})
        if change == "other dtype" or (change == "flat" and tensor.dim() == 1) or (change == "added" and word in OLD):
            judged(root, expect, lambda *_: False)
        else:
            with pytest.raises(CollmError) as caught:
                loaded(root)
            assert "\n" not in str(caught.value) and Path(name).parent.name in str(caught.value)

    in_a_copy(whole, test)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@fuzz
@given(st.sampled_from([name for name in FILES if name.endswith(".json")]), st.integers(0, 10**6), values)
def test_settings_that_are_not_as_they_should_be(whole: Path, name: str, which: int, value: Any) -> None:
    """A value of the wrong kind anywhere in a description."""
    expect = _expected(whole)

    def test(root: Path) -> None:
        path = root / name
        content = json.loads(path.read_text())
        places = [(holder, key) for holder, key in _places(content)]
        holder, key = places[which % len(places)]
        holder[key] = value
        path.write_text(json.dumps(content))
        judged(root, expect, lambda *_: True)

    in_a_copy(whole, test)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every key and index in a JSON value, with what holds it; of long lists the first few."""
    found: list[tuple[Any, Any]] = []
    keys = (
        list(value) if isinstance(value, dict) else list(range(min(4, len(value)))) if isinstance(value, list) else []
    )
    for key in keys[:40]:
        found.append((value, key))
        found += _places(value[key])
    return found


def test_what_lies_beside_a_checkpoint_is_no_part_of_it(whole: Path) -> None:
    def test(root: Path) -> None:
        for folder in ("base", "pair", "scores"):
            (root / folder / "notes.txt").write_text("remember")
            (root / folder / ".DS_Store").write_bytes(bytes(np.arange(200, dtype=np.uint8)))
        assert same(loaded(root), _expected(whole))

    in_a_copy(whole, test)


def test_scores_and_checkpoints_survive_their_own_reading(whole: Path) -> None:
    assert load_info(whole / "pair") is not None and same(loaded(whole), _expected(whole))
