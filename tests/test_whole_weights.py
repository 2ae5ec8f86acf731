"""What is loaded is what was meant: no tensor is made up or dropped, whatever the files are like."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from collm.errors import CollmError
from collm.models.adapters import ModelStore
from collm.models.attaching import attach
from collm.models.checkpoint import load_base
from collm.models.guard import gaps
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo, save_info
from collm.models.loading import eos_ids, load_context_length, load_model, load_tokenizer

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose output head is its embedding, and so is not in the file."""
    folder = tmp_path_factory.mktemp("whole") / "base"
    make_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def rewrite(path: Path, change: Change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def saved(folder: Path, kind: str, **settings: Any) -> Path:
    """A tiny model of any architecture."""
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **{**shape, "max_position_embeddings": 64, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def same(folder: Path, twin: PreTrainedModel) -> bool:
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        return bool(torch.equal(load_model(str(folder))(ids).logits, twin.eval()(ids).logits))


# -- models


def without_a_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}


def with_a_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without_a_layer, {}, r"lacks tensors.*at random: model\.layers\.1\.input_layernorm.*\(9 in all\)"),
        (with_a_bias, {}, r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (dict, {"num_hidden_layers": 1}, r"no place for: model\.layers\.1\.input_layernorm\.weight"),
        (dict, {"num_hidden_layers": 3}, r"at random: model\.layers\.2\.input_layernorm\.weight"),
        (dict, {"vocab_size": 500}, r"another shape.*model\.embed_tokens\.weight 320x32 there, 500x32 here"),
        (dict, {"intermediate_size": 48}, r"another shape.*down_proj\.weight 32x64 there, 32x48 here"),
        (dict, {"tie_word_embeddings": False}, r"at random: lm_head\.weight"),
        (dict, {"model_type": "qwen2"}, r"at random: .*k_proj\.bias"),
    ],
)
def test_tensors_that_do_not_fit(copy: Path, change: Change, config: dict[str, Any], message: str) -> None:
    rewrite(copy / "model.safetensors", change)
    configure(copy, **config)
    for load in (load_model, ModelStore().load, load_base):
        with pytest.raises(CollmError, match=message) as raised:
            load(str(copy))
        assert str(copy / "model.safetensors") in str(raised.value) and "\n" not in str(raised.value)


def test_a_tied_head_and_old_constants_are_no_faults(copy: Path, base: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(base)
    assert "lm_head.weight" not in load_file(base / "model.safetensors") and same(base, twin)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(copy / "model.safetensors", lambda t: t | more | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    assert same(copy, twin)


@pytest.mark.parametrize(
    ("kind", "prefix", "constants"),
    [
        ("gpt2", "transformer.", ["h.0.attn.bias", "h.0.attn.masked_bias"]),
        ("gpt_neox", "", [f"gpt_neox.layers.1.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_files_of_older_versions_load(tmp_path: Path, kind: str, prefix: str, constants: list[str]) -> None:
    folder = saved(tmp_path / kind, kind)
    twin = AutoModelForCausalLM.from_pretrained(folder)

    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in tensors.items()} | {name: torch.ones(1, 1) for name in constants}

    rewrite(folder / "model.safetensors", age)
    assert same(folder, twin)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    settings = {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 3}
    folder = saved(tmp_path / "mixtral", "mixtral", **settings)
    assert same(folder, AutoModelForCausalLM.from_pretrained(folder))
    names = list(load_file(folder / "model.safetensors"))
    assert not gaps(names)
    gone = next(name for name in names if "layers.1." in name and "experts.2.w1" in name)
    rewrite(folder / "model.safetensors", lambda t: {name: tensor for name, tensor in t.items() if name != gone})
    with pytest.raises(CollmError, match=f"model.safetensors lacks tensors of the model: {gone};"):
        load_model(str(folder))


def test_shards(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert same(tmp_path, model)
    first, *_ = shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    with pytest.raises(CollmError, match=rf"{first} has .* bytes of .*cut off"):
        load_model(str(tmp_path))
    first.unlink()
    with pytest.raises(CollmError, match=f"lacks {first.name}, which model.safetensors.index.json names"):
        load_model(str(tmp_path))
    first.write_bytes(whole)
    # The list names a tensor that its shard does not have.
    rewrite(shards[-1], lambda t: dict(list(t.items())[1:]))
    with pytest.raises(CollmError, match="lacks tensors of the model"):
        load_model(str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    del told["metadata"]
    for damaged in ({}, told):
        index.write_text(json.dumps(damaged))
        with pytest.raises(CollmError, match=r"index\.json is damaged"):
            load_model(str(tmp_path))
    outside = {"metadata": {}, "weight_map": {"a": f"../{tmp_path.name}/{shards[-1].name}"}}
    index.write_text(json.dumps(outside))
    with pytest.raises(CollmError, match="lies outside of its folder"):
        load_model(str(tmp_path))


def test_threads_load_whole_models(base: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(base)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda _: same(base, twin), range(8)))


# -- damaged files


def half(path: Path) -> bytes:
    return path.read_bytes()[: path.stat().st_size // 2]


DAMAGE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pointer": (lambda _: LFS, "pointer of Git LFS.*git lfs pull"),
    "empty": (lambda _: b"", "is empty"),
    "half": (half, "cut off"),
    "headless": (lambda p: p.read_bytes()[8:], "beginning is damaged"),
    "foreign": (lambda _: b"PK\x03\x04 something else", "no safetensors file"),
    "short": (lambda _: b"abc", "no safetensors file"),
    "list": (lambda _: struct.pack("<Q", 2) + b"[]", "no safetensors file"),
    "longer": (lambda p: p.read_bytes() + b"tail", "bytes of"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "gate.safetensors"])
def test_damaged_weights(base: Path, tmp_path: Path, damage: str, name: str) -> None:
    folder, load = tmp_path / "folder", load_model
    if name == "model.safetensors":
        shutil.copytree(base, folder)
    elif name == "adapter_model.safetensors":
        adapter(base, folder)
    else:
        gated(base, folder)
        load = load_base  # type: ignore[assignment]
    content, message = DAMAGE[damage]
    (folder / name).write_bytes(content(folder / name))
    with pytest.raises(CollmError, match=message) as raised:
        load(str(folder))
    assert str(folder / name) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "damaged"), (b"\xff\xfe", "damaged"), (LFS, "Git LFS|damaged")]
)
def test_damaged_descriptions(base: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = tmp_path / "folder"
    if name == "adapter_config.json":
        adapter(base, folder)
    else:
        shutil.copytree(base, folder)
    (folder / name).write_bytes(content)
    for load in [load_tokenizer] if "tokenizer" in name else [load_model, load_context_length]:
        with pytest.raises(CollmError, match=f"{folder / name}.*({message})"):
            load(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[2]", LFS])
def test_a_damaged_generation_config(copy: Path, content: bytes) -> None:
    """transformers passes over it, and texts would end elsewhere."""
    (copy / "generation_config.json").write_bytes(content)
    with pytest.raises(CollmError, match=r"generation_config\.json (is|has)"):
        load_model(str(copy))


@pytest.mark.parametrize("value", ["</s>", [2, "x"], 2.5, True, {"a": 1}, [[2]]], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_what_ends_a_text_is_an_id_or_several(copy: Path, name: str, value: Any) -> None:
    if name == "config.json":
        (copy / "generation_config.json").unlink()
    path = copy / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": value}))
    with pytest.raises(CollmError) as caught:
        eos_ids(load_model(str(copy)), make_tokenizer())
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff{{", LFS])
def test_a_chat_template_that_is_no_text(copy: Path, content: bytes) -> None:
    (copy / "chat_template.jinja").write_bytes(content)
    with pytest.raises(CollmError, match=r"chat_template\.jinja.*(is empty|not UTF-8|Git LFS)"):
        load_tokenizer(str(copy))


def test_the_context_of_a_model_of_several_senses_is_that_of_its_text(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3", text_config={"max_position_embeddings": 777}).save_pretrained(tmp_path)
    assert load_context_length(str(tmp_path)) == 777


def test_architectures_that_write_no_text(copy: Path) -> None:
    configure(copy, model_type="t5")
    with pytest.raises(CollmError, match="does not load a t5 as a causal language model"):
        load_model(str(copy))


# -- adapters


def adapter(base: Path, folder: Path, change: Change | None = None, **settings: Any) -> Path:
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **settings}
    get_peft_model(load_model(str(base)), LoraConfig(**options)).save_pretrained(folder)
    if change is not None:
        rewrite(folder / "adapter_model.safetensors", change)
    return folder


def as_checkpoint(folder: Path, base: Path) -> Path:
    save_info(folder, CheckpointInfo(kind="lora", base_model=str(base)))
    return folder


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("model.model.layers", "model.model.language_model.layers"): t for n, t in tensors.items()}


def one_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t for n, t in tensors.items() if "layers.1." not in n}


def a_third_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {n.replace("layers.1.", "layers.2."): t.clone() for n, t in tensors.items() if "layers.1." in n}


def narrower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t[:, :16].contiguous() if "lora_A" in n else t for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            renamed,
            r"no place: base_model\.model\.model\.language_model\..*; it has nothing for .*self_attn\.q_proj\.lora_A",
        ),
        (one_layer, r"nothing for these places: base_model\.model\.model\.layers\.1\."),
        (a_third_layer, r"no place: base_model\.model\.model\.layers\.2\.self_attn\.q_proj\.lora_A\.weight"),
        (narrower, r"another shape.*q_proj\.lora_A\.weight \[4, 16\] there, \[4, 32\] here"),
    ],
)
def test_adapters_that_do_not_fit(base: Path, tmp_path: Path, change: Change, message: str) -> None:
    good, bad = adapter(base, tmp_path / "good"), adapter(base, tmp_path / "bad", change)
    store = ModelStore()
    for load in (load_model, store.load):
        with pytest.raises(CollmError, match=f"{bad / 'adapter_model.safetensors'}.*{message}"):
            load(str(bad))
    as_checkpoint(bad, base)
    with pytest.raises(CollmError, match=message):
        load_base(bad)
    # Behind one that fits, too; and what was refused leaves no trace.
    ids = torch.arange(3, 20)[None]
    with torch.inference_mode():
        variant = store.load(str(good))
        variant.activate()
        expected = load_model(str(good))(ids).logits
        assert torch.equal(variant.model(ids).logits, expected)
        with pytest.raises(CollmError, match=message):
            store.load(str(bad), dtype="float32", device="cpu")
        assert torch.equal(variant.model(ids).logits, expected)
        store.load(str(base)).activate()
        assert torch.equal(variant.model(ids).logits, load_model(str(base))(ids).logits)


def test_an_adapter_that_waits_to_be_invoked_is_refused(base: Path, tmp_path: Path) -> None:
    """Without its invocation tokens it would be the base, and nothing said."""
    folder = adapter(base, tmp_path / "adapter", alora_invocation_tokens=[5, 6])
    for load in (load_model, ModelStore().load):
        with pytest.raises(CollmError, match="activated LoRA"):
            load(str(folder))
    as_checkpoint(folder, base)
    with pytest.raises(CollmError, match="activated LoRA"):
        load_base(folder)


def test_an_adapter_on_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    """The second took the first one's place in the layers: what was left was neither, and nothing said."""
    first = adapter(base, tmp_path / "first")
    second = adapter(base, tmp_path / "second")
    told = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(first)}))
    other = as_checkpoint(adapter(base, tmp_path / "other"), first)
    for load in (load_model, ModelStore().load, load_base):
        with pytest.raises(CollmError, match=r"second is an adapter whose base is an adapter itself; merge"):
            load(str(second))
    with pytest.raises(CollmError, match=r"other is an adapter whose base is an adapter itself"):
        load_base(other)
    load_model(str(first))


def test_prompts_that_were_learnt_are_no_part_of_the_layers(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    get_peft_model(
        load_model(str(base)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    ).save_pretrained(folder)
    with pytest.raises(CollmError, match="prompts is an adapter of kind .*PROMPT_TUNING: it is put before the text"):
        load_model(str(folder))


def test_an_adapter_of_a_wider_base(base: Path, tmp_path: Path) -> None:
    make_model("llama", hidden_size=48, head_dim=8).save_pretrained(tmp_path / "wide")
    folder = adapter(tmp_path / "wide", tmp_path / "adapter")
    configure(folder, "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(CollmError, match=r"another shape.*\[4, 48\] there, \[4, 32\] here.*does not fit its base"):
        load_model(str(folder))
    configure(folder, "adapter_config.json", target_modules=["query_key_value"])
    with pytest.raises(CollmError, match=r"could not load the adapter .*query_key_value.*not found"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": "all-linear"},
        {"rank_pattern": {"q_proj": 2}},
        {"layers_to_transform": [0]},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_all_kinds_of_lora_load_as_peft_does(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel

    folder = adapter(base, tmp_path / "adapter", **settings)
    ids = torch.arange(2, 20)[None]
    with torch.inference_mode():
        twin = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
        expected = twin(ids).logits
        assert torch.equal(load_model(str(folder))(ids).logits, expected)
        variant = ModelStore().load(str(folder))
        variant.activate()
        assert torch.equal(variant.model(ids).logits, expected)
        assert not torch.allclose(load_model(str(base))(ids).logits, expected)


def test_a_saved_module_that_is_missing(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "a", modules_to_save=["lm_head"])
    rewrite(folder / "adapter_model.safetensors", lambda t: {n: v for n, v in t.items() if "lm_head" not in n})
    with pytest.raises(CollmError, match=r"adapter_model\.safetensors lacks base_model\.model\.lm_head\.weight"):
        load_model(str(folder))


def test_an_adapter_without_safe_weights(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CollmError, match=r"has no adapter_model\.safetensors"):
        load_model(str(folder))
    # PEFT would unpickle it; that another safetensors file lies beside it changes nothing.
    torch.save(tensors, folder / "adapter_model.bin")
    DeferralHead(32, 1).save(folder)
    with pytest.raises(CollmError, match=r"has no adapter_model\.safetensors"):
        load_base(as_checkpoint(folder, base))


def test_settings_that_peft_does_not_know_are_told(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "a")
    configure(folder, "adapter_config.json", use_next_years_lora=True)
    with pytest.warns(UserWarning, match=r"adapter_config\.json: .*use_next_years_lora"):
        load_model(str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(load_model(str(base)), str(adapter(base, tmp_path / "b")))


# -- gates


def gated(base: Path, folder: Path) -> Path:
    DeferralHead(32, 1).save(folder)
    save_info(folder, CheckpointInfo(kind="gate", base_model=str(base), assistants=[AssistantInfo(name="x", spec="y")]))
    return folder


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": torch.zeros(1, 16), "bias": torch.zeros(1)}, "width 16.*has 32"),
        ({"weight": torch.zeros(2, 32), "bias": torch.zeros(2)}, "is for 2 assistants.*names 1"),
        ({"weight": torch.zeros(1, 32)}, "no gate.*holds weight 1x32"),
        ({"weight": torch.zeros(1, 32), "bias": torch.zeros(2)}, "no gate.*bias 2, weight 1x32"),
        ({"weight": torch.zeros(32), "bias": torch.zeros(1)}, "no gate"),
        ({"weight": torch.zeros(1, 32), "bias": torch.zeros(1), "scale": torch.zeros(1)}, "no gate.*scale"),
        ({"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)}, "NaN"),
    ],
)
def test_gates_of_another_shape(base: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    folder = gated(base, tmp_path / "gate")
    assert load_base(folder)[1] is not None
    save_file(tensors, folder / "gate.safetensors")
    with pytest.raises(CollmError, match=rf"gate\.safetensors.*{message}"):
        load_base(folder)
