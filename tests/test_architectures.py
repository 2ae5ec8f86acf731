"""Architectures that are built otherwise than most: they load, score, train and decode, or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedModel,
)

from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scores import load_scores
from collm.data.scoring import score
from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models.backbone import check_project, hidden_states
from collm.models.loading import load_context_length, load_model
from collm.sampling_params import SamplingParams
from collm.training.recipe import parse_recipe
from collm.training.train import train

TEXT = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA4 = {
    **TEXT,
    "intermediate_size_mlp": 64,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 16,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint, as all of Meta's are, whose text model alone is used."""
    folder = tmp_path_factory.mktemp("llama4") / "whole"
    torch.manual_seed(0)
    vision = {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    Llama4ForConditionalGeneration(Llama4Config(text_config=LLAMA4, vision_config=vision)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [{"prompt": f"{n} + 10 = ", "completion": str(n + 10)} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def test_llama4_loads_scores_and_decodes(llama4: Path, rows: Path, tmp_path: Path) -> None:
    model = load_model(str(llama4))
    assert type(model).__name__ == "Llama4ForCausalLM"
    whole = Llama4ForConditionalGeneration.from_pretrained(llama4).eval()
    ids = torch.arange(3, 40)[None]  # further than a chunk of its attention
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    check_project(model)
    formatter = Formatter(make_tokenizer())
    out = score(load_examples(rows), str(llama4), formatter, tmp_path / "scores", progress=False)
    found = load_scores(out)
    item = load_examples(rows)[3]
    encoded = formatter.encode(item)
    with torch.inference_mode():
        log_probs = model(torch.tensor([encoded.token_ids])).logits[0].log_softmax(-1)
    gold = [
        float(log_probs[n - 1, token])
        for n, (token, labelled) in enumerate(zip(encoded.token_ids, encoded.labelled, strict=True))
        if labelled
    ]
    torch.testing.assert_close(torch.tensor(found[3]["log_prob"]), torch.tensor(gold), atol=1e-4, rtol=1e-4)
    llm = CollaborativeLM.from_pretrained(llama4)
    text = llm.generate("3 + 10 = ", SamplingParams(max_tokens=6, deferral="never"))
    prompt = torch.tensor([llm.tokenizer.encode("3 + 10 = ")])
    with torch.inference_mode():
        greedy = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert list(text.token_ids) == greedy[: len(text.token_ids)]


@pytest.mark.parametrize("tune", ["full", "lora", "gate"])
def test_llama4_trains(llama4: Path, rows: Path, tmp_path: Path, tune: str) -> None:
    recipe = {
        "out": str(tmp_path / "run"),
        "base": {"model": str(llama4)},
        "assistants": [{"name": "calculator", "model": "calculator"}],
        "data": {"train": str(rows), "validation_share": 0.25, "max_length": 64},
        "tune": tune,
        "training": {"epochs": 1, "batch_size": 4, "evaluations": 1},
    }
    out = train(parse_recipe(recipe), progress=False)
    llm = CollaborativeLM.from_pretrained(out)
    assert llm.generate("3 + 10 = ", SamplingParams(max_tokens=4, threshold=0.5)).token_ids


def test_context_of_a_multimodal_model(tmp_path: Path) -> None:
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert load_context_length(str(tmp_path)) == 128


def test_what_is_built_in_another_way_is_refused() -> None:
    torch.manual_seed(0)
    config = FalconH1Config(
        **{**TEXT, "num_hidden_layers": 1},
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        lm_head_multiplier=0.1,
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CollmError, match="FalconH1ForCausalLM computes its logits in a way"):
        check_project(model)


def test_no_body_and_no_head_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    assert hidden_states(model, torch.tensor([[1, 2]])).shape == (1, 2, 32)
    with pytest.raises(CollmError, match="in a way that collm does not know"):
        check_project(model)
