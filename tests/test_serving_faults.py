"""What goes wrong under a server, and what comes of it: docs/serving.md has the table."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from servers import Live, fake_pair, live
from test_serving_operation import CHAT, ask, raw, wait_for
from test_serving_same import system
from tiny import make_model, make_tokenizer

from collm.data.formatting import Formatter
from collm.llm import CollaborativeLM
from collm.models.fake import FakeModel
from collm.models.local import LocalModel
from collm.remote.connecting import connect
from collm.sampling_params import SamplingParams
from collm.serving.limits import Limits
from collm.values import Query, Replies, Reply

ALWAYS = {"method": "always"}


# -- models


class Elsewhere(FakeModel):
    """On a device of its own, whose passes do not end before it is let go."""

    free = threading.Event()

    @property
    def device(self) -> str:
        return "elsewhere"

    def predict(self, queries: Sequence[Query]) -> Replies:
        self.free.wait(60)
        return super().predict(queries)


def with_assistant(assistant: FakeModel) -> CollaborativeLM:
    base = FakeModel("base", 320, num_assistants=1, concentration=0.05)
    return CollaborativeLM([base, assistant], [Formatter(make_tokenizer())] * 2, timeout=60)


def test_an_assistant_that_is_slow_holds_up_nobody_who_does_not_want_it() -> None:
    helper = Elsewhere("helper", 320, concentration=0.05)
    with live(with_assistant(helper), limits=Limits(request_timeout=1)) as server:
        late: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: late.append(ask(server, collm=ALWAYS)))
        waiting.start()
        try:
            wait_for(lambda: server.metrics()["collm:num_requests_running"] == 1)
            assert [ask(server, collm={"method": "never"}).status_code for _ in range(3)] == [200] * 3
            waiting.join()
            assert late[0].status_code == 504
        finally:
            helper.free.set()
        server.wait_idle()
        assert ask(server, collm=ALWAYS).status_code == 200


SERVER = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file(sys.argv[1])

class Handler(BaseHTTPRequestHandler):
    def tell(self, *events, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        for event in events:
            self.wfile.write(event.encode())

    def do_GET(self):
        self.tell(json.dumps({"data": [{"id": "helper", "max_model_len": 4096}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            ids = tokenizer.encode(body["prompt"], add_special_tokens=False).ids
            return self.tell(json.dumps({"tokens": ids}))
        time.sleep(0.05)
        told = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:65": -0.5}]}
        choice = {"index": 0, "text": "x", "token_ids": [65], "logprobs": told, "finish_reason": "length"}
        events = "data: " + json.dumps({"choices": [choice]}) + "\\n\\n", "data: [DONE]\\n\\n"
        self.tell(*events, kind="text/event-stream")

    def log_message(self, *_):
        pass

ThreadingHTTPServer.allow_reuse_address = True
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A model that always writes the same token, in a process that can be killed."""


@contextmanager
def in_a_process(tokenizer: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [sys.executable, "-c", SERVER, str(tokenizer), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_an_assistant_s_server_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With -9, while it writes for several clients: each gets an error event that names it, or the base goes on."""
    monkeypatch.setattr("collm.remote.faults.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("collm.remote.health.COOLDOWN", 0.5)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    with in_a_process(tmp_path / "tokenizer.json") as (process, port):
        helper = connect(f"openai+http://127.0.0.1:{port}?timeout=5", tokenizer, name="helper", vocab_size=320)
        base = FakeModel("base", 320, num_assistants=1, concentration=0.05)
        llm = CollaborativeLM([base, helper], [Formatter(tokenizer)] * 2, timeout=60)
        with live(llm) as server:
            body = {**CHAT, "max_tokens": 40, "collm": {**ALWAYS, "on_assistant_error": "base", "tokens": True}}
            others: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: others.append(server.post("/v1/chat/completions", json=body)))
            asking.start()
            stream = server.client().chat.completions.create(
                **CHAT, max_tokens=40, stream=True, extra_body={"collm": ALWAYS}
            )
            told = 0
            with pytest.raises(openai.APIError, match=f"helper: http://127.0.0.1:{port}"):
                for chunk in stream:
                    told += bool(chunk.choices[0].delta.content)
                    if told == 3:
                        process.kill()
            assert 3 <= told < 40
            asking.join()
            [choice] = others[0].json()["choices"]
            authors = [token["author"] for token in choice["collm"]["tokens"]]
            assert choice["finish_reason"] in ("stop", "length") and authors[0] == "helper" and authors[-1] == "base"
            faults = [token["fault"] for token in choice["collm"]["tokens"] if "fault" in token]
            assert faults and all("helper" in fault for fault in faults) and len(faults) == authors.count("base")
            failed = ask(server, collm=ALWAYS)
            assert failed.status_code == 500 and failed.json()["error"]["code"] == "model_failed"
            assert ask(server, collm={"method": "never"}).status_code == 200
            server.wait_idle()
            with in_a_process(tmp_path / "tokenizer.json", port):
                wait_for(lambda: ask(server, collm=ALWAYS).status_code == 200, 20)


def test_an_assistant_whose_predictions_are_not_numbers() -> None:
    llm = system(1)
    helper = llm.models[1]
    assert isinstance(helper, LocalModel)
    with live(llm) as server:
        whole = ask(server, collm=ALWAYS).json()["choices"][0]["message"]
        weight = helper.model.get_input_embeddings().weight
        saved = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        helper.forget()
        failed = ask(server, collm=ALWAYS)
        assert failed.status_code == 500 and "not numbers (NaN)" in failed.json()["error"]["message"]
        went_on = ask(server, collm={**ALWAYS, "on_assistant_error": "base"}).json()["choices"][0]
        assert went_on["collm"]["tokens_by_author"]["m1"] == 0 < went_on["collm"]["tokens_by_author"]["m0"]
        assert ask(server, collm={"method": "never"}).status_code == 200
        with torch.no_grad():
            weight.copy_(saved)
        helper.forget()
        assert ask(server, collm=ALWAYS).json()["choices"][0]["message"] == whole


class Garbage(FakeModel):
    """Its answers are spoilt."""

    spoil: Callable[[list[Reply]], Any] = staticmethod(lambda replies: replies)

    def predict(self, queries: Sequence[Query]) -> Replies:
        return [self.spoil(replies) for replies in super().predict(queries)]


def each(**fields: Any) -> Callable[[list[Reply]], Any]:
    return lambda replies: [reply._replace(**fields) for reply in replies if reply is not None]  # type: ignore[union-attr]


SPOILT: dict[str, Callable[[list[Reply]], Any]] = {
    "none": lambda replies: [],
    "too many": lambda replies: replies * 2,
    "no list": lambda replies: None,
    "no answers": lambda replies: ["nonsense" for _ in replies],
    "no such token": each(token_id=10**9),
    "a negative token": each(token_id=-1),
    "no token": each(token_id="five"),
    "NaN": each(log_prob=float("nan")),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("stream", [False, True])
def test_an_assistant_whose_answers_are_garbage(how: str, stream: bool) -> None:
    """An error in OpenAI's form, or an answer that can be read; and the server goes on."""
    helper = Garbage("helper", 320, concentration=0.05)
    with live(with_assistant(helper)) as server:
        helper.spoil = SPOILT[how]  # type: ignore[method-assign]
        found = ask(server, collm={**ALWAYS, "tokens": True}, stream=stream, logprobs=True)
        if how in ("NaN", "no such token"):  # a server may not tell the one; the other may be padding, and has no text
            assert found.status_code == 200 and "NaN" not in found.text and '"error"' not in found.text
        elif found.status_code == 200:  # the stream had begun
            assert stream and '"error"' in found.text
        else:
            assert found.status_code == 500 and found.json()["error"]["message"]
        assert "Traceback" not in found.text
        helper.spoil = lambda replies: replies  # type: ignore[method-assign]
        server.wait_idle()
        assert ask(server, collm=ALWAYS).status_code == 200


# -- room


def small(max_cache_tokens: int) -> CollaborativeLM:
    """Two transformers whose caches are bounded."""
    tokenizer, kinds = make_tokenizer(), ("llama", "qwen3")
    head = system(1).models[0].head  # type: ignore[attr-defined]
    models = [
        LocalModel(
            make_model(kind, seed=z), tokenizer, None if z else head, name=f"m{z}", max_cache_tokens=max_cache_tokens
        )
        for z, kind in enumerate(kinds)
    ]
    return CollaborativeLM(models, [Formatter(tokenizer)] * 2)


def test_the_cache_is_full() -> None:
    """Texts wait until there is room and are what they would be without the bound; what can never fit is refused."""
    prompts = ["Paris is the", "56 * 9 = ", "Anna has 12 apples", "The train", "Rome", "The capital of Italy"]
    with live(small(160)) as server:
        usage: list[float] = []

        async def complete(client: openai.AsyncOpenAI, prompt: str) -> str:
            found = await client.completions.create(model="pair", prompt=prompt, max_tokens=30, temperature=0)
            usage.append(server.metrics()["collm:kv_cache_usage_perc"])
            return found.choices[0].text

        async def ask_all() -> list[str]:
            async with server.asynchronous() as client:
                return await asyncio.gather(*(complete(client, prompt) for prompt in prompts))

        found = asyncio.run(ask_all())
        refused = server.post("/v1/completions", json={"prompt": "Rome", "max_tokens": 200})
        assert refused.status_code == 400 and "max_cache_tokens" in refused.json()["error"]["message"]
        assert any(0 < each < 1 for each in usage) and all(0 <= each <= 1 for each in usage)
        server.wait_idle()
    alone = system(1)
    assert found == [alone.generate(prompt, SamplingParams(max_tokens=30)).text for prompt in prompts]


class ClosedBook(FakeModel):
    """With room for a text of four tokens."""

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(lengths) <= 4


def test_what_can_never_fit_is_refused_whatever_the_model_is_called() -> None:
    """Not taken for a server that is being closed."""
    with live(with_assistant(ClosedBook("closed-book", 320))) as server:
        refused = server.post("/v1/completions", json={"prompt": "Rome", "max_tokens": 200})
        assert refused.status_code == 400 and "cache of closed-book" in refused.json()["error"]["message"]


# -- connections


@contextmanager
def connected(server: Live) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        yield connection


def test_heads_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection on which nothing comes, or a header a day, is closed; also behind a request that was answered."""
    monkeypatch.setattr("collm.serving.connection.HEAD_SECONDS", 0.4)
    with live(fake_pair()) as server:
        host = server.url.removeprefix("http://")
        whole = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        for sent in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: ", whole + b"GET /hea"):
            with connected(server) as connection:
                connection.sendall(sent)
                answer = b"".join(iter(lambda c=connection: c.recv(1 << 16), b""))  # until it is closed
                assert answer.startswith(b"HTTP/1.1 200") == sent.startswith(whole)
        # A pass that takes longer than that is no reason to close.
        server.model(0).seconds = 0.6
        assert ask(server, max_tokens=1).status_code == 200


def test_a_client_that_does_not_read_its_stream() -> None:
    with live(fake_pair(max_model_len=100_000), limits=Limits(stall_timeout=0.5)) as server:
        # Far more than the buffers of a connection hold.
        body = {**CHAT, "max_tokens": 50_000, "n": 16, "stream": True, "logprobs": True, "top_logprobs": 20}
        connection = raw(server, body)
        assert b" 200 " in connection.recv(100)
        server.wait_idle(60)
        assert server.metrics()["collm:http_requests_client_disconnected_total"] == 1
        connection.close()
        assert ask(server).status_code == 200


def test_random_bytes_and_broken_requests() -> None:
    """Good requests that were cut, repeated, overwritten: none is answered by a 500, none stops the server."""
    rng = random.Random(0)
    with live(fake_pair()) as server:
        host = server.url.removeprefix("http://")
        data = json.dumps({**CHAT, "max_tokens": 2, "collm": {"tokens": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        good = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        for _ in range(150):
            spoilt = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(spoilt))
                match rng.randrange(4):
                    case 0:
                        del spoilt[at:]
                    case 1:
                        spoilt[at : at + 1] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
                    case 2:
                        spoilt[at:at] = spoilt[: rng.randint(1, 40)]
                    case 3:
                        del spoilt[at : at + rng.randint(1, 20)]
                if not spoilt:
                    break
            with connected(server) as connection:
                connection.sendall(bytes(spoilt))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(1 << 16)
                assert not answer or answer.split()[1] in (b"200", b"400", b"403", b"404", b"405", b"413", b"501"), (
                    spoilt
                )
        server.wait_idle()
        assert ask(server).status_code == 200


# -- the process


def test_terminated_under_load_it_finishes_what_runs_and_what_waits(tiny_folder: Path) -> None:
    command = [sys.executable, "-m", "collm", "serve", str(tiny_folder), "--assistant", f"helper={tiny_folder}"]
    command += ["--port", "0", "--deferral", "always", "--max-num-seqs", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as it:
        assert it.stdout is not None
        url = next(line.split()[1] for line in it.stdout if line.startswith("listening"))

        async def load() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

                async def one(number: int, begun: asyncio.Event) -> str:
                    stream = await client.completions.create(
                        model="helper", prompt="Rome", max_tokens=150, seed=number, stream=True
                    )
                    text, reason = "", None
                    async for chunk in stream:
                        begun.set()
                        text += chunk.choices[0].text
                        reason = chunk.choices[0].finish_reason or reason
                    assert reason in ("length", "stop")
                    return text

                begun = [asyncio.Event() for _ in range(6)]
                tasks = [asyncio.create_task(one(number, event)) for number, event in enumerate(begun)]
                await asyncio.wait(
                    [asyncio.create_task(event.wait()) for event in begun], return_when="FIRST_COMPLETED"
                )
                while sum(_gauges(url).values()) < 2:
                    await asyncio.sleep(0.01)
                it.send_signal(signal.SIGTERM)
                return await asyncio.gather(*tasks)

        texts = asyncio.run(load())
        assert it.wait(30) == 0
    assert len(set(texts)) == 6
    alone = CollaborativeLM.from_pretrained(tiny_folder)
    expected = [alone.generate("Rome", SamplingParams(max_tokens=150, seed=n, temperature=1)).text for n in range(6)]
    assert texts == expected


def _gauges(url: str) -> dict[str, float]:
    lines = httpx.get(url + "/metrics").text.splitlines()
    found = (line.rpartition(" ") for line in lines if line.startswith("collm:num_requests_"))
    return {name: float(value) for name, _, value in found}
