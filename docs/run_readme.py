"""Run what the README tells people to type, verbatim, with tiny models where it says "your own"; times are printed.

`make demo`, `make weights` and `pip install` are run by CI for themselves. Commands that name a folder of
`make weights-qwen` are run where it is there (they take 5 GB of memory) and told of where it is not.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WEIGHTS = "weights"
"""What `make weights-qwen` fills, as the README's commands name it."""


def commands(text: str) -> list[str]:
    """Every command `collm` in a block without a language; continued lines are joined."""
    blocks = [block for kind, block in FENCE.findall(text) if not kind]
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    return [line for line in lines if line.startswith("collm ")]


def missing(line: str, root: Path = ROOT) -> list[str]:
    """The folders of weights that a command names and that are not there."""
    named = [word.rpartition("=")[2] for word in shlex.split(line)]
    return [path for path in named if path.startswith(f"{WEIGHTS}/") and not (root / path / "config.json").exists()]


def prepare(folder: Path) -> None:
    """What a reader of the README has: `base`, `expert`, `examples.jsonl`, a clone's folders, a command `collm`."""
    for name in ("pretrained", WEIGHTS):
        (folder / name).symlink_to(ROOT / name)
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    for seed, name in enumerate(("base", "expert")):
        make_model(seed=seed, max_position_embeddings=64).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for n in range(80):
        left, right = n + 3, n % 7
        turns = [("user", f"What is {left} + {right}?"), ("assistant", f"{left + right}\n#### {left + right}")]
        messages = [{"role": role, "content": content} for role, content in turns]
        rows.append({"messages": messages, "answer": str(left + right)})
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bin").mkdir()
    (folder / "bin" / "collm").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m collm "$@"\n')
    (folder / "bin" / "collm").chmod(0o755)


def run(line: str, folder: Path, environment: dict[str, str], stdin: str = "") -> None:
    begin = time.monotonic()
    done = subprocess.run(
        ["bash", "-ec", line], cwd=folder, env=environment, input=stdin, text=True, capture_output=True
    )
    print(f"{time.monotonic() - begin:6.1f} s  {line}", flush=True)
    if done.returncode:
        sys.exit(f"Error: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def served(line: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A server, once it answers."""
    begin = time.monotonic()
    server = subprocess.Popen(["bash", "-ec", f"exec {line}"], cwd=folder, env=environment)
    while server.poll() is None and time.monotonic() - begin < 180:
        try:
            with urllib.request.urlopen("http://127.0.0.1:8000/health", timeout=5):
                print(f"{time.monotonic() - begin:6.1f} s  {line}    (until it answered)", flush=True)
                return server
        except OSError:
            time.sleep(0.5)
    server.kill()
    sys.exit(f"Error: {line}: no answer within three minutes")


def main() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    python = [text for kind, text in FENCE.findall(readme) if kind == "python"]
    server: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
        try:
            for line in commands(readme):
                if lacks := missing(line):
                    print(
                        f"   skipped  {line}    (no {' and '.join(lacks)}: `make weights-qwen` brings them)", flush=True
                    )
                elif line.startswith("collm serve"):
                    server = served(line, folder, environment)
                else:
                    run(line, folder, environment, "What is 1 + 2?\n" if line.startswith("collm chat") else "")
        finally:
            if server is not None:
                server.terminate()
                server.wait(timeout=60)
    for text in python:
        begin = time.monotonic()
        done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, env=environment, text=True, capture_output=True)
        print(f"{time.monotonic() - begin:6.1f} s  the README's Python: {done.stdout.strip()!r}")
        if done.returncode:
            sys.exit(f"Error: does `make weights` come first?\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    main()
