"""A client that costs little: bare asyncio, a bounded number of connections, on this machine alone.

As a program it takes jobs on standard input, one JSON object a line (`{"url", "bodies", "at_once"}`), and answers each
with one line: for every body its status, seconds to the first token, seconds between tokens, and seconds in all.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Told:
    """One request. `gaps`: between two tokens, in seconds. `status` 0: it was given up."""

    status: int = 0
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    began: float = 0.0
    text: str = ""


async def ask(url: str, body: dict[str, Any], *, leave_after: int | None = None, path: str | None = None) -> Told:
    """One request on a connection of its own; streamed if it says so. `leave_after`: tokens after which to go away."""
    where, told = urlsplit(url), Told(began=time.perf_counter())
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1 << 22)
    try:
        data = json.dumps(body).encode()
        address = path or ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        head = f"POST {address} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        status = int((await reader.readline()).split()[1])
        last = told.began
        if status == 200 and body.get("stream"):
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                tokens = choices[0].get("collm", {}).get("tokens", ()) if choices else ()
                if not tokens:
                    continue
                now = time.perf_counter()
                if told.first is None:
                    told.first = now - told.began
                else:
                    told.gaps.append(now - last)
                last, told.tokens = now, told.tokens + len(tokens)
                told.text += "".join(token["text"] for token in tokens)
                if leave_after is not None and told.tokens >= leave_after:
                    return told
        else:
            if leave_after is not None:
                return told
            rest = await reader.read()
            if status == 200:
                told.tokens = json.loads(rest.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"]
        told.status = status
        return told
    finally:
        told.seconds = time.perf_counter() - told.began
        writer.close()


async def ask_all(url: str, bodies: list[dict[str, Any]], at_once: int) -> list[Told]:
    """In order, at most so many at a time."""
    bound = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any]) -> Told:
        async with bound:
            await asyncio.sleep(body.pop("after", 0.0))
            return await ask(url, body)

    return list(await asyncio.gather(*map(one, bodies)))


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        began = time.perf_counter()
        told = asyncio.run(ask_all(job["url"], job["bodies"], job["at_once"]))
        seconds = time.perf_counter() - began
        print(json.dumps({"seconds": seconds, "told": [asdict(each) for each in told]}), flush=True)


if __name__ == "__main__":
    main()
