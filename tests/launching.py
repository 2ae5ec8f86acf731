"""Two processes that train together, as a launcher starts them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence


def on_two_processes(command: Sequence[str], *, timeout: float = 240, code: int = 0, **environment: str) -> list[str]:
    """Run the command once for each rank, over gloo on this machine; both must end with `code`.

    Returns:
        What each said on stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    said: list[str] = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(command, env={**os.environ, **ranks, **environment}, stderr=subprocess.PIPE))
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            said.append(errors.decode())
            assert process.returncode == code, said[-1][-3000:]
    finally:
        for process in processes:
            process.kill()
    return said
