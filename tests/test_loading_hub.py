"""A hub that is out of reach is noticed at once, and named with what helps."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model

from collm import CollaborativeLM
from collm.errors import CollmError
from collm.models import reach
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo, save_info
from collm.models.loading import load_tokenizer


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reach, "getproxies", dict)
    reach.keep_to_this_machine.cache_clear()
    yield
    reach.keep_to_this_machine.cache_clear()


def test_no_network_is_told_without_waiting(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def refused(address: Any, timeout: float) -> Any:
        asked.append(address)
        raise OSError("no such name")

    monkeypatch.setattr(socket, "create_connection", refused)
    for _ in range(2):
        with pytest.raises(CollmError, match="nobody/nothing: there is no such folder, and the hub did not give"):
            load_tokenizer("nobody/nothing")
    assert len(asked) == 1 and "HF_HUB_OFFLINE=1" in caplog.text


def test_a_hub_that_is_there_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        reach.keep_to_this_machine()
    assert not constants.is_offline_mode()


def test_behind_a_proxy_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "getproxies", lambda: {"https": "http://proxy.example"})
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked"))
    reach.keep_to_this_machine()
    assert not constants.is_offline_mode()


def test_what_lies_here_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate of a checkpoint once asked whether the hub is there: a line about it, and seconds, for nothing."""
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("asked"))
    network, tokenizer = make_model(), make_tokenizer()
    network.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    get_peft_model(network, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "pair")
    info = CheckpointInfo(
        kind="lora",
        base_model=str(tmp_path / "base"),
        assistants=[AssistantInfo(name="helper", spec=str(tmp_path / "base"))],
    )
    save_info(tmp_path / "pair", info)
    DeferralHead(32, 1).save(tmp_path / "pair")
    llm = CollaborativeLM.from_pretrained(tmp_path / "pair")
    assert llm.generate("3 + 10 = ", max_tokens=3).steps


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(CollmError, match=r"is a folder without a model: it has neither config.json nor adapter_config"):
        CollaborativeLM.from_pretrained(tmp_path)


def test_a_hub_that_does_not_answer_says_nothing_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_answer(*_: Any) -> str:
        raise LocalEntryNotFoundError("nobody there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_answer)
    monkeypatch.setattr(reach, "getproxies", lambda: {"https": "http://proxy.example"})  # so it is not tried before
    reach.require_on_hub("nobody/nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CollmError, match="the hub's cache on this machine has no such model"):
        reach.require_on_hub("nobody/nothing")
