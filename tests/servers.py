"""Live servers for tests: a thread with uvicorn on 127.0.0.1, fake models, the official client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
from tiny import make_tokenizer

from collm.data.formatting import Formatter
from collm.llm import CollaborativeLM
from collm.models.codec import BYTES
from collm.models.fake import FakeModel
from collm.serving.app import make_app
from collm.serving.limits import Access, Limits
from collm.serving.server import address, bind, make_server
from collm.values import GREEDY, Answer, Draw, Query, Replies, Reply

V = 320


class SlowModel(FakeModel):
    """A fake whose passes take `seconds`, wait while the model is held, and fail after `fails_after` more of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds = 0.0
        self.fails_after: int | None = None
        self._free = threading.Event()
        self._free.set()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    def predict(self, queries: Sequence[Query]) -> Replies:
        self._free.wait(60)
        if self.seconds:
            time.sleep(self.seconds)
        if self.fails_after is not None:
            self.fails_after -= 1
        if self.fails_after is not None and self.fails_after < 0:
            raise RuntimeError("its cables were cut")
        return super().predict(queries)


def fake_pair(seconds: float = 0.0, eos: bool = False, **kwargs: Any) -> CollaborativeLM:
    """A base with a gate and an assistant that agree at half of all places; passes are timed, as served."""
    tokenizer = make_tokenizer()
    ends = frozenset({tokenizer.eos_token_id}) if eos else frozenset()
    shared: dict[str, Any] = {"agreement": 0.5, "concentration": 0.05, "eos_token_ids": ends}
    models = [SlowModel("base", V, num_assistants=1, **shared), SlowModel("helper", V, **shared)]
    for model in models:
        model.seconds = seconds
    return CollaborativeLM(models, [Formatter(tokenizer)] * 2, **{"timeout": 60, **kwargs})


class Saying(FakeModel):
    """It writes these tokens, whatever it is asked."""

    def __init__(self, token_ids: Sequence[int], eos_token_ids: frozenset[int]) -> None:
        super().__init__("base", V, concentration=0.05, eos_token_ids=eos_token_ids)
        self.token_ids = token_ids

    def answer(self, token_ids: Sequence[int], draw: Draw = GREEDY, position: int = 0) -> Reply:
        found = super().answer(token_ids, draw, position)
        assert isinstance(found, Answer)
        return found._replace(token_id=self.token_ids[position])


def saying(*said: str | bytes) -> CollaborativeLM:
    """A single model that writes texts, bytes, and special tokens where they are named, and then its end."""
    tokenizer = make_tokenizer()
    ids = [number for each in said for number in _ids(tokenizer, each)]
    model = Saying([*ids, tokenizer.eos_token_id], frozenset({tokenizer.eos_token_id}))
    return CollaborativeLM([model], [Formatter(tokenizer)], timeout=60)


def _ids(tokenizer: Any, said: str | bytes) -> list[int]:
    if isinstance(said, str):
        return list(tokenizer.encode(said, add_special_tokens=False))
    names = {byte: name for name, byte in BYTES.items()}
    return [tokenizer.convert_tokens_to_ids(names[byte]) for byte in said]


@dataclass
class Live:
    """A server that listens. `fresh` makes another client of it."""

    url: str
    llm: CollaborativeLM
    stop: Callable[[], None]

    def model(self, number: int) -> SlowModel:
        found = self.llm.models[number]
        assert isinstance(found, SlowModel)
        return found

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def asynchronous(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def post(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **kwargs)

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name; those of several labels are added up."""
        found: dict[str, float] = {}
        for name, value in self.samples().items():
            found[name.partition("{")[0]] = found.get(name.partition("{")[0], 0.0) + value
        return found

    def samples(self) -> dict[str, float]:
        """Every sample, by its name and labels."""
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def wait_idle(self, seconds: float = 10) -> None:
        """Until nothing runs or waits."""
        until = time.monotonic() + seconds
        gauges = ("collm:num_requests_running", "collm:num_requests_waiting", "collm:kv_cache_usage_perc")
        while any(self.metrics()[name] for name in gauges):
            assert time.monotonic() < until, {name: self.metrics()[name] for name in gauges}
            time.sleep(0.05)


@contextmanager
def live(
    llm: CollaborativeLM,
    name: str = "pair",
    limits: Limits | None = None,
    access: Access | None = None,
    **kwargs: Any,
) -> Iterator[Live]:
    listening = bind("127.0.0.1", 0)
    server = make_server(make_app(llm, name, limits=limits, access=access, **kwargs), timeout_graceful_shutdown=5)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.01)

    def stop() -> None:
        server.should_exit = True
        thread.join(20)

    try:
        yield Live(address(listening), llm, stop)
    finally:
        stop()
        assert not thread.is_alive()
