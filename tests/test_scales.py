"""The study across scales: models cut short, and its recipes run on tiny stand-ins."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.backbone import hidden_states, project
from collm.models.loading import eos_ids, load_model, load_tokenizer
from collm.models.shortened import first_layers

STUDY = Path(__file__).parent.parent / "recipes" / "scales"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDY / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def under_own_head(network: PreTrainedModel, num_layers: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, V]` of what leaves a layer, under the model's own norm and head."""
    backbone: Any = network.base_model
    states = network.base_model(ids, output_hidden_states=True).hidden_states[num_layers]
    return project(network, backbone.norm(states[0]))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_first_layers(kind: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    network = tiny_model(kind)
    short = first_layers(network, 1)
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        expected = under_own_head(network, 1, ids)
        assert torch.allclose(project(short, hidden_states(short, ids)[0]), expected, atol=1e-5)
    with pytest.raises(CollmError, match="2 layers"):
        first_layers(network, 2)


def test_truncated_folder_loads(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    network = tiny_model(num_hidden_layers=3, vocab_size=len(tiny_tokenizer))
    network.save_pretrained(tmp_path / "full")
    tiny_tokenizer.save_pretrained(tmp_path / "full")
    truncate = script("truncate").truncate
    truncate(str(tmp_path / "full"), 2, tmp_path / "short")
    short, tokenizer = load_model(str(tmp_path / "short")), load_tokenizer(str(tmp_path / "short"))
    ids = torch.arange(5, 17)[None]
    with torch.inference_mode():
        assert torch.allclose(short(ids).logits[0], under_own_head(network, 2, ids), atol=1e-5)
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert eos_ids(short, tokenizer) == eos_ids(network, tiny_tokenizer)
    before = (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns
    truncate(str(tmp_path / "full"), 1, tmp_path / "short")
    assert (tmp_path / "short" / "model.safetensors").stat().st_mtime_ns == before, "what is there is left alone"
