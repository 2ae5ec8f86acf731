"""Specs of models behind servers: `vllm+http://host:8000?model=NAME`, `llamacpp+https://...`, `openai+http://...`.

After the `?`, joined by `&`: `model=NAME` (needed only where a server has several), `replica=http://other:8000`
(repeat it for several servers of the same model), `key_env=VARIABLE` (whose value is sent as a bearer token), `ca=FILE`
(certificates to trust), `timeout=SECONDS` (until the next token), `tokenizer=SPEC` (whose tokenizer and chat template
the model has; for an assistant, the base's unless it is given), `closing=approximate` (of a model that has not the
base's tokenizer: it is asked about code, too, although servers tell no closing factors).

A key never stands in a spec: specs are kept in checkpoints, results and logs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import parse_qsl, urlsplit

from collm.errors import CollmError, nearest

Kind = Literal["vllm", "llamacpp", "openai"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SETTINGS = ("model", "replica", "key_env", "ca", "timeout", "tokenizer", "closing")
APPROXIMATE = "approximate"
TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a model is served, and how it is asked there."""

    kind: Kind
    urls: tuple[str, ...]
    model: str | None = None
    key_env: str | None = None
    ca: str | None = None
    timeout: float = TIMEOUT
    tokenizer: str | None = None
    closing: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Address:
        """Raises:
        CollmError: no such kind of server, an unknown setting, or a key in the URL.
        """
        scheme, _, rest = spec.partition("://")
        kind, sign, protocol = scheme.rpartition("+")
        if kind not in KINDS:
            known = ", ".join(f"{name}+{protocol}" for name in KINDS)
            asked = f"{kind}{sign}{protocol}"
            raise CollmError(f"{asked}://...: say what kind of server it is; there are {known}")
        address, _, query = rest.partition("?")
        settings = parse_qsl(query, keep_blank_values=True)
        for name, value in settings:
            if name not in SETTINGS:
                hint = nearest(name, SETTINGS, f"there are {', '.join(SETTINGS)}")
                raise CollmError(f"{scheme}://{_shown(address)}: there is no setting {name!r}; {hint}")
            if not value:
                raise CollmError(f"{scheme}://{_shown(address)}: {name} is empty")
        single = dict(settings)
        replicas = [value for name, value in settings if name == "replica"]
        if len(settings) != len(single) + max(0, len(replicas) - 1):
            raise CollmError(f"{scheme}://{_shown(address)}: a setting is given twice; only replica may be")
        try:
            timeout = float(single.get("timeout", TIMEOUT))
        except ValueError:
            timeout = 0.0
        if not 0 < timeout < float("inf"):
            raise CollmError(f"{scheme}://{_shown(address)}: timeout is a number of seconds, not {single['timeout']!r}")
        if single.get("closing", APPROXIMATE) != APPROXIMATE:
            raise CollmError(
                f"{scheme}://{_shown(address)}: closing is {APPROXIMATE} or left out, not {single['closing']!r}"
            )
        urls = tuple(_url(url) for url in (f"{protocol}://{address}", *replicas))
        if "ca" in single and not Path(single["ca"]).is_file():
            raise CollmError(f"{urls[0]}: there is no file {single['ca']} with certificates (ca)")
        return cls(
            kind,
            urls,
            single.get("model"),
            single.get("key_env"),
            single.get("ca"),
            timeout,
            single.get("tokenizer"),
            single.get("closing"),
        )

    def key(self) -> str | None:
        """The bearer token, from the environment.

        Raises:
            CollmError: the variable is not set.
        """
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env)
        if not key:
            raise CollmError(f"{self.urls[0]}: the environment variable {self.key_env} (key_env) is not set")
        return key


def _url(text: str) -> str:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise CollmError(f"{_shown(text)} is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise CollmError(f"{_shown(text)} is no URL of a server: it must look like http://host:8000")
    if "@" in parts.netloc:
        raise CollmError(
            f"{_shown(text)}: a key does not belong into a URL, which is kept in files and logs; put it into an "
            "environment variable and name that (key_env=VARIABLE)"
        )
    if port == 0 or parts.query or parts.fragment:
        raise CollmError(f"{_shown(text)} is no URL of a server: it must look like http://host:8000")
    return text.rstrip("/")


def _shown(text: str) -> str:
    """Without what stands before an `@`, which may be a password."""
    before, sign, after = text.rpartition("@")
    if not sign:
        return text
    scheme, slashes, _ = before.partition("://")
    return f"{scheme}://...@{after}" if slashes else f"...@{after}"
