"""A hub that is out of reach is noticed at once, and named with what helps."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from collm.errors import CollmError
from collm.models import reach
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
