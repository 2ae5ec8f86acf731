"""Model cards, copies of checkpoints, and the upload against a fake hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer

from collm.errors import CollmError
from collm.llm import CollaborativeLM
from collm.models.checkpoint import save_checkpoint
from collm.models.head import DeferralHead
from collm.models.hub import CARD, copy_checkpoint, model_card, push_to_hub
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo, load_info

ROW = CalibrationRow(
    target_rate=0.2, achieved_rate=0.19, threshold=1.0, log_odds=float("inf"), metric_value=0.5, ci95=(0.4, 0.6)
)
INFO = CheckpointInfo(
    base_model="owner/name",
    assistants=[AssistantInfo(name="calculator", spec="calculator")],
    calibration=[CalibrationTable(task="sums", metric="exact match", seed=0, num_prompts=7, rows=[ROW])],
    training={"recipe": {"objective": "marginal"}, "figures": {"after": {"eval_nll": 0.25}}},
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    tokenizer = make_tokenizer()
    head = DeferralHead(32, 1)
    torch.nn.init.normal_(head.weight)
    save_checkpoint(folder, INFO, make_model(vocab_size=len(tokenizer)), head, tokenizer)
    for name in ("cache", "checkpoints", "init"):
        (folder / name).mkdir()
        (folder / name / "big.bin").write_text("x")
    return folder


def test_the_card_says_what_it_is(checkpoint: Path) -> None:
    card = model_card(INFO)
    for part in ("base_model: owner/name", "calculator=calculator", "| nll | 0.2500 |", "| 0.20 | 0.190 | 0.500 |"):
        assert part in card


def test_infinite_thresholds_survive_the_file(checkpoint: Path) -> None:
    assert load_info(checkpoint) == INFO


def test_a_saved_copy_writes_the_same_text_and_leaves_leftovers_behind(checkpoint: Path, tmp_path: Path) -> None:
    first = CollaborativeLM.from_pretrained(checkpoint)
    first.save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "cache").exists()
    second = CollaborativeLM.from_pretrained(tmp_path / "copy")
    assert first.generate("3 + 10 = ") == second.generate("3 + 10 = ")
    with pytest.raises(CollmError, match="not empty"):
        first.save_pretrained(tmp_path / "copy")
    with pytest.raises(CollmError, match=r"no collm\.json"):
        copy_checkpoint(tmp_path, tmp_path / "elsewhere")


def test_upload_sends_the_checkpoint_with_its_card(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class FakeApi:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> str:
            assert (checkpoint / CARD).read_text() == model_card(INFO)
            calls.append(("upload", options))
            return "https://hub.example/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeApi)
    llm = CollaborativeLM.from_pretrained(checkpoint)
    assert llm.push_to_hub("owner/name", token="t") == "https://hub.example/owner/name"
    assert [name for name, _ in calls] == ["token", "create", "upload"]
    assert calls[1][1]["private"] is True
    assert "cache/*" in calls[2][1]["ignore_patterns"]


def test_a_hub_out_of_reach_is_a_clear_error(checkpoint: Path) -> None:
    with pytest.raises(CollmError, match="could not upload"):  # tests run with HF_HUB_OFFLINE=1
        push_to_hub(checkpoint, "owner/name")
