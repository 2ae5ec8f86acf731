"""What an earlier run, a killed one or another library left in a folder is not loaded in the stead of what is meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_model, make_tokenizer
from gguf_files import write_gguf
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.calibration import write_curve
from collm.cli import main
from collm.errors import CollmError
from collm.files import write_text
from collm.models.adapters import ModelStore
from collm.models.checkpoint import load_base, save_checkpoint
from collm.models.head import DeferralHead
from collm.models.hub import push_to_hub
from collm.models.info import CalibrationRow, CalibrationTable, CheckpointInfo, load_info, save_info
from collm.models.loading import load_model, load_tokenizer
from collm.models.reach import require_model
from collm.training.recipe import parse_recipe
from collm.training.train import train

IDS = torch.arange(3, 20)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save(tmp_path / "base", 0)
    return tmp_path / "base"


def save(folder: Path, seed: int) -> None:
    tokenizer = make_tokenizer()
    make_model(vocab_size=len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(str(base)), config).save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("before", "after"), [("lora", "full"), ("full", "lora"), ("full", "gate")])
def test_a_run_that_is_trained_anew_leaves_nothing_of_the_old_one(
    base: Path, tmp_path: Path, before: str, after: str
) -> None:
    """The old adapter lay over the new weights, and the old weights were an assistant in the new adapter's stead."""
    rows = [{"prompt": f"{a} + {a} =", "completion": f" {a + a}"} for a in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(tmp_path / "assistant", 2)

    def run(tune: str, restart: bool = True) -> Path:
        values: dict[str, Any] = {
            "out": str(tmp_path / "out"),
            "base": {"model": str(base)},
            "assistants": [{"name": "helper", "model": str(tmp_path / "assistant")}],
            "data": {"train": str(tmp_path / "rows.jsonl"), "validation_share": 0.25, "max_length": 64},
            "tune": tune,
            "training": {"epochs": 1, "batch_size": 4, "evaluations": 1},
        }
        return train(parse_recipe(values), progress=False, restart=restart)

    out = run(before)
    # Of the old gate, and of its training: they would be shown, and uploaded, as the new one's.
    row = CalibrationRow(target_rate=0.5, achieved_rate=0.5, threshold=0.5, log_odds=0.0, metric_value=0.5)
    curve = CalibrationTable(task="t", metric="m", seed=0, num_prompts=1, rows=[row], best=0)
    stale = [*write_curve(curve, out), *write_curve(curve, out / "entropy"), out / "tensorboard" / "events.out"]
    write_text(stale[-1], "steps of the old run")
    assert run(after) == out and not any(path.exists() for path in stale)
    kept = {path.name for path in out.iterdir()}
    assert ("model.safetensors" in kept) == ("config.json" in kept) == ("tokenizer.json" in kept) == (after == "full")
    assert ("adapter_model.safetensors" in kept) == ("adapter_config.json" in kept) == (after == "lora")
    assert (info := load_info(out)) is not None and info.kind == after
    load_base(out)
    # What says whose run it is lies in its place, and its figures are there.
    assert json.loads((out / "run.json").read_text())["tune"] == after
    assert "eval_loss" in (out / "log.jsonl").read_text()
    assert run(after, restart=False) == out


@pytest.mark.parametrize(("before", "after"), [("lora", "full"), ("full", "lora")])
def test_a_checkpoint_on_the_hub_takes_the_place_of_the_one_before(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    """The old adapter stayed in the repository, beside the new weights, which it was laid over."""
    hub = tmp_path / "hub"
    (hub / "notes").mkdir(parents=True)
    for name in ("notes/mine.txt", "figure.png"):
        (hub / name).write_text("mine")

    def upload_folder(
        self: HfApi, folder_path: str, ignore_patterns: list[str], delete_patterns: list[str] | None, **options: Any
    ) -> str:
        """As the hub's own: of the old files those that match go, and what is sent is put there."""
        there = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
        for name in filter_repo_objects(there, allow_patterns=delete_patterns or []):
            (hub / name).unlink()
        shutil.copytree(folder_path, hub, ignore=shutil.ignore_patterns(*ignore_patterns), dirs_exist_ok=True)
        return "address"

    monkeypatch.setattr(HfApi, "create_repo", lambda *given, **options: None)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = load_model(str(base))
    tokenizer = load_tokenizer(str(base))
    torch.manual_seed(3)
    kinds = {"full": model, "lora": get_peft_model(load_model(str(base)), LoraConfig(r=2, init_lora_weights=False))}
    for kind in (before, after):
        info = CheckpointInfo(kind=kind, base_model=str(base))  # type: ignore[arg-type]
        save_checkpoint(tmp_path / kind, info, kinds[kind], None, tokenizer)
        push_to_hub(tmp_path / kind, "owner/name")
    assert {p.name for p in hub.iterdir()} == {*(p.name for p in (tmp_path / after).iterdir()), "notes", "figure.png"}
    found, expected = load_base(hub)[0], load_base(tmp_path / after)[0]
    assert torch.equal(logits(found), logits(expected))


def test_a_gate_without_assistants_is_of_another_run(base: Path) -> None:
    """It was taken for the model's, and deferred by what the model had never been trained with."""
    save_info(base, CheckpointInfo())
    DeferralHead(32, 1).save(base)
    with pytest.raises(CollmError, match=r"gate\.safetensors is for 1 assistants, but collm\.json names 0"):
        load_base(base)


def test_a_whole_model_with_an_adapter_in_its_folder_is_refused(base: Path, tmp_path: Path) -> None:
    """transformers puts the adapter over the weights, and says nothing."""
    save_adapter(base, tmp_path / "both")
    save(tmp_path / "both", 3)
    for load in (load_model, require_model, ModelStore().load):
        with pytest.raises(CollmError, match=r"both holds a whole model and an adapter \(adapter_config\.json\)"):
            load(str(tmp_path / "both"))


def test_an_adapter_beside_its_base_s_configuration_is_an_adapter(base: Path, tmp_path: Path) -> None:
    """Trainers write it there; it was refused as a model without weights."""
    folder = save_adapter(base, tmp_path / "adapter")
    wanted = logits(load_model(str(folder)))
    shutil.copy(base / "config.json", folder)
    require_model(str(folder))
    assert torch.equal(logits(load_model(str(folder))), wanted)
    assert ModelStore().load(str(folder)).adapter is not None
    assert load_tokenizer(str(folder)).get_vocab() == load_tokenizer(str(base)).get_vocab()


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GemmaTokenizer", "LlamaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(base: Path, kind: str) -> None:
    """transformers makes one of special tokens alone, by which all text is empty."""
    (base / "tokenizer.json").unlink()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
    with pytest.raises(CollmError, match="base: its tokenizer has no vocabulary; the file of it"):
        load_tokenizer(str(base))


def test_a_conversion_that_ends_early_leaves_no_folder(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between weights and tokenizer it left a folder that looked like a model."""
    tokenizer = make_tokenizer()
    file = write_gguf(tmp_path / "a.gguf", load_model(str(base)), tokenizer)
    (tmp_path / "there").mkdir()

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
        patch.setenv("COLLM_CACHE", str(tmp_path / "no" / "cache"))
        for name in ("out", "there"):
            done = CliRunner().invoke(main, ["convert", str(file), str(tmp_path / name)])
            assert done.exit_code == 1 and "could not write" in done.stderr and "no space left" in done.stderr
    assert not (tmp_path / "out").exists() and not list((tmp_path / "there").iterdir())
    (tmp_path / "there" / ".tmp").mkdir()  # of one that was killed
    for name in ("out", "there"):
        assert CliRunner().invoke(main, ["convert", str(file), str(tmp_path / name)]).exit_code == 0
        assert not (tmp_path / name / ".tmp").exists()
        load_tokenizer(str(tmp_path / name))
