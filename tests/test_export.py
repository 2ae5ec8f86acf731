"""Exported checkpoints: gate and laws as in the original, through plain transformers; tokenizer and matrix agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_model, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from collm.cli import main
from collm.errors import CollmError
from collm.gate import log_gate
from collm.models.checkpoint import load_base, save_checkpoint
from collm.models.export import ZERO_TOKEN, defer_tokens, export, read_logits
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo, load_info
from collm.models.served import ServedInfo
from collm.models.tokenizers import shared_vocab_size

NEVER_ROW = {"target_rate": 0.0, "achieved_rate": 0.0, "threshold": 1.0, "log_odds": float("inf"), "metric_value": 0.5}
ROW = {"target_rate": 0.3, "achieved_rate": 0.31, "threshold": 0.6, "log_odds": 0.4, "metric_value": 0.5}
TABLE = CalibrationTable(
    task="gsm8k", metric="accuracy", seed=0, num_prompts=4, rows=[CalibrationRow(**NEVER_ROW), CalibrationRow(**ROW)]
)
PROMPT = torch.tensor([[1, 40, 41, 42, 7, 300, 9, 77, 120]])


def head(num_assistants: int, size: float = 2.0) -> DeferralHead:
    """Scores far from 0, with biases that bring them back: what folding a standardisation into theta gives."""
    torch.manual_seed(3)
    made = DeferralHead(32, num_assistants)
    torch.nn.init.normal_(made.weight, std=size)
    torch.nn.init.normal_(made.bias, std=size)
    return made


def checkpoint(folder: Path, model: PreTrainedModel, num_assistants: int = 1, **settings: Any) -> Path:
    info = CheckpointInfo(
        assistants=[AssistantInfo(name=f"expert{k}", spec="nowhere") for k in range(num_assistants)],
        base_format={"system_prompt": "Be brief."},
        calibration=[TABLE],
        **settings,
    )
    save_checkpoint(folder, info, model, head(num_assistants), make_tokenizer())
    return folder


def original(folder: Path, ids: torch.Tensor, base: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The law and the gate as this package finds them in a checkpoint."""
    model, gate, tokenizer, _ = load_base(folder, base=base)
    assert gate is not None
    with torch.inference_mode():
        out = model(ids, output_hidden_states=True)
        law = torch.log_softmax(out.logits[0, :, : shared_vocab_size(tokenizer)].float(), dim=-1)
        return law, log_gate(gate(out.hidden_states[-1][0]))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_assistants", [1, 2])
@pytest.mark.parametrize(("kind", "rows"), [("llama", 320), ("qwen3", 384), ("qwen3", 321), ("gemma3_text", 320)])
def test_gate_and_law_are_the_original_s(tmp_path: Path, kind: str, rows: int, num_assistants: int, tied: bool) -> None:
    """320 tokens: without padding, with enough of it, and with less than the deferral tokens need."""
    model = make_model(kind, vocab_size=rows, tie_word_embeddings=tied)
    ckpt = checkpoint(tmp_path / "ckpt", model, num_assistants)
    done = export(ckpt, tmp_path / "out")
    law, gate = original(ckpt, PROMPT)

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    served = ServedInfo.from_config(AutoConfig.from_pretrained(tmp_path / "out").collm)
    with torch.inference_mode():
        logits = plain(PROMPT).logits[0]
    found_law, found_gate = read_logits(logits, served)
    torch.testing.assert_close(found_law, law, atol=2e-5, rtol=0)
    torch.testing.assert_close(found_gate, gate, atol=2e-5, rtol=1e-5)
    assert max(done.gate_error, done.law_error) < 1e-4

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    names = [*defer_tokens(num_assistants), ZERO_TOKEN]
    assert tokenizer.convert_tokens_to_ids(names) == [*served.defer_token_ids, served.zero_token_id]
    assert len(tokenizer) == 1 + served.zero_token_id <= logits.shape[1] == plain.config.vocab_size
    assert logits.shape[1] == max(rows, 320 + num_assistants + 1)
    assert (tmp_path / "ckpt" / "tokenizer.json").is_file() and tokenizer.encode("56 * 9") == make_tokenizer().encode(
        "56 * 9"
    )
    assert plain.generation_config.eos_token_id == [2, *served.defer_token_ids]
    assert plain.config.tie_word_embeddings == tied


@pytest.mark.parametrize("rows", [320, 384])
def test_a_client_that_is_told_log_probabilities_finds_both(tmp_path: Path, rows: int) -> None:
    """What `ServedInfo` promises, with padding whose logits were anything before."""
    ckpt = checkpoint(tmp_path / "ckpt", make_model(vocab_size=rows), 2)
    export(ckpt, tmp_path / "out")
    law, gate = original(ckpt, PROMPT)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    served = ServedInfo.from_config(plain.config.collm)
    with torch.inference_mode():
        told = torch.log_softmax(plain(PROMPT).logits[0], dim=-1)
    defer, zero = told[:, served.defer_token_ids], told[:, [served.zero_token_id]]
    hidden = defer.exp().sum(-1, keepdim=True) + served.zero_columns * zero.exp()
    torch.testing.assert_close(told[:, : served.vocab_size] - torch.log1p(-hidden), law, atol=1e-5, rtol=0)
    scores = (defer - zero) * served.scale + torch.tensor(served.bias)
    torch.testing.assert_close(log_gate(scores), gate, atol=2e-4, rtol=1e-4)


def test_a_tokenizer_with_more_tokens_than_the_matrix_has_rows(tmp_path: Path) -> None:
    """Tokens without a row have probability 0 in our laws; a row of zeros would give them some."""
    ckpt = checkpoint(tmp_path / "ckpt", make_model(vocab_size=310))
    served = export(ckpt, tmp_path / "out").info
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (served.vocab_size, served.defer_token_ids, plain.config.vocab_size) == (310, [320], 322)
    law, gate = original(ckpt, PROMPT)
    with torch.inference_mode():
        found_law, found_gate = read_logits(plain(PROMPT).logits[0], served)
    torch.testing.assert_close(found_law, law[:, :310], atol=2e-5, rtol=0)
    torch.testing.assert_close(found_gate, gate, atol=2e-5, rtol=1e-5)


def test_an_adapter_is_merged_and_a_gate_takes_its_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(
        make_model(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    folders = {
        "lora": checkpoint(tmp_path / "lora", adapted, kind="lora", base_model=str(tmp_path / "base")),
        "gate": checkpoint(tmp_path / "gate", make_model(), kind="gate", base_model="moved/away"),
    }
    laws = []
    for kind, folder in folders.items():
        served = export(folder, tmp_path / f"{kind}-out", base=str(tmp_path / "base")).info
        law, gate = original(folder, PROMPT, str(tmp_path / "base"))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{kind}-out")
        with torch.inference_mode():
            found = read_logits(plain(PROMPT).logits[0], served)
        torch.testing.assert_close(found[0], law, atol=2e-5, rtol=0)
        torch.testing.assert_close(found[1], gate, atol=2e-5, rtol=1e-5)
        laws.append(law)
    assert not torch.allclose(*laws)


def test_what_is_known_travels_along(tmp_path: Path) -> None:
    export(checkpoint(tmp_path / "ckpt", make_model(), 2), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text(), parse_constant=pytest.fail)  # JSON has no infinity
    served = ServedInfo.from_config(raw["collm"])
    assert served.calibration == [TABLE] and served.base_format == {"system_prompt": "Be brief."}
    assert [info.name for info in served.assistants] == ["expert0", "expert1"]
    info = load_info(tmp_path / "out")
    assert info is not None and info.kind == "export" and info.calibration == [TABLE]
    with pytest.raises(CollmError, match="give the checkpoint it was made from"):
        load_base(tmp_path / "out")


def test_half_precision_tells_what_it_costs(tmp_path: Path) -> None:
    ckpt = checkpoint(tmp_path / "ckpt", make_model())
    run = CliRunner().invoke(main, ["export", str(ckpt), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert run.exit_code == 0, run.output
    assert "320 is expert0" in run.stdout and "warning: in bfloat16 the gate is rounded" in run.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    again = CliRunner().invoke(main, ["export", str(ckpt), str(tmp_path / "out")])
    assert again.exit_code == 1 and "is not empty" in again.stderr


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gemma2", {"final_logit_softcapping": 30.0, "head_dim": 8}, "Gemma2ForCausalLM caps its logits .*=30"),
        ("granite", {"logits_scaling": 8.0}, "GraniteForCausalLM divides its logits"),
        ("cohere", {"logit_scale": 0.0625}, "CohereForCausalLM multiplies its logits"),
    ],
)
def test_architectures_that_change_their_logits_are_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny

    monkeypatch.setitem(tiny.CONFIGS, kind, settings)
    ckpt = checkpoint(tmp_path / "ckpt", make_model(kind))
    with pytest.raises(CollmError, match=message):
        export(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(CollmError, match=r"has no collm\.json"):
        export(tmp_path / "plain", tmp_path / "out")
    save_checkpoint(tmp_path / "alone", CheckpointInfo(), model, None, tokenizer)
    with pytest.raises(CollmError, match="has no gate to export"):
        export(tmp_path / "alone", tmp_path / "out")
    export(checkpoint(tmp_path / "ckpt", make_model()), tmp_path / "out")
    with pytest.raises(CollmError, match="give the checkpoint it was made from"):
        export(tmp_path / "out", tmp_path / "again")
    with pytest.raises(CollmError, match="is no export"):
        ServedInfo.from_config(None)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["collm"]
    with pytest.raises(CollmError, match=r"cannot read \(format_version"):
        ServedInfo.from_config(raw | {"format_version": 2})
    with pytest.raises(CollmError, match="damaged export"):
        ServedInfo.from_config(raw | {"bias": []})
