"""`collm vllm-serve`: flags, versions, and the probe, against a stand-in for vLLM that may fail."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from test_vllm_plugin import INFO

import collm.vllm_plugin.serve as serving
from collm.cli import main
from collm.errors import CollmError
from collm.vllm_plugin import PROCESSOR
from collm.vllm_plugin.serve import Launch, check_version, probe

VLLM = '''
"""A server with vLLM's arguments and answers; FAULT says what is wrong with it."""
import argparse, json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for name in ("--model", "--host", "--logits-processors", "--api-key", "--tensor-parallel-size"):
    parser.add_argument(name)
parser.add_argument("--port", type=int)
args = parser.parse_args()
fault = os.environ.get("FAULT")
if fault == "dies":
    sys.exit("no memory")
print("ARGS", json.dumps(vars(args)), flush=True)

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        if self.path == "/health":
            return self.answer(200 if fault != "hangs" else 503, {})
        if args.api_key and self.headers["Authorization"] != f"Bearer {args.api_key}":
            return self.answer(401, {"error": "Unauthorized"})
        self.answer(200, {"data": [{"id": "base"}]})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        xargs = body["vllm_xargs"]
        if xargs.get("collm_threshold") == 7 and fault != "checks nothing":
            return self.answer(400, {"error": {"message": "threshold must lie in [0, 1], not 7.0"}})
        defers = xargs.get("collm_deferral") == "always" and fault != "decides nothing"
        self.answer(200, {"choices": [{"token_ids": [22] if defers else [3, 4],
                                       "finish_reason": "stop" if defers else "length"}]})

ThreadingHTTPServer((args.host, args.port), Handler).serve_forever()
'''


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 27, "collm": INFO.to_config()}))
    return folder


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is what a started Python finds as vLLM; this one need not import it."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(serving, "vllm_version", lambda: "0.32.0+cpu")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.usefixtures("vllm")
def test_it_starts_vllm_passes_flags_on_and_says_when_it_is_ready(
    exported: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, once it is ready, ends vLLM and then the command."""
    port, serve = free_port(), serving.serve

    def until_ready(launch: Launch, start_timeout: float, ready: Callable[[str, str], None]) -> int:
        def then(url: str, model: str) -> None:
            ready(url, model)
            assert httpx.get(f"{url}/health").status_code == 200
            os.kill(os.getpid(), signal.SIGTERM)

        return serve(launch, start_timeout, then)

    monkeypatch.setattr(serving, "serve", until_ready)
    flags = ["--port", str(port), "--tensor-parallel-size", "2", "--api-key", "hidden-key"]
    run = CliRunner().invoke(main, ["vllm-serve", str(exported), *flags])
    given = json.loads(capfd.readouterr().out.removeprefix("ARGS "))
    assert given["tensor_parallel_size"] == "2" and given["host"] == "127.0.0.1" and given["port"] == port
    assert given["model"] == str(exported) and given["logits_processors"] == PROCESSOR
    assert run.stdout == f"ready: base on http://127.0.0.1:{port}, vLLM 0.32.0+cpu, defers to a, b\n"
    assert "hidden-key" not in run.output
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies", "vLLM ended with status 1 before it answered"),
        ("hangs", "did not answer within 2 s: give it more with --start-timeout"),
        ("checks nothing", "must be vLLM's Python front end, with the plugin collm loaded"),
        ("decides nothing", r"asked to defer at once, the server wrote \[3, 4\] \(length\)"),
    ],
)
def test_a_server_that_would_be_wrong_is_stopped(
    exported: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    monkeypatch.setenv("FAULT", fault)
    launch = Launch.of(str(exported), ["--port", str(free_port())])
    with pytest.raises(CollmError, match=message):
        serving.serve(launch, 2 if fault == "hangs" else 60, pytest.fail)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{launch.url}/health")


def test_what_cannot_be_served_says_why(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "collm.json").write_text("{}")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    for folder, message in {
        "checkpoint": "run collm export first",
        "plain": "is no export",
        "no": "there is no",
    }.items():
        with pytest.raises(CollmError, match=message):
            Launch.of(str(tmp_path / folder), [])
    for flag in ("--model", "--logprobs-mode=raw_logits", "--generation-config", "--uds"):
        with pytest.raises(CollmError, match=f"leave out {flag.partition('=')[0]}: "):
            Launch.of(str(exported), [flag, "x"])


def test_flags_and_where_it_will_answer(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*flags: str) -> Launch:
        return Launch.of(str(exported), flags)

    assert launch().url == "http://127.0.0.1:8000"
    assert launch("--host", "0.0.0.0", "--port=80").url == "http://127.0.0.1:80"
    assert launch("--ssl-certfile", "c.pem", "--port", "1", "--port", "443").url == "https://127.0.0.1:443"
    assert launch("--headless", "--port", "1").headless and not launch().headless
    assert launch("--host", "::").command[-4:] == ["--host", "::", "--logits-processors", PROCESSOR]
    own = launch("--logits-processors", "their:own").command
    assert own[own.index("--logits-processors") + 1 :][:2] == [PROCESSOR, "their:own"]
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert launch().client().headers["Authorization"] == "Bearer k"


def test_versions() -> None:
    for good in ("0.30.1", "0.32.0", "0.32.0+cpu", "0.31.0rc1"):
        check_version(good)
    for bad in ("0.29.3", "0.33.0", "1.0.0"):
        with pytest.raises(CollmError, match=r"pip install 'vllm>=0\.30"):
            check_version(bad)
    with pytest.raises(CollmError, match="install a release"):
        check_version("dev")


def test_without_vllm_the_command_says_where_to_install_what(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = CliRunner().invoke(main, ["vllm-serve", str(exported)])
    assert run.exit_code == 1 and "install collm[remote] into the environment where vLLM is" in run.stderr


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"models": httpx.Response(401)}, "VLLM_API_KEY"),
        ({"always": httpx.Response(500, text="CUDA error")}, "status 500: CUDA error"),
        ({"always": httpx.Response(200, json={"choices": [{"text": "x"}]})}, "gives no token ids"),
        (
            {"always": httpx.Response(200, json={"choices": [{"token_ids": [22, 3], "finish_reason": "length"}]})},
            "does not end a text at a deferral",
        ),
        (
            {"never": httpx.Response(200, json={"choices": [{"token_ids": [24], "finish_reason": "length"}]})},
            "no text of the base",
        ),
    ],
)
def test_the_probe_names_what_is_wrong(answers: dict[str, httpx.Response], message: str) -> None:
    good: dict[str, httpx.Response] = {
        "models": httpx.Response(200, json={"data": [{"id": "base"}]}),
        "7": httpx.Response(400, json={"error": {"message": "threshold must lie in [0, 1]"}}),
        "always": httpx.Response(200, json={"choices": [{"token_ids": [23], "finish_reason": "stop"}]}),
        "never": httpx.Response(200, json={"choices": [{"token_ids": [4, 5], "finish_reason": "length"}]}),
    }

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return (good | answers)["models"]
        xargs: dict[str, Any] = json.loads(request.content)["vllm_xargs"]
        return (good | answers)[str(next(iter(xargs.values())))]

    with httpx.Client(transport=httpx.MockTransport(handler), base_url="http://x") as client:
        with pytest.raises(CollmError, match=message):
            probe(client, INFO)
        answers.clear()
        assert probe(client, INFO) == "base"
