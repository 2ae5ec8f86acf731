"""The files for several GPUs load and agree with what training asks of them; the table of memory is what is counted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import make_model

from collm.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def memory() -> ModuleType:
    spec = importlib.util.spec_from_file_location("memory", FOLDER / "memory.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yml")), ids=lambda path: path.stem)
def test_configurations_are_accelerates(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert f"--config_file recipes/accelerate/{path.name}" in path.read_text().splitlines()[0]
    settings = getattr(config, "fsdp_config", {})
    if settings:
        assert settings["fsdp_version"] == 2 and settings["fsdp_cpu_ram_efficient_loading"] is False
        assert config.num_processes == {"gpus4": 4, "gpus8": 8, "nodes2": 16}[path.stem]


def test_zero3_gathers_and_names_no_optimizer() -> None:
    settings = json.loads((FOLDER / "zero3.json").read_text())
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "optimizer" not in settings


def test_the_recipe_takes_128_examples_on_eight_gpus() -> None:
    options = load_recipe(FOLDER / "pair.yaml").training
    assert options.batch_size * options.gradient_accumulation * 8 == 128


def test_the_table_in_the_docs_is_what_is_counted(memory: ModuleType) -> None:
    base, assistant = memory.shape("llama-2-7b"), memory.shape("llama-2-70b")
    assert base.parameters == 6_738_415_616 and assistant.parameters == 68_976_648_192
    found = "\n".join(memory.table(base, assistant, 4096))
    assert found in (ROOT / "docs" / "recipes.md").read_text()


def test_shapes_are_counted_without_weights(memory: ModuleType, tmp_path: Path) -> None:
    model = make_model()
    model.config.save_pretrained(tmp_path)
    shape = memory.shape(str(tmp_path))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.outside == 2 * 320 * 32 + 32  # embeddings, head, last norm
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    assert 3 * shape.linear == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert next(iter(adapted.parameters())).device != torch.device("meta")
