"""A server under load and faults: bounded, timed, left alone, told to stop; and who may ask it."""

from __future__ import annotations

import gc
import json
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import openai
import pytest
from servers import Live, fake_pair, live

from collm.cli import main
from collm.cli import serve as serving
from collm.cli.serve import _access, _examples
from collm.errors import CollmError
from collm.serving.limits import Access, Limits
from collm.serving.server import bind

CHAT: dict[str, Any] = {"model": "pair", "messages": [{"role": "user", "content": "hi"}], "seed": 1}


def ask(server: Live, **more: Any) -> httpx.Response:
    return server.post("/v1/chat/completions", json={**CHAT, "max_tokens": 8, **more})


def start(server: Live, count: int, **more: Any) -> list[threading.Thread]:
    threads = [threading.Thread(target=ask, args=(server,), kwargs=more) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def wait_for(condition: Any, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# -- load


def test_collecting_garbage_does_not_look_through_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took a fifth of a second, in which no text went on."""
    frozen: list[int] = []
    monkeypatch.setattr(serving, "_require_servable", lambda *_: None)
    pair = fake_pair()
    monkeypatch.setattr(serving, "load_llm", lambda *_, **__: pair)
    monkeypatch.setattr("collm.serving.server.run", lambda *_: frozen.append(gc.get_freeze_count()))
    try:
        main(["serve", "pair", "--port", "0"], standalone_mode=False)
    finally:
        gc.unfreeze()
        pair.close()
    assert frozen[0] > 100_000


def test_the_queue_is_bounded() -> None:
    with live(fake_pair(max_num_seqs=1), limits=Limits(max_queue=1)) as server:
        with server.model(0).held():
            threads = start(server, 2)
            wait_for(lambda: server.metrics()["collm:num_requests_waiting"] == 1)
            refused = ask(server)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert ask(server, n=3).status_code == 400, "what never fits is not to be tried again"
        for thread in threads:
            thread.join()
        assert ask(server).status_code == 200
        server.wait_idle()
        assert server.metrics()["collm:http_requests_refused_total"] == 2


def test_a_request_has_a_time_limit() -> None:
    with live(fake_pair(), limits=Limits(request_timeout=0.5)) as server:
        with server.model(0).held():
            late = ask(server)
            assert late.status_code == 504 and late.json()["error"]["type"] == "server_error"
        server.model(0).seconds = 0.2  # a stream that has begun
        with pytest.raises(openai.APIError, match="complete within"):
            list(server.client().chat.completions.create(**CHAT, max_tokens=8, stream=True))
        server.model(0).seconds = 0.0
        server.wait_idle()
        assert ask(server, max_tokens=2).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream: bool) -> None:
    """vLLM's test: three long requests, cancelled; the gauges fall to 0."""
    with live(fake_pair(max_num_seqs=2)) as server:
        with server.model(0).held():
            sockets = [raw(server, {**CHAT, "max_tokens": 5000, "stream": stream}) for _ in range(3)]
            wait_for(lambda: server.metrics()["collm:num_requests_waiting"] == 1)
            assert server.metrics()["collm:num_requests_running"] == 2
            for each in sockets:
                each.close()
            server.wait_idle(10)
        assert server.metrics()["collm:http_requests_client_disconnected_total"] == 3
        assert ask(server, max_tokens=2).status_code == 200
        assert server.metrics()["collm:http_requests_client_disconnected_total"] == 3


def raw(server: Live, body: Any, **headers: str) -> socket.socket:
    """A request by hand; its answer is still to be read."""
    host, port = server.url.removeprefix("http://").split(":")
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"Host": f"{host}:{port}", "Content-Type": "application/json", "Content-Length": str(len(data)), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + data)
    return connection


def test_it_finishes_what_runs_when_it_is_told_to_stop() -> None:
    found: list[httpx.Response] = []
    with live(fake_pair()) as server:
        whole = ask(server).json()["choices"]
        asking = threading.Thread(target=lambda: found.append(ask(server)))
        with server.model(0).held():
            asking.start()
            wait_for(lambda: server.metrics()["collm:num_requests_running"] == 1)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            wait_for(lambda: not reachable(server))
            assert not found
        asking.join()
        stopping.join()
    assert found[0].status_code == 200 and found[0].json()["choices"] == whole


def reachable(server: Live) -> bool:
    try:
        return httpx.get(server.url + "/health").status_code == 200
    except httpx.TransportError:  # refused, or reset while the socket closes
        return False


# -- faults of models


def test_an_assistant_that_fails() -> None:
    with live(fake_pair()) as server:
        helper = server.model(1)
        helper.fails_after = 0
        failed = ask(server, collm={"method": "always"})
        assert failed.status_code == 500 and "cables" in failed.json()["error"]["message"]
        assert "Traceback" not in failed.text and ".py" not in failed.text
        went_on = ask(server, collm={"method": "always", "on_assistant_error": "base", "tokens": True})
        choice = went_on.json()["choices"][0]
        assert choice["collm"]["tokens_by_author"] == {"base": 8, "helper": 0}
        assert "cables" in choice["collm"]["tokens"][0]["fault"]
        assert ask(server, collm={"method": "never"}).status_code == 200
        helper.fails_after = None
        assert ask(server, collm={"method": "always"}).status_code == 200


def test_an_assistant_that_fails_in_the_middle_of_a_stream() -> None:
    with live(fake_pair()) as server:
        server.model(1).fails_after = 4
        who = {"collm": {"method": "always", "tokens": True, "speculative": False}}
        stream = server.client().chat.completions.create(**CHAT, max_tokens=8, stream=True, extra_body=who)
        told = []
        with pytest.raises(openai.APIError, match="cables"):
            for chunk in stream:
                told += [token["author"] for token in chunk.choices[0].to_dict().get("collm", {}).get("tokens", ())]
        assert told
        server.model(1).fails_after = None
        server.wait_idle()
        assert ask(server).status_code == 200


def test_a_model_that_hangs() -> None:
    with live(fake_pair(timeout=0.3)) as server:
        with server.model(1).held():
            hung = ask(server, collm={"method": "always"})
            assert hung.status_code == 500 and "has not answered within 0.3 seconds" in hung.text
        wait_for(lambda: ask(server, collm={"method": "always"}).status_code == 200)


def test_a_bug_is_told_to_the_log_and_not_to_the_client(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("collm.serving.answering.chat_prompt", broken)
    with live(fake_pair()) as server:
        response = ask(server)
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text and "Traceback" not in response.text
        assert httpx.get(server.url + "/health").status_code == 200
    assert any(record.exc_info for record in caplog.records if record.name == "collm.serving")


# -- who may ask, and how much


def test_keys() -> None:
    with live(fake_pair(), access=Access(api_keys=("one", "zwei-ü"))) as server:
        for key in ("", "none", "one "):
            response = ask_with(server, Authorization=f"Bearer {key}x")
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/v1/models").status_code == 401
        assert ask_with(server, Authorization="Basic one").status_code == 401
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("one").chat.completions.create(**CHAT, max_tokens=2).choices


def ask_with(server: Live, **headers: str) -> httpx.Response:
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers=own)


def test_other_hosts_and_other_sites_are_refused() -> None:
    with live(fake_pair()) as server:
        assert ask_with(server, Host="evil.example").status_code == 403
        assert ask_with(server, Host="evil.example:8000").json()["error"]["code"] == "host_not_allowed"
        assert ask_with(server, Origin="https://evil.example").json()["error"]["code"] == "origin_not_allowed"
        assert ask_with(server, Origin="null").status_code == 403
        assert ask_with(server, Origin=server.url).status_code == 200
        preflight = httpx.options(server.url + "/v1/chat/completions", headers={"Origin": "https://evil.example"})
        assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers
    friend = "https://friend.example"
    with live(fake_pair(), access=Access(origins=(friend,))) as server:
        found = ask_with(server, Origin=friend)
        assert found.status_code == 200 and found.headers["access-control-allow-origin"] == friend


def test_sizes() -> None:
    with live(fake_pair(), limits=Limits(max_body_bytes=1000, body_timeout=0.3)) as server:
        assert ask(server, user="x" * 2000).status_code == 413
        chunked = server.post(
            "/v1/chat/completions", content=iter([b"x" * 600] * 3), headers={"Content-Type": "application/json"}
        )
        assert chunked.status_code == 413 and chunked.json()["error"]["code"] == "request_too_large"
        # A body that does not come, or that ends early, holds nothing up.
        slow = raw(server, b"{", **{"Content-Length": "100"})
        assert b" 408 " in slow.recv(1000)
        raw(server, b"{", **{"Content-Length": "100"}).close()
        assert ask(server).status_code == 200


def test_requests_have_identities_and_the_log_has_no_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "collm.serving")
    with live(fake_pair()) as server:
        assert ask_with(server, X_Request_Id="abc-1").headers["x-request-id"] == "abc-1"
        assert ask_with(server, X_Request_Id="a b;").headers["x-request-id"] not in ("", "a b;")
        ask(server, messages=[{"role": "user", "content": "my secret apples"}])
        list(server.client().chat.completions.create(**CHAT, max_tokens=3, stream=True))
    lines = [json.loads(record.message) for record in caplog.records if record.name == "collm.serving"]
    assert [line["status"] for line in lines] == [200] * 4 and lines[0]["id"] == "abc-1"
    assert all(line["completion_tokens"] > 0 and line["model"] == "pair" for line in lines)
    assert "secret" not in caplog.text


def test_a_log_that_cannot_be_written_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from collm.serving import server as process

    class Full:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    logger = logging.getLogger("collm.serving")
    handlers, propagate = logger.handlers[:], logger.propagate
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    try:
        process.log_to_stderr()
        with live(fake_pair()) as running:
            assert ask(running).status_code == 200
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate


def test_what_no_client_sends() -> None:
    """By hand: broken, half-closed, oversized and pipelined requests. The next one is answered."""
    with live(fake_pair()) as server:
        host = server.url.removeprefix("http://")
        good = json.dumps({**CHAT, "max_tokens": 2}).encode()
        head = f"Host: {host}\r\nContent-Type: application/json\r\n"
        post = f"POST /v1/chat/completions HTTP/1.1\r\n{head}Content-Length: {len(good)}\r\n\r\n".encode() + good
        cases = {
            b"\x00\xff\xfe" * 100: b"400",
            b"GET / HTTP/9.9\r\n\r\n": b"403",
            b"GET / HTTP/1.1\r\n\r\n": b"400",
            b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n": b"400",
            b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n": b"400",
            post.replace(b"hi", b"\xff\xfe"): b"400",
            post.replace(b"POST", b"PATCH"): b"405",
            f"POST /v1/%ff%00/..%2f HTTP/1.1\r\n{head}\r\n".encode(): b"404",
            post * 3: b"200",
        }
        for sent, status in cases.items():
            with socket.create_connection(tuple(host.split(":")), timeout=10) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)  # nothing more will come, and the answer is waited for
                answer = connection.recv(1 << 16)
                assert not answer or answer.split()[1] == status, (sent[:40], answer[:80])
        assert ask(server).status_code == 200
        server.wait_idle()


# -- the command


def test_what_is_wrong_is_told_before_weights_are_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("collm.cli.serve.load_llm", never)
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = str(taken.getsockname()[1])
    cases = {
        "Address already in use": [str(tiny_folder), "--port", port],
        "no calibration of random": [
            *(str(tiny_folder), "--port", "0", "--assistant", f"helper={tiny_folder}"),
            *("--deferral", "random", "--deferral-rate", "0.2", "--calibration-task", "sums"),
        ],
        "nowhere": [str(tiny_folder), "--port", "0", "--assistant", "nowhere/at-all", "--deferral", "always"],
    }
    for words, arguments in cases.items():
        with pytest.raises(SystemExit) as ended:
            main(["serve", *arguments])
        assert ended.value.code == 1 and words in capsys.readouterr().err, words
    with pytest.raises(CollmError, match="choose another"):
        bind("127.0.0.1", int(port))
    taken.close()


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLM_API_KEY", "two")
    file = tmp_path / "keys"
    file.write_text("three\nfour\n")
    options = {"api_keys": ("one",), "api_key_file": file, "hosts": (), "origins": (), "host": "0.0.0.0"}
    assert _access(options) == Access(("one", "two", "three", "four"), (), ())
    assert "127.0.0.1" in _access({**options, "host": "127.0.0.1"}).hosts


def test_examples_come_from_the_checkpoint_or_a_file(tmp_path: Path) -> None:
    ready = Path(__file__).parent.parent / "pretrained" / "smollm2-135m-calculator"
    assert len(_examples(str(ready), None)) >= 3
    assert _examples(str(tmp_path), None) == []
    (tmp_path / "mine.txt").write_text("What is 1 + 1?\n\n  And 2 + 2?\n", encoding="utf-8")
    assert _examples(str(ready), tmp_path / "mine.txt") == ["What is 1 + 1?", "And 2 + 2?"]


@contextmanager
def command_of(folder: Path, log: int | IO[str] = subprocess.PIPE) -> Iterator[tuple[Any, dict[str, str], str]]:
    """`collm serve` as a process of its own, what it tells, and its address."""
    command = [sys.executable, "-m", "collm", "serve", str(folder), "--assistant", f"helper={folder}"]
    command += ["--deferral", "always", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        told = {}
        for line in process.stdout:
            name, _, value = line.rstrip().partition(" ")
            told[name] = value.strip()
            if name == "listening":
                break
        try:
            yield process, told, told["listening"].split()[0]
        finally:
            process.kill()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_costs_no_request(tiny_folder: Path) -> None:
    """As the kernel has it: every write of the process to its log fails, from its first line on."""
    with Path("/dev/full").open("w") as full, command_of(tiny_folder, full) as (process, _, url):
        for _ in range(3):
            body = {**CHAT, "model": "helper", "max_tokens": 4}
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        assert httpx.post(f"{url}/v1/chat/completions", json={}, timeout=60).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_the_command_serves_until_it_is_told_to_stop(tiny_folder: Path) -> None:
    with command_of(tiny_folder) as (process, told, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny", "base", "helper"]
        stream = client.completions.create(
            model="helper", prompt="Rome", max_tokens=100, stream=True, extra_body={"stop_token_ids": []}
        )
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
        assert process.wait(20) == 0
        lines = [json.loads(line) for line in process.stderr if line.startswith("{")]
    assert [line["path"] for line in lines] == ["/v1/models", "/v1/completions"]
    assert told["assistants"] == "helper" and told["models"] == "tiny, base, helper"
