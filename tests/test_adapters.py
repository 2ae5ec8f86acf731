"""Adapters of one base share its weights, and answer as if they had been loaded by themselves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_local import ask, close, tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from watching import watched

from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models import adapters
from collm.models.adapters import ModelStore, Variant
from collm.models.contents import contents, same_files
from collm.models.loading import load_context_length, load_model, load_tokenizer, place_model, weights_fingerprint
from collm.models.local import LocalModel
from collm.models.paged.machinery import Machinery
from collm.models.placement import Placement
from collm.sampling_params import SamplingParams

QUERIES = [ask(tuple(range(3, 20)), 2), ask((5, 6, 7))]


def save_adapter(base: str, folder: Path, seed: int, **settings: Any) -> str:
    torch.manual_seed(seed)
    config = LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(load_model(base), config)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    network: PreTrainedModel = tiny("llama", vocab_size=320)
    for name in ("base", "copy"):
        network.save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    base = str(folder / "base")
    return {
        "base": base,
        "one": save_adapter(base, folder / "one", 1),
        "two": save_adapter(base, folder / "two", 2, target_modules=["q_proj", "up_proj"]),
        "elsewhere": save_adapter(str(folder / "copy"), folder / "elsewhere", 3),
        "head": save_adapter(base, folder / "head", 4, modules_to_save=["lm_head"]),
    }


def local(variant: Variant, tokenizer: PreTrainedTokenizerFast) -> LocalModel:
    return LocalModel(variant.model, tokenizer, activate=variant.activate)


def test_shared_weights_answer_as_separate_ones(specs: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    store = ModelStore()
    names = ["base", "one", "two", "elsewhere"]
    variants = {name: store.load(specs[name]) for name in names}
    alone = {name: load_model(specs[name]) for name in names}
    models = {name: local(variant, tiny_tokenizer) for name, variant in variants.items()}
    expected = {name: LocalModel(alone[name], tiny_tokenizer, cache=False).predict(QUERIES) for name in names}
    for name in [*names, *reversed(names)]:  # by turns, as a pair does
        for found, right in zip(models[name].predict(QUERIES), expected[name], strict=True):
            assert all(close(a, b) for a, b in zip(found, right, strict=True))
    for i, name in enumerate(names):
        assert not any(close(expected[name][0][0], expected[other][0][0]) for other in names[:i])


def test_there_is_one_set_of_base_weights(specs: dict[str, str]) -> None:
    store = ModelStore()
    names = ["base", "one", "two", "elsewhere"]
    variants = [store.load(specs[name]) for name in names]
    assert len({id(variant.model) for variant in variants}) == 1
    places = {variant.model.get_input_embeddings().weight.data_ptr() for variant in variants}
    own = sum(t.numel() for n, t in variants[0].model.named_parameters() if "lora_" not in n)
    assert len(places) == 1 and own == load_model(specs["base"]).num_parameters()
    for name, variant in zip(names, variants, strict=True):
        assert variant.fingerprint() == weights_fingerprint(load_model(specs[name]))
    assert store.load(specs["one"]) is variants[1]
    assert store.load(specs["one"], dtype="bfloat16").model is not variants[1].model


def test_a_base_that_is_there_already_takes_the_adapters(
    specs: dict[str, str], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    store, network = ModelStore(), load_model(specs["base"])
    expected = LocalModel(network, tiny_tokenizer, cache=False).predict(QUERIES)
    base = store.put("somewhere", network)  # found by its weights, not by its name
    assistant = store.load(specs["one"])
    assert assistant.model is network
    local(assistant, tiny_tokenizer).predict(QUERIES)
    found = local(base, tiny_tokenizer).predict(QUERIES)
    assert all(close(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_a_model_in_two_places_is_loaded_once(
    specs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, placement: Placement) -> PreTrainedModel:
        loaded.append(name)
        return place_model(name, placement)

    monkeypatch.setattr(adapters, "place_model", load)
    copy = str(Path(specs["base"]).with_name("copy"))
    store = ModelStore()
    assert store.load(specs["base"]).model is store.load(copy).model is store.load(specs["elsewhere"]).model
    assert loaded == [specs["base"]]
    # Cut into other files it is told by its values, once it is loaded.
    load_model(copy).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert store.load(str(tmp_path / "cut")).model is store.load(copy).model and len(loaded) == 2
    # The same values, and a configuration that does something else with them.
    shutil.copytree(copy, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert store.load(str(tmp_path / "other")).model is not store.load(copy).model


def test_contents_tell_models_apart_without_loading_them(specs: dict[str, str], tmp_path: Path) -> None:
    copy = Path(specs["base"]).with_name("copy")
    assert contents(specs["base"]) == contents(str(copy)) is not None
    assert len({contents(specs[name]) for name in ("base", "one", "two", "head")}) == 4
    assert contents("calculator") is contents("some/hub-id") is contents(str(tmp_path)) is None
    tiny("llama", seed=1, vocab_size=320).save_pretrained(tmp_path / "other")
    assert contents(str(tmp_path / "other")) != contents(str(copy))


def test_a_model_that_differs_in_one_number_is_another(specs: dict[str, str], tmp_path: Path) -> None:
    """One that was fine-tuned in a few rows looks like its base wherever samples are taken: it was not loaded, and the
    base answered in its stead."""
    network = tiny("llama", vocab_size=4096)
    network.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        network.get_input_embeddings().weight[4000, 5] += 1.0
    network.save_pretrained(tmp_path / "other")
    base, other = str(tmp_path / "base"), str(tmp_path / "other")
    assert contents(base) == contents(other) and not same_files(base, other) and same_files(base, base)
    assert weights_fingerprint(load_model(base)) == weights_fingerprint(load_model(other))
    store = ModelStore()
    first, second = store.load(base).model, store.load(other).model
    assert second.get_input_embeddings().weight[4000, 5] == first.get_input_embeddings().weight[4000, 5] + 1
    # By the files, and by what is in memory.
    store = ModelStore()
    store.put("somewhere", first)
    assert store.load(other).model is not first and store.load(base).model is first


def test_an_adapter_that_changes_more_is_loaded_by_itself(specs: dict[str, str]) -> None:
    store = ModelStore()
    base, other = store.load(specs["base"]), store.load(specs["head"])
    assert other.model is not base.model and other.adapter is None


def test_an_adapter_needs_no_tokenizer_of_its_own(specs: dict[str, str], tmp_path: Path) -> None:
    assert load_tokenizer(specs["one"]).get_vocab() == load_tokenizer(specs["base"]).get_vocab()
    assert load_context_length(specs["one"]) == 256
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CollmError, match="does not name its base model"):
        load_model(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": specs["base"]})
    )
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CollmError, match="pickled"):
        ModelStore().load(str(tmp_path))


def test_a_pair_of_adapters_takes_the_memory_of_one_model(specs: dict[str, str]) -> None:
    llm = CollaborativeLM.from_pretrained(specs["base"], [f"one={specs['one']}", f"two={specs['two']}"])
    params = SamplingParams(max_tokens=12, deferral="random", deferral_rate=0.6)
    apart = CollaborativeLM.from_pretrained(
        specs["base"],
        [LocalModel(load_model(specs[name]), llm.tokenizer, name=name) for name in ("one", "two")],
    )
    for seed in range(4):
        found, expected = (each.generate("abc", replace(params, seed=seed)) for each in (llm, apart))
        assert found.token_ids == expected.token_ids and {1, 2} & {step.author for step in found.steps}
    networks = [model.model for model in llm.models if isinstance(model, LocalModel)]
    assert len(networks) == 3 and len({id(network) for network in networks}) == 1


@pytest.mark.parametrize("assistant", ["other", "one"])
def test_a_base_begins_early_unless_an_adapter_lies_in_its_layers(
    assistant: str, specs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any base that is loaded as it was published could be one of several variants, and did not, whoever assisted."""
    own: list[Machinery] = []

    def machinery(*_: object) -> Machinery:
        own.append(watched())
        return own[-1]

    tiny("llama", vocab_size=320, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    load_tokenizer(specs["base"]).save_pretrained(tmp_path / "other")
    spec = specs.get(assistant, str(tmp_path / "other"))
    plain = CollaborativeLM.from_pretrained(specs["base"], [f"z={spec}"], cache=False)
    monkeypatch.setattr("collm.models.caching.machinery_for", machinery)
    llm = CollaborativeLM.from_pretrained(specs["base"], [f"z={spec}"], max_cache_tokens=800)
    params = SamplingParams(max_tokens=30, deferral="random", threshold=0.4, speculative=False)
    found, expected = (each.generate("abc", params) for each in (llm, plain))
    assert found.token_ids == expected.token_ids and {step.author for step in found.steps} == {0, 1}
    base = llm.models[0]
    assert isinstance(base, LocalModel) and base.graphs[0] is not None and len(own) == 2
    taken = base.graphs[0].counts.taken
    assert taken > 5 if assistant == "other" else not taken
