"""A vLLM in small for tests: tiny transformers models behind its API, on a socket of 127.0.0.1, with the plugin's own
decisions; and a llama.cpp. What goes wrong with servers is put in as a script."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import uvicorn
from conftest import make_model, make_tokenizer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.models.checkpoint import save_checkpoint
from collm.models.export import export
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo
from collm.models.loading import load_tokenizer
from collm.models.served import ServedInfo
from collm.serving.server import address, bind
from collm.vllm_plugin.columns import Gate
from collm.vllm_plugin.request import rule

EOS = 2


@dataclass(frozen=True)
class Trouble:
    """What happens to one completion instead of an answer: a status, or so many tokens and then `then`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    then: str = ""
    """`hang`, `cut`, `garbage`, `ids` (tokens nobody has), `text` (no token ids)."""


class Served:
    """One server and its model. `troubles`: for the next completions, one each; `always`: for all."""

    def __init__(
        self,
        network: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        info: ServedInfo | None = None,
        *,
        name: str = "base",
        plugin: bool = True,
        max_model_len: int = 256,
    ) -> None:
        self.network, self.tokenizer, self.info, self.name = network, tokenizer, info, name
        self.plugin, self.max_model_len = plugin, max_model_len
        self.repetition_penalty = 1.0
        """Of the model's generation config, where a request does not say."""
        self.troubles: deque[Trouble] = deque()
        self.always: Trouble | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.seconds_per_token = 0.0
        self.buffers = False
        """As a proxy in between may: an answer comes as one piece."""
        self.port = 0
        self.url = ""

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/version", self._version),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    async def _models(self, request: Request) -> Response:
        self.keys.append(request.headers.get("Authorization"))
        return JSONResponse({"data": [{"id": self.name, "max_model_len": self.max_model_len}]})

    async def _version(self, request: Request) -> Response:
        return JSONResponse({"version": "0.32.0"})

    async def _tokenize(self, request: Request) -> Response:
        text = (await request.json())["prompt"]
        return JSONResponse({"tokens": self.tokenizer.encode(text, add_special_tokens=False)})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        trouble = self.troubles.popleft() if self.troubles else self.always or Trouble()
        if trouble.status != 200:
            return JSONResponse({"error": {"message": "trouble"}}, trouble.status, trouble.headers)
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            return JSONResponse({"error": {"message": "longer than the context"}}, 400)
        try:
            found = rule(body.get("vllm_xargs"), self.info)
        except CollmError as error:
            return JSONResponse({"error": {"message": str(error)}}, 400)
        if "prompt_logprobs" in body:
            return JSONResponse(self._score(body["prompt"]))
        stream = self._stream(body, found, trouble)
        if self.buffers:
            return Response("".join([piece async for piece in stream]), media_type="text/event-stream")
        return StreamingResponse(stream, media_type="text/event-stream")

    @torch.inference_mode()
    def _logits(self, ids: Sequence[int]) -> Tensor:
        return self.network(torch.tensor([ids])).logits[0]

    def _score(self, ids: list[int]) -> dict[str, Any]:
        law = torch.log_softmax(self._logits(ids), dim=-1)
        told: list[Any] = [None]
        for i, number in enumerate(ids[1:]):
            rank = 1 + int((law[i] > law[i, number]).sum())
            told.append({str(number): {"logprob": float(law[i, number]), "rank": rank}})
        return {"choices": [{"text": "", "finish_reason": "length", "token_ids": [5], "prompt_logprobs": told}]}

    async def _stream(self, body: dict[str, Any], found: Any, trouble: Trouble) -> AsyncIterator[str]:
        ids, count = list(body["prompt"]), body["max_tokens"]
        noise = torch.Generator().manual_seed(body.get("seed", 0))
        ends = {EOS, *body.get("stop_token_ids", ())}
        gate = None if self.info is None or not self.plugin else Gate(self.info, torch.device("cpu"))
        for n in range(count):
            if trouble.then and n == trouble.after:
                if trouble.then == "hang":
                    await asyncio.sleep(3600)
                if trouble.then == "cut":
                    raise ConnectionResetError("cut")
                yield "data: <html>all is well</html>\n\n"
                return
            if self.seconds_per_token:
                await asyncio.sleep(self.seconds_per_token)
            raw = self._logits(ids)[-1:].clone()
            law = torch.log_softmax(raw[0], dim=-1)
            if gate is not None:
                signals, cuts = torch.tensor([found.signal]), torch.tensor([found.cut])
                raw = gate.decide(raw, signals, cuts, defers=found.defers, reads_law=found.reads_law)
            penalty, seen = body.get("repetition_penalty", self.repetition_penalty), sorted(set(ids))
            raw[0, seen] = torch.where(raw[0, seen] > 0, raw[0, seen] / penalty, raw[0, seen] * penalty)
            hot = body["temperature"]
            number = int(torch.multinomial((raw[0] / hot).softmax(-1), 1, generator=noise) if hot else raw[0].argmax())
            ids.append(number)
            watched = body.get("logprob_token_ids")
            top = watched or law.topk(body["logprobs"]).indices.tolist()
            told = {f"token_id:{t}": float(law[t]) for t in [number, *top]}
            finish = "stop" if number in ends else "length" if n + 1 == count else None
            if trouble.then == "ids":
                number = 100_000
            logprobs = {"token_logprobs": [float(law[ids[-1]])], "top_logprobs": [told]}
            choice = {"index": 0, "text": "x", "logprobs": logprobs, "finish_reason": finish, "token_ids": [number]}
            if trouble.then == "text":
                del choice["token_ids"]
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            if finish:
                break
        yield "data: [DONE]\n\n"


@contextmanager
def listening(*servers: Served, **ssl: Any) -> Iterator[None]:
    """They answer, each on a port of its own (`url`)."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []
    try:
        for served in servers:
            taken = bind("127.0.0.1", served.port)
            served.url = address(taken)
            served.port = int(served.url.rpartition(":")[2])  # where it comes back, if it does
            if ssl:
                served.url = served.url.replace("http:", "https:")
            config = uvicorn.Config(
                served.app, log_config=None, access_log=False, timeout_graceful_shutdown=0, lifespan="off", **ssl
            )
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
            thread.start()
            running.append((server, thread))
        until = time.monotonic() + 20
        while not all(server.started for server, _ in running):
            assert time.monotonic() < until
            time.sleep(0.01)
        yield
    finally:
        for server, _ in running:
            server.should_exit = True
            server.force_exit = True
        for _, thread in running:
            thread.join(5)


def row(rate: float, cut: float) -> CalibrationRow:
    return CalibrationRow(target_rate=rate, achieved_rate=rate, threshold=0.5, log_odds=cut, metric_value=0.0)


TABLE = CalibrationTable(task="gsm8k", metric="accuracy", seed=0, num_prompts=1, rows=[row(0.2, 1.5), row(0.6, -0.5)])


@dataclass
class Pair:
    """A checkpoint, its export, its assistants' folders; and all of them as servers that do not listen yet."""

    checkpoint: Path
    exported: Path
    assistants: list[Path]
    base: Served
    others: list[Served]


def make_pair(root: Path, num_assistants: int) -> Pair:
    tokenizer = make_tokenizer()
    paths = []
    for k in range(num_assistants):
        paths.append(root / f"expert{k}")
        make_model(seed=k + 1, num_hidden_layers=1).save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    torch.manual_seed(5)
    head = DeferralHead(32, num_assistants)
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.normal_(head.bias, std=0.5)
    infos = [AssistantInfo(name=path.name, spec=str(path)) for path in paths]
    info = CheckpointInfo(assistants=infos, calibration=[TABLE])
    save_checkpoint(root / "checkpoint", info, make_model(num_hidden_layers=1), head, tokenizer)
    export(root / "checkpoint", root / "exported")
    exported = AutoModelForCausalLM.from_pretrained(root / "exported")
    served = ServedInfo.from_config(json.loads((root / "exported" / "config.json").read_text())["collm"])
    base = Served(exported, load_tokenizer(str(root / "exported")), served)
    others = [Served(AutoModelForCausalLM.from_pretrained(path), tokenizer, name=path.name) for path in paths]
    return Pair(root / "checkpoint", root / "exported", paths, base, others)
