"""Models on other devices, on several, or quantised: loaded as the spec says, and they answer as the plain ones."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PreTrainedModel

from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scores import load_info, load_scores
from collm.data.scoring import score
from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models.adapters import ModelStore
from collm.models.attention import Row
from collm.models.backbone import check_project
from collm.models.checkpoint import load_base
from collm.models.contents import contents
from collm.models.devices import (
    input_device,
    is_offloaded,
    is_quantized,
    is_spread,
    layer_devices,
    output_device,
    parameters,
)
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo, save_info
from collm.models.info import load_info as load_checkpoint
from collm.models.kv_pool import KVPool
from collm.models.loading import load_context_length, load_model, load_tokenizer, weights_fingerprint
from collm.models.local import LocalModel
from collm.models.placement import Placement
from collm.models.specs import portable, split_spec
from collm.sampling_params import SamplingParams
from collm.training.checking import check_recipe
from collm.training.recipe import Recipe, parse_recipe
from collm.training.train import train

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placement") / "base"
    make_model("llama", tie_word_embeddings=False, hidden_size=64).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def split(base: Path) -> str:
    """The spec of the model with its second half left on the disk: fetched there for each pass, and dropped again."""
    halves = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    halves |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}
    path = base.parent / "map.json"
    path.write_text(json.dumps(halves))
    return f"{base}?device_map={path}"


@pytest.fixture(scope="module")
def rows(base: Path) -> Path:
    path = base.parent / "rows.jsonl"
    texts = [{"prompt": f"{n} + 10 = ", "completion": str(n + 10)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


# -- what a spec says


def test_settings_of_a_spec(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert split_spec("org/model") == ("org/model", {})
    assert split_spec("org/model?dtype=bfloat16&device_map=auto") == (
        "org/model",
        {"dtype": "bfloat16", "device_map": "auto"},
    )
    assert Placement("bfloat16").of("m?quantization=nf4") == ("m", Placement("bfloat16", quantization="nf4"))
    assert Placement("bfloat16").of("m") == ("m", Placement("bfloat16"))
    (tmp_path / "odd?name=x").mkdir()  # a folder may be called so
    assert split_spec(str(tmp_path / "odd?name=x")) == (str(tmp_path / "odd?name=x"), {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # Straight to its device, not through the host.
    assert Placement("bfloat16", "cuda:1").arguments() == {"dtype": torch.bfloat16, "device_map": {"": "cuda:1"}}
    assert Placement(device_map="balanced").arguments()["device_map"] == "balanced"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("dtyp=bfloat16", "after the . stand dtype=..., device=..., device_map=..., quantization="),
        ("", "after the . stand"),
        ("dtype=int3", "dtype is one of float32, bfloat16, float16"),
        ("device=toaster", "no kind of device 'toaster'"),
        ("device_map=autom", r"device_map is one of auto, .* or a \.json file, not 'autom' \(did you mean 'auto'"),
        ("quantization=int4", "quantization is one of int8, nf4, not 'int4'"),
        ("device=cpu&device_map=auto", "give one of the two"),
        ("device_map=nowhere.json", "there is no file nowhere.json"),
    ],
)
def test_settings_that_are_unknown(base: Path, settings: str, message: str) -> None:
    with pytest.raises(CollmError, match=message):
        load_model(f"{base}?{settings}")


def test_all_that_reads_a_spec_takes_settings(base: Path) -> None:
    spec = f"{base}?dtype=bfloat16"
    assert load_model(spec).dtype == torch.bfloat16
    assert load_tokenizer(spec).get_vocab() == load_tokenizer(str(base)).get_vocab()
    assert load_context_length(spec) == load_context_length(str(base)) == 256
    assert contents(spec) == contents(str(base)) is not None
    assert ModelStore().load(spec).model.dtype == torch.bfloat16
    assert CollaborativeLM.from_pretrained(spec).path == base
    with pytest.raises(CollmError, match=r"GGUF.*brings its own quantisation"):
        (base.parent / "x.gguf").write_bytes(b"GGUF")
        load_model(f"{base.parent / 'x.gguf'}?quantization=nf4")


# -- parts in several places


def test_a_split_model_is_the_whole_one(base: Path, split: str, rows: Path, tmp_path: Path) -> None:
    whole, parts = load_model(str(base)), load_model(split)
    assert is_spread(parts) and is_offloaded(parts) and not is_spread(whole)
    assert {tensor.device.type for tensor in parts.parameters()} == {"cpu", "meta"}
    assert torch.equal(logits(parts), logits(whole))
    assert input_device(parts) == output_device(parts) == torch.device("cpu")
    check_project(parts)
    # The same weights, though half of them are in no memory.
    assert weights_fingerprint(parts) == weights_fingerprint(whole)
    stored = dict(whole.named_parameters())
    assert all(torch.equal(tensor, stored[name]) for name, tensor in parameters(parts))
    formatter = Formatter(load_tokenizer(str(base)))
    found = [
        score(load_examples(rows), model, formatter, tmp_path / name, progress=False)
        for name, model in (("whole", whole), ("split", split))
    ]
    assert load_info(found[0])["fingerprint"] == load_info(found[1])["fingerprint"]
    assert load_scores(found[0])["log_prob"][:] == load_scores(found[1])["log_prob"][:]


def test_a_split_system_writes_what_the_whole_one_does(base: Path, split: str, tmp_path: Path) -> None:
    make_model("llama", seed=3).save_pretrained(tmp_path / "helper")
    make_tokenizer().save_pretrained(tmp_path / "helper")
    head = DeferralHead(64, 1)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    head.save(tmp_path / "pair")
    assistants = [AssistantInfo(name="helper", spec=str(tmp_path / "helper"))]
    save_info(tmp_path / "pair", CheckpointInfo(kind="gate", base_model=str(base), assistants=assistants))
    params = SamplingParams(max_tokens=12, threshold=0.5)
    whole = CollaborativeLM.from_pretrained(tmp_path / "pair").generate("3 + 10 = ", params)
    assert {step.author for step in whole.steps} == {0, 1}
    parts = CollaborativeLM.from_pretrained(tmp_path / "pair", base=split)
    assert parts.generate("3 + 10 = ", params).token_ids == whole.token_ids
    # With caches, as everywhere.
    assert isinstance(parts.models[0], LocalModel) and parts.models[0].cache_bytes > 0
    # As an assistant, of a plain base.
    shutil.copytree(tmp_path / "helper", tmp_path / "other")
    helped = CollaborativeLM.from_pretrained(tmp_path / "other", [split])
    plain = CollaborativeLM.from_pretrained(tmp_path / "other", [str(base)])
    params = SamplingParams(max_tokens=8, deferral="random", deferral_rate=0.5)
    assert helped.generate("3 + ", params).token_ids == plain.generate("3 + ", params).token_ids


class OneDevice(TorchDispatchMode):
    """Refuses what a machine with several devices refuses, copies aside."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        assert "copy" in func.__name__ or len({t.device for t in tensors}) <= 1, func
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_the_pool_lies_where_the_layers_do() -> None:
    """The second device has no memory, so nothing can be read there; but tensors know where they are."""
    first, second = torch.device("cpu"), torch.device("meta")
    model = make_model("gemma3_text")
    backbone: Any = model.base_model
    for module in (backbone.layers[1], backbone.norm):
        module.to(second)
        module._hf_hook = SimpleNamespace(weights_map=None, execution_device=second)
        module.register_forward_pre_hook(_moved(second), with_kwargs=True)
    assert layer_devices(model) == [first, second]
    pool = KVPool(model)
    pool.resize([], 4, 64)
    rows = [Row(0, 20, 1), Row(2, 9, 1), Row(1, 0, 7), Row(3, 3, 7)]
    with OneDevice():
        hidden, more = pool.forward(rows, list(range(16)), [1, 2, 3])
        pool.copy(0, 3, 12)
        pool.clear(2)
        pool.resize([1, 0], 4, 128)
    assert (hidden.shape, hidden.device, more.device) == ((16, 32), second, first)
    assert [tensor.device for pair in pool._stored for tensor in pair or ()] == [first, first, second, second]


def _moved(device: torch.device) -> Any:
    """What accelerate's hooks do: tensors go to where the module lies."""

    def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))

    return hook


def recipe(out: Path, rows: Path, base: str, assistant: str, tune: str) -> Recipe:
    values: dict[str, Any] = {
        "out": str(out),
        "base": {"model": base},
        "assistants": [{"name": "helper", "model": assistant}],
        "data": {"train": str(rows), "validation_share": 0.25, "max_length": 64},
        "tune": tune,
        "training": {"epochs": 2, "batch_size": 4, "evaluations": 1},
    }
    return parse_recipe(values)


def test_a_gate_of_a_split_base(base: Path, split: str, rows: Path, tmp_path: Path) -> None:
    whole = train(recipe(tmp_path / "whole", rows, str(base), str(base), "gate"), progress=False)
    parts = train(recipe(tmp_path / "parts", rows, split, split, "gate"), progress=False)
    gates = [DeferralHead.load(folder).state_dict() for folder in (whole, parts)]
    torch.testing.assert_close(gates[0], gates[1])
    info = load_checkpoint(parts)
    assert info is not None
    # Another machine has other devices.
    assert (info.base_model, info.assistants[0].spec) == (str(base), str(base))
    assert portable(f"{base}?device_map=auto&quantization=nf4&dtype=bfloat16") == f"{base}?quantization=nf4"


def test_a_base_that_is_trained_has_no_map(base: Path, split: str, rows: Path, tmp_path: Path) -> None:
    for spec in (split, f"{base}?quantization=nf4"):
        with pytest.raises(CollmError, match=r"base\.model: (device_map|quantization) is for models that stay"):
            check_recipe(recipe(tmp_path, rows, spec, str(base), "full"))
    with pytest.raises(CollmError, match="base: .*after the . stand dtype"):
        check_recipe(recipe(tmp_path, rows, f"{base}?devicemap=auto", str(base), "gate"))


def test_a_base_that_is_trained_is_no_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    """Training put new matrices in the place of the adapter's (lora), or kept what nothing loads (full)."""
    folder = tmp_path / "adapter"
    get_peft_model(load_model(str(base)), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(folder)
    for tune in ("lora", "full"):
        with pytest.raises(CollmError, match=f"adapter is an adapter, which tune: {tune} would not keep: merge it"):
            check_recipe(recipe(tmp_path, rows, str(folder), str(base), tune))
    check_recipe(recipe(tmp_path, rows, str(folder), str(base), "gate"))


def test_an_adapter_wants_its_base_in_memory(base: Path, split: str, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(str(base)), config).save_pretrained(tmp_path)
    settings = split.partition("?")[2]
    with pytest.raises(CollmError, match="an adapter needs its base in memory"):
        load_model(f"{tmp_path}?{settings}")


# -- quantised


quantized = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (extra quantized) is not installed"
)


def test_without_the_package_it_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        load_model(f"{base}?quantization=nf4")
    assert raised.value.name == "accelerate"


@quantized
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_models(base: Path, rows: Path, tmp_path: Path, kind: str, dtype: str) -> None:
    spec = f"{base}?quantization={kind}"
    model = load_model(spec, dtype=dtype)
    assert is_quantized(model) and not is_quantized(load_model(str(base)))
    exact, found = logits(load_model(str(base))), logits(model).float()
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < {"int8": 0.05, "nf4": 0.6}[kind]  # of random weights, wide and without outliers
    check_project(model)
    assert weights_fingerprint(model) == weights_fingerprint(load_model(spec, dtype=dtype))
    assert weights_fingerprint(model) != weights_fingerprint(load_model(str(base), dtype=dtype))
    out = score(
        load_examples(rows), spec, Formatter(load_tokenizer(spec)), tmp_path / "scores", dtype=dtype, progress=False
    )
    assert all(torch.tensor(row).isfinite().all() for row in load_scores(out)["log_prob"])
    llm = CollaborativeLM.from_pretrained(spec, dtype=dtype)
    text = llm.generate("3 + 10 = ", SamplingParams(max_tokens=6, deferral="never"))
    prompt = torch.tensor([llm.tokenizer.encode("3 + 10 = ")])
    with torch.inference_mode():
        greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    if dtype == "float32" and kind == "nf4":  # int8 rounds by what else is in the batch, bfloat16 has ties
        assert list(text.token_ids) == greedy[: len(text.token_ids)]


@quantized
def test_a_quantised_base_keeps_its_adapter_beside_it(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain: Any = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(plain, config).save_pretrained(tmp_path / "lora")
    save_info(tmp_path / "lora", CheckpointInfo(kind="lora", base_model=str(base)))
    spec = f"{base}?quantization=nf4"
    model, _, _, _ = load_base(tmp_path / "lora", base=spec)
    assert is_quantized(model) and any("lora_A" in name for name, _ in model.named_parameters())
    exact = logits(load_base(tmp_path / "lora")[0])
    without = (logits(load_model(spec)) - exact).norm()
    assert (logits(model) - exact).norm() < 0.5 * without
    # As an assistant beside its quantised base, with one set of weights.
    store = ModelStore()
    assistant, bare = store.load(f"{tmp_path / 'lora'}?quantization=nf4"), store.load(spec)
    assert assistant.model is bare.model
    assistant.activate()
    torch.testing.assert_close(logits(assistant.model), logits(model))
    bare.activate()
    torch.testing.assert_close(logits(bare.model), logits(load_model(spec)))
