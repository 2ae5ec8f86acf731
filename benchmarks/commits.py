"""This checkout beside another commit of it, each measured in processes of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent


@contextmanager
def sources(against: str | None) -> Iterator[list[Path]]:
    """The folder of this checkout's package and, where a commit is named, of that commit's."""
    if against is None:
        yield [ROOT / "src"]
        return
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "other"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", checkout, against], check=True)
        try:
            yield [ROOT / "src", checkout / "src"]
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", checkout], check=True)


def environment(source: Path) -> dict[str, str]:
    """Of a process that imports the package from there, and computes with one thread."""
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
