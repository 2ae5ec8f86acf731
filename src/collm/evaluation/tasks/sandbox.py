"""Python programs that a model wrote, shut in by Debian's bubblewrap: limits of time, memory and files, no network.

Each program gets a process of its own, in namespaces of its own: it sees the system's libraries and this Python's
standard library, read-only, and an empty folder in memory. It has passed only if it says so at its very end, by a word
that is drawn anew each time: a program that exits early has not. This keeps accidents in; a program that is written to
fool its own judge could.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from collm.errors import CollmError

READY = "ready"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_LINKER = "/etc/ld.so.cache"
_HOME = "/tmp"
# Neither installed packages nor the folder it runs in. Not -I: that would ignore the seed of hashes, too.
_ISOLATED = ("-s", "-S", "-P", "-X", "utf8")

# What the program's process does first: it has no way back to the caller's files, and its limits cannot be raised.
# The program is a module, for dataclasses look their own up, and is not "__main__": no demonstration runs.
_BOOT = """
import json, os, resource, sys, types
told = json.loads(sys.stdin.buffer.read())
out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
for name, value in told["limits"].items():
    resource.setrlimit(getattr(resource, name), (value, value))
os.write(out, told["ready"].encode() + b"\\n")
module = sys.modules["answer"] = types.ModuleType("answer")
try:
    for source in told["sources"]:
        exec(compile(source, "<answer>", "exec"), module.__dict__)
except BaseException:
    os._exit(1)
os.write(out, told["passed"].encode() + b"\\n")
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """Of one program. `seconds` of the processor; three times as many may pass on the clock, for machines are busy."""

    seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 1 << 24
    processes: int = 64

    def resources(self) -> dict[str, int]:
        """By their names in `resource`."""
        return {
            "RLIMIT_CPU": self.seconds,
            "RLIMIT_AS": self.memory,
            "RLIMIT_FSIZE": self.file_size,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }


LIMITS = Limits()


def passes(sources: Sequence[str], *, sandboxed: bool = True, limits: Limits = LIMITS) -> bool:
    """Whether the sources, run one after the other in one module, all end without an exception and within limits.

    Args:
        sandboxed: False runs them as the user, with the user's files and network; the limits stay.

    Raises:
        CollmError: the sandbox cannot run here.
    """
    if sandboxed:
        require_sandbox()
    said = _said(sources, sandboxed, limits)
    if said is None:
        raise CollmError(
            "a program could not be started for want of processes, memory or time; what is finished is kept: free "
            "some, and run the same again"
        )
    return said


def _said(sources: Sequence[str], sandboxed: bool, limits: Limits) -> bool | None:
    """None where not even the first word came."""
    passed = secrets.token_hex(16)
    # Without NPROC where the user's other processes would count.
    resources = {name: value for name, value in limits.resources().items() if sandboxed or name != "RLIMIT_NPROC"}
    told = {"limits": resources, "ready": READY, "passed": passed, "sources": list(sources)}
    python = [_python(), *_ISOLATED, "-c", _BOOT]
    command = [*_walls(limits), *python] if sandboxed else python
    environment = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0", "HOME": _HOME, "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=_HOME,
        env=environment,
        start_new_session=True,
    )
    try:
        try:
            out, _ = process.communicate(json.dumps(told).encode(), timeout=3 * limits.seconds)
        except subprocess.TimeoutExpired as error:
            if not (error.output or b"").startswith(READY.encode()):
                return None  # the machine was too slow, not the program
            # Nor may a slow start take the program's time.
            out, _ = process.communicate(timeout=3 * limits.seconds)
    except subprocess.TimeoutExpired:
        return False
    finally:
        _end(process)
    lines = out.decode(errors="replace").splitlines()
    return None if READY not in lines[:1] else lines[-1] == passed


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill it if it still runs, with its group; the sandbox's processes go with the first of them."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def _python() -> str:
    """This interpreter itself, not its name in a virtual environment."""
    return str(Path(getattr(sys, "_base_executable", "") or sys.executable).resolve())


def _walls(limits: Limits) -> list[str]:
    """bubblewrap's command line: a root that holds libraries and Python, read-only, and an empty folder in memory."""
    arguments = ["bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    arguments += ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
    for name in _SYSTEM:
        if os.path.islink(name):
            arguments += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            arguments += ["--ro-bind", name, name]
    if os.path.exists(_LINKER):
        arguments += ["--ro-bind", _LINKER, _LINKER]
    home = str(Path(sys.base_prefix).resolve())
    if not Path(home).is_relative_to("/usr"):
        arguments += ["--ro-bind", home, home]
    return [*arguments, "--dev", "/dev", "--size", str(4 * limits.file_size), "--tmpfs", _HOME, "--chdir", _HOME]


def require_sandbox() -> None:
    """Raises CollmError where bubblewrap is missing, or cannot shut a program in."""
    wrong = _what_is_wrong()
    if wrong:
        raise CollmError(
            f"programs that a model wrote run in a sandbox, and {wrong}; or give --unsandboxed, and they run as you, "
            "with your files and your network"
        )


@cache
def _what_is_wrong() -> str:
    """Nothing, or in words what keeps the sandbox from running: tried once."""
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed: apt-get install bubblewrap (Linux only)"
    command = [*_walls(LIMITS), _python(), *_ISOLATED, "-c", f"print({READY!r})"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap does not run here ({error})"
    if done.stdout.strip() != READY:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"bubblewrap does not run here ({lines[-1]}): it needs user namespaces, which containers often forbid"
    return ""
