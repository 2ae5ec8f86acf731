"""What a GGUF file says of computing reaches the model, or the file is refused: angles, biases, caps, every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from gguf_files import add_tokenizer, write_gguf
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.gguf.conversion import load_config
from collm.models.loading import load_model, load_tokenizer

THETA, HEAD, CONTEXT = 10000.0, 16, 512
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLM_CACHE", str(tmp_path / "cache"))


def llama(vocab_size: int, **settings: Any) -> LlamaForCausalLM:
    """With weights that make something of angles and biases."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    config = LlamaConfig(**{**config.to_dict(), **sizes, "head_dim": HEAD, **settings})
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or name.endswith("bias"):
            parameter.data.normal_(std=0.1 if parameter.ndim == 2 else 1.0)
    return model


def divisors(model: LlamaForCausalLM) -> np.ndarray[Any, Any]:
    """As llama.cpp's converter writes them for Llama 3.1 and later."""
    plain = THETA ** (-torch.arange(0, HEAD, 2) / HEAD)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)  # type: ignore[union-attr]


def scaled(kind: gguf.RopeScalingType, original: int | None = None) -> Callable[[Any, LlamaForCausalLM], None]:
    def add(writer: Any, _: LlamaForCausalLM) -> None:
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return add


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("settings", "add"),
    [
        ({"rope": {"rope_type": "llama3", **LLAMA3}}, lambda w, m: w.add_tensor("rope_freqs.weight", divisors(m))),
        ({}, lambda w, m: w.add_tensor("rope_freqs.weight", np.ones(HEAD // 2, np.float32))),
        ({"rope": {"rope_type": "linear", "factor": 4.0}}, scaled(gguf.RopeScalingType.LINEAR)),
        ({"rope": YARN}, scaled(gguf.RopeScalingType.YARN, 128)),
        ({}, scaled(gguf.RopeScalingType.NONE)),
        ({"attention_bias": True}, lambda w, m: None),
        ({"mlp_bias": True}, lambda w, m: None),
    ],
    ids=["llama3", "ones", "linear", "yarn", "none", "attention bias", "mlp bias"],
)
def test_the_model_is_the_one_that_was_written(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    settings: dict[str, Any],
    add: Callable[[Any, LlamaForCausalLM], None],
) -> None:
    """transformers reads none of it, and says nothing: laws were off by ten nats and more."""
    rope = {"rope_theta": THETA, **settings.pop("rope", {"rope_type": "default"})}
    model = llama(len(tokenizer), rope_parameters=rope, **settings)
    path = write_gguf(tmp_path / "a.gguf", model, tokenizer, add=lambda writer: add(writer, model))
    ids = torch.randint(0, len(tokenizer), (1, 300), generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # from the file, and as it is kept
        loaded = load_model(str(path))
        with torch.no_grad():
            off = (loaded(ids).logits.log_softmax(-1) - model(ids).logits.log_softmax(-1)).abs().max()
        assert off < 0.3  # Q8_0


def test_angles_of_no_known_kind_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = np.linspace(1, 7, HEAD // 2, dtype=np.float32)
    model = llama(len(tokenizer))
    path = write_gguf(
        tmp_path / "a.gguf", model, tokenizer, add=lambda writer: writer.add_tensor("rope_freqs.weight", own)
    )
    with pytest.raises(CollmError, match=r"a\.gguf: its angles \(rope_freqs\.weight\) are of a kind"):
        load_model(str(path))


@pytest.mark.parametrize("name", ["blk.1.attn_q_norm.weight", "blk.0.attn_sub_norm.weight"])
def test_a_tensor_without_a_place_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str) -> None:
    """transformers drops it, and what is left is another model."""
    norm = np.full(HEAD, 2, np.float32)
    path = write_gguf(
        tmp_path / "a.gguf", llama(len(tokenizer)), tokenizer, add=lambda writer: writer.add_tensor(name, norm)
    )
    with pytest.raises(CollmError, match=f"no place for: {name}. Without them it would be another model"):
        load_model(str(path))


def described(path: Path, kind: str, tokenizer: PreTrainedTokenizerFast | None, add: Callable[[Any], None]) -> Path:
    """A file of sizes and of what `add` says besides, without weights; a tokenizer, or pieces of SentencePiece."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(131072)
    writer.add_embedding_length(128)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    if tokenizer is None:
        add_pieces(writer)
    else:
        add_tokenizer(writer, tokenizer, "smollm")
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PIECES = {"\u2581": -9, "a": -8, "b": -8, "c": -8, "\u2581a": -2, "ab": -1, "\u2581ab": -0.5}
"""With their scores."""


def add_pieces(writer: Any) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [float(score) for score in PIECES.values()])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.mark.parametrize(
    ("prefixed", "wanted"),
    [(None, ["\u2581ab", "\u2581", "c"]), (True, ["\u2581ab", "\u2581", "c"]), (False, ["ab", "\u2581", "c"])],
)
def test_a_text_begins_with_a_space_where_the_file_says_so(
    tmp_path: Path, prefixed: bool | None, wanted: list[str]
) -> None:
    """transformers reads the flag, and puts a space before each text whatever it says."""

    def add(writer: Any) -> None:
        writer.add_block_count(1)
        if prefixed is not None:
            writer.add_add_space_prefix(prefixed)

    path = described(tmp_path / "a.gguf", "llama", None, add)
    for _ in range(2):  # from the file, and as it is kept
        tokenizer = load_tokenizer(str(path))
        assert tokenizer.tokenize("ab c") == wanted
        assert tokenizer.decode(tokenizer("ab \u00e9", add_special_tokens=False).input_ids) == "ab \u00e9"
        if prefixed is False:
            assert tokenizer.decode(tokenizer(" ab", add_special_tokens=False).input_ids) == " ab"


def test_phi_has_its_factors_and_turns_a_part_of_each_head(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Phi-4-mini: 24 of 32 places of a head are turned, by factors for short texts and for long ones."""
    long, short = (np.linspace(1, last, 12, dtype=np.float32) for last in (40, 2))

    def add(writer: Any) -> None:
        writer.add_block_count(2)
        writer.add_rope_dimension_count(24)
        writer.add_rope_freq_base(50000.0)
        writer.add_rope_scaling_orig_ctx_len(4096)
        writer.add_rope_scaling_attn_factors(1.19)
        writer.add_sliding_window(2047)
        writer.add_tensor("rope_factors_long.weight", long)
        writer.add_tensor("rope_factors_short.weight", short)

    config: Any = load_config(described(tmp_path / "phi.gguf", "phi3", tokenizer, add))
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["partial_rotary_factor"], rope["rope_theta"]) == ("longrope", 0.75, 50000.0)
    assert rope["original_max_position_embeddings"] == 4096 and math.isclose(
        rope["attention_factor"], 1.19, rel_tol=1e-6
    )
    assert np.allclose(rope["long_factor"], long) and np.allclose(rope["short_factor"], short)
    assert config.sliding_window == 2047


def test_starcoder_turns_by_its_own_base(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_block_count(2)
        writer.add_rope_freq_base(999999.4375)

    config: Any = load_config(described(tmp_path / "a.gguf", "starcoder2", tokenizer, add))
    assert config.rope_parameters["rope_theta"] == 999999.4375


@pytest.mark.parametrize(("kind", "layers", "scale"), [("gemma2", 46, 32), ("gemma2", 42, 256), ("gemma3", 62, 32)])
def test_gemma_is_scaled_and_capped_as_its_file_says(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, kind: str, layers: int, scale: int
) -> None:
    """The 27B are scaled by the width of a head's share, all others by 256; Gemma 3 turns the wide layers slower."""

    def add(writer: Any) -> None:
        writer.add_block_count(layers)
        writer.add_key_length(48)
        writer.add_final_logit_softcapping(20.0)
        if kind == "gemma3":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(8.0)

    config: Any = load_config(described(tmp_path / "a.gguf", kind, tokenizer, add))
    assert config.query_pre_attn_scalar == scale
    assert config.final_logit_softcapping == 20.0
    if kind == "gemma3":
        assert config.rope_parameters["full_attention"]["factor"] == 8.0
        assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"
