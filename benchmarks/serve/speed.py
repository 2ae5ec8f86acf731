"""Tokens/s through the server, beside those of the engine in the same process, in turn; time to the first token."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from systems import load, question, served

from collm.bench.paired import Ratio, in_turn
from collm.llm import CollaborativeLM
from collm.models.local import LocalModel
from collm.sampling_params import SamplingParams

STREAMS = (1, 4, 16)
ASKED = 0.95


class Client:
    """The client, in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("client.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, url: str, bodies: list[dict[str, Any]], at_once: int) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"url": url, "bodies": bodies, "at_once": at_once}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert all(each["status"] == 200 for each in found["told"]), found
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def body(prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {
        **{"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True, "collm": {"tokens": True}},
        **more,
    }


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def forget(llm: CollaborativeLM) -> None:
    """Nothing of earlier texts is in a cache."""
    for model in llm.models:
        if isinstance(model, LocalModel):
            model.forget()


def speed(system: str, rounds: int, tokens: int, texts: int) -> tuple[dict[str, Any], dict[str, Ratio]]:
    """For each number of streams: tokens/s of both, their ratio pair by pair, time to the first token."""
    llm, client = load(system), Client()
    found: dict[str, Any] = {}

    def questions(streams: int, number: int) -> list[str]:
        """Others in each round, and the same for both, so that they write the same texts."""
        rng = random.Random(1000 * streams + number)
        return [question(system, rng) for _ in range(max(streams, texts))]

    ratios: dict[str, Ratio] = {}
    try:
        with served(llm) as url:
            for streams in STREAMS:
                firsts: list[float] = []

                def through_server(number: int, streams: int = streams, firsts: list[float] = firsts) -> float:
                    forget(llm)
                    told = client.run(url, [body(each, tokens) for each in questions(streams, number)], streams)
                    if number:
                        firsts.extend(each["first"] for each in told["told"] if each["first"] is not None)
                    return sum(each["tokens"] for each in told["told"]) / told["seconds"]

                def in_process(number: int, streams: int = streams) -> float:
                    forget(llm)
                    prompts = [[{"role": "user", "content": each}] for each in questions(streams, number)]
                    began = time.perf_counter()
                    done = llm.generate_batch(prompts, SamplingParams(max_tokens=tokens), batch_size=streams)
                    return sum(each.completion_tokens for each in done) / (time.perf_counter() - began)

                runs = in_turn({"server": through_server, "engine": in_process}, rounds)
                pairs = list(zip(runs["server"], runs["engine"], strict=True))
                ratios[f"server : engine, {system}, {streams} streams"] = Ratio.of([a / b for a, b in pairs])
                found[str(streams)] = {
                    "server_tokens_per_second": statistics.median(runs["server"]),
                    "engine_tokens_per_second": statistics.median(runs["engine"]),
                    "first_token_seconds": {"p50": percentile(firsts, 0.5), "p95": percentile(firsts, 0.95)},
                }
                print(f"{streams} streams: {found[str(streams)]}", file=sys.stderr)
    finally:
        client.close()
    return {"system": system, "tokens": tokens, "rounds": rounds, "streams": found}, ratios


def long_prompt(
    system: str, rounds: int, tokens: int, length: int, streams: int
) -> tuple[dict[str, Any], dict[str, Ratio]]:
    """What a long prompt does to the gaps between the tokens of short texts that are being written."""
    llm, client, rng = load(system), Client(), random.Random(0)
    try:
        with served(llm) as url:

            def gaps(number: int, long: bool) -> float:
                bodies = [body(question(system, rng), tokens, collm={"tokens": True}) for _ in range(streams)]
                # Nothing ends early, so that there is somebody to be disturbed all the while.
                if long:
                    bodies.append(body(question(system, rng, length), 4, after=1.0))
                told = client.run(url, bodies, streams + 1)["told"][:streams]
                return percentile([gap for each in told for gap in each["gaps"]], 0.95)

            runs = in_turn(
                {"with": lambda number: gaps(number, True), "without": lambda number: gaps(number, False)}, rounds
            )
    finally:
        client.close()
    pairs = list(zip(runs["with"], runs["without"], strict=True))
    name = f"p95 between tokens, with : without a prompt of {length} tokens, {system}"
    seconds = {which: statistics.median(found) for which, found in runs.items()}
    found = {"system": system, "streams": streams, "length": length, "rounds": rounds, "p95_seconds": seconds}
    return found, {name: Ratio.of([a / b for a, b in pairs])}
