"""Tests against real servers on this machine's CPU: `make test-servers`.

The tests run in `.venv`, so that they can compare with this package's own models; each server has a virtual environment
of its own under `.venvs`. They are no part of `make test`. One server runs at a time, on 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from loudly import pytest_terminal_summary as pytest_terminal_summary
from loudly import skip_loudly

from collm.remote import Address, Client

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
ON_GPU = os.environ.get("SERVER_TESTS_ON") == "cuda"
START_TIMEOUT = 400.0
"""Seconds; on an idle machine, vLLM takes about 40."""


def python_of(server: str) -> Path:
    """The Python of a server's environment: in `.venvs/vllm`, `.venvs/llamacpp`; or what `VLLM_PYTHON` says."""
    python = ROOT / ".venvs" / server / "bin" / "python"
    python = Path(os.environ.get(f"{server.upper()}_PYTHON", python))
    assert python.is_file(), f"there is no {python}: make test-servers makes it"
    return python


def has_avx512() -> bool:
    """The wheel of vLLM for CPUs was tried with it alone."""
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and "avx512f" in cpu.read_text()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class NotStarted(AssertionError):
    """With the end of the server's log."""


@contextmanager
def running(command: list[str], log: Path, ready: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server from when its log holds `ready` until the block ends."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True
        )
        try:
            end = time.monotonic() + START_TIMEOUT
            while ready not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise NotStarted(f"status {process.poll()}:\n{log.read_text()[-5000:]}")
                time.sleep(0.3)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextmanager
def vllm(exported: Path, *flags: str) -> Iterator[str]:
    """`collm vllm-serve` on an export, as model `base`; the URL. Small, and without compiling anything."""
    port = free_port()
    small = ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", "128M", "--max-num-seqs", "64"]
    command = [str(python_of("vllm")), "-m", "collm", "vllm-serve", str(exported), "--port", str(port), *small, *flags]
    environment = {"VLLM_NO_USAGE_STATS": "1"}
    if not ON_GPU:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1"}
    with ExitStack() as stack:
        log = exported.parent / "vllm.log"
        try:
            named = [*command, "--served-model-name", "base"]
            stack.enter_context(running(named, log, "ready: base on", **environment))
        except NotStarted as error:
            if has_avx512() or ON_GPU:
                raise
            skip_loudly(f"vLLM's wheel for CPUs does not run on this one, which lacks AVX-512:\n{str(error)[-800:]}")
        yield f"http://127.0.0.1:{port}"


def ask(spec: str, what: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """Run something with a client of a server."""

    async def main() -> T:
        async with Client(Address.parse(spec)) as client:
            await client.card()
            return await what(client)

    return asyncio.run(main())
