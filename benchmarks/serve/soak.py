"""Mixed load for a while, with clients that go away: what is served, refused, and what the process holds."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

from client import ask
from systems import question

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def start(system: str, pass_seconds: float) -> tuple[subprocess.Popen[str], str]:
    """The server as a process of its own, and its address."""
    command = [sys.executable, str(Path(__file__).with_name("systems.py")), system, "--pass-seconds", str(pass_seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def sample(process: int, url: str) -> dict[str, float]:
    """Memory, file descriptors and threads of the process, and the gauges of the server."""
    status = Path(f"/proc/{process}/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    with urllib.request.urlopen(url + "/metrics", timeout=30) as answer:
        metrics = answer.read().decode()
    gauges = {
        name: float(line.rpartition(" ")[2])
        for line in metrics.splitlines()
        for name in GAUGES
        if line.startswith(f"collm:{name}{{")
    }
    return {
        "mb": int(lines["VmRSS"].split()[0]) / 1024,
        "threads": int(lines["Threads"]),
        "fds": len(os.listdir(f"/proc/{process}/fd")),
        **gauges,
    }


def request(system: str, rng: random.Random, tokens: int) -> tuple[dict[str, Any], int | None, str | None]:
    """A request of one of many kinds, the token after which its client goes away, and where it goes."""
    kind = rng.choices(
        ["stream", "whole", "several", "log-probs", "leaves", "leaves whole", "wrong", "method", "others"],
        [30, 15, 8, 8, 15, 6, 6, 8, 4],
    )[0]
    prompt, stream = question(system, rng, rng.choice([0, 0, 0, 200])), kind in ("stream", "leaves", "method")
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": rng.randint(1, tokens),
        "temperature": rng.choice([0, 0.7]),
        "seed": rng.randrange(1 << 30),
        "stream": stream,
        "collm": {"tokens": True},
    }
    if kind == "several":
        body["n"] = 3
    elif kind == "log-probs":
        body |= {"logprobs": True, "top_logprobs": 5}
    elif kind == "method":
        body["collm"]["method"] = rng.choice(["sampled", "compose", "never", "always"])
    elif kind == "wrong":
        body["temprature"] = 1
    elif kind == "others":
        ids = [rng.randrange(3, 200) for _ in range(20)]
        return {"prompt": prompt, "token_ids": ids, "stream": True}, None, "/v1/collm/others"
    leaves = rng.randint(1, 5) if kind == "leaves" else 0 if kind == "leaves whole" else None
    return body, leaves, None


async def load(
    url: str, system: str, process: int, seconds: float, requests: int, at_once: int, tokens: int, pause: float
) -> dict[str, Any]:
    """Requests until both `seconds` have passed and so many have been made."""
    rng, outcomes, samples = random.Random(0), Counter[str](), list[dict[str, float]]()
    began, made = time.monotonic(), 0

    def going() -> bool:
        return time.monotonic() - began < seconds or made < requests

    async def worker() -> None:
        nonlocal made
        while going():
            body, leaves, path = request(system, rng, tokens)
            if path is not None:
                del body["stream"]
            made += 1
            try:
                told = await asyncio.wait_for(_asked(url, body, leaves, path), 300)
                outcomes["left" if told == 0 else str(told)] += 1
            except (TimeoutError, OSError, ValueError, IndexError) as error:
                outcomes[f"{type(error).__name__}: {error}"[:100]] += 1

    async def watch() -> None:
        while going():
            samples.append(await asyncio.to_thread(sample, process, url))
            await asyncio.sleep(pause)

    await asyncio.gather(watch(), *(worker() for _ in range(at_once)))
    lasted = time.monotonic() - began
    until = time.monotonic() + 10
    while True:  # the places of those who went away are free within ten seconds
        last = await asyncio.to_thread(sample, process, url)
        if not any(last[name] for name in GAUGES) or time.monotonic() > until:
            break
        await asyncio.sleep(0.1)
    freed = 10 - (until - time.monotonic())
    quarter = max(1, len(samples) // 4)
    # What is made once (caches, threads) has been made after the first quarter.
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    flat = {
        name: [statistics.median(each[name] for each in part) for part in (early, late)]
        for name in ("mb", "fds", "threads")
    }
    return {
        "system": system,
        "seconds": lasted,
        "requests": made,
        "at_once": at_once,
        "outcomes": dict(outcomes.most_common()),
        "second_and_last_quarter": flat,
        "mb": [round(each["mb"]) for each in samples],
        "idle": last,
        "seconds_until_free": freed,
    }


async def _asked(url: str, body: dict[str, Any], leaves: int | None, path: str | None) -> int:
    if path is not None:
        # Its answer has no usage; that it is answered is enough.
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        import json

        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status
    told = await ask(url, body, leave_after=leaves)
    return told.status


def soak(system: str, seconds: float, requests: int, at_once: int, tokens: int, pass_seconds: float) -> dict[str, Any]:
    process, url = start(system, pass_seconds)
    try:
        pause = max(1.0, seconds / 60)
        found = asyncio.run(load(url, system, process.pid, seconds, requests, at_once, tokens, pause))
        process.send_signal(signal.SIGTERM)
        found["exit"] = process.wait(60)
        return found
    finally:
        if process.poll() is None:
            process.kill()
