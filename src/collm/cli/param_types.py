"""What a word of the command line may be, and what is said of one that it may not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from collm.errors import CollmError, nearest
from collm.files import require_place

EXISTING = click.Path(exists=True, path_type=Path)


class Output(click.Path):
    """A place for what is written; one that cannot be written is a usage error at once."""

    def __init__(self, folder: bool | None = None) -> None:
        super().__init__(path_type=Path)
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        try:
            require_place(path, folder=self.folder)
        except CollmError as error:
            self.fail(str(error), param, ctx)
        return path


OUTPUT, OUTPUT_FILE, OUTPUT_FOLDER = Output(), Output(folder=False), Output(folder=True)


class JsonObject(click.ParamType):  # type: ignore[type-arg]
    """A JSON object on the command line."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = json.loads(value)
        except (ValueError, RecursionError) as error:
            self.fail(f"{value!r} is no JSON ({error})", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object", param, ctx)
        return found


class Named(click.Choice[str]):
    """A choice among many names: whoever misspells one is told the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = nearest(str(value), map(str, self.choices))
            self.fail(f"{error.message.rstrip('.')}{hint and '; '}{hint or '.'}", param, ctx)


class Device(click.ParamType):  # type: ignore[type-arg]
    """A name that torch has for a device; others than the usual ones are judged by torch itself."""

    name = "device"
    USUAL = ("auto", "cpu", "cuda", "mps", "xpu")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind, colon, number = str(value).partition(":")
        hint = "" if kind in self.USUAL else nearest(kind, self.USUAL)
        if hint or not kind.isidentifier() or (colon and not number.isdecimal()):
            self.fail(f"there is no device {value!r}; {hint or 'use cpu, cuda, cuda:1, mps or auto'}", param, ctx)
        return str(value)


class CacheSize(click.ParamType):  # type: ignore[type-arg]
    """A number of tokens, or a share of the memory."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            # 1 is a token, and 1.0 might be meant as all of the memory: it is neither.
            found: int | float = int(value) if str(value).isdecimal() else float(value)
        except ValueError:
            found = 0
        if isinstance(found, int) and found >= 1:
            return found
        if not 0 < found < 1:
            self.fail(f"{value!r} is neither a number of tokens nor a share below 1, as 0.3", param, ctx)
        return found
