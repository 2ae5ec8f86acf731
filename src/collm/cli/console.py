"""What a command says and where: results on stdout; progress, warnings and errors on stderr, one line each."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import click

from collm.errors import CollmError
from collm.text import decoded

EXTRAS = {
    "accelerate": "train",
    "bitsandbytes": "quantized",
    "gguf": "gguf",
    "httpx": "remote",
    "lm_eval": "eval",
    "math_verify": "eval",
    "matplotlib": "plot",
    "peft": "train",
    "prometheus_client": "serve",
    "rouge_score": "eval",
    "starlette": "serve",
    "uvicorn": "serve",
}
"""Which extra brings a package that the core does without."""


class _Stderr(logging.Handler):
    """Writes to the stderr of the moment (a progress bar or a test may have replaced it)."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        try:
            click.echo(prefix + record.getMessage(), err=True)
        except OSError:  # a full disk, a closed pipe: what is logged about is none the worse for it
            self.handleError(record)


@contextmanager
def speaking(verbose: bool) -> Iterator[None]:
    """Our own log lines and warnings in plain words; those of the libraries only with `--verbose`."""
    logger = logging.getLogger("collm")
    handler, level = _Stderr(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    with warnings.catch_warnings():
        if not verbose:
            # Read when the libraries are first imported, which is after this.
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            os.environ.setdefault("TQDM_DISABLE", "1")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", module=r"collm(\..*)?")
            warnings.showwarning = partial(_show_warning, set())
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A sign, at once, that a command is at work: libraries and weights take seconds. In a pipe it is a line."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        context = click.get_current_context(silent=True)
        told = set() if context is None else context.meta.setdefault("collm.told", set())
        if what not in told:
            told.add(what)
            click.echo(what, err=True)
        yield
        return
    with console.status(what):
        yield


def _show_warning(told: set[str], message: Warning | str, *_: Any, **__: Any) -> None:
    """The same words once, not for each text. `told`: what has been said."""
    if str(message) not in told:
        told.add(str(message))
        click.echo(f"warning: {message}", err=True)


def echo_json(value: Any, default: Callable[[Any], Any] | None = None) -> None:
    """One JSON value on stdout; escaped where the output cannot show all characters (Windows, redirected)."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    whole = encoding.lower().startswith("utf")
    click.echo(json.dumps(value, ensure_ascii=not whole, default=default))


def read_stdin() -> str:
    """All of standard input as UTF-8 text, whatever the locale, with line ends as in text files.

    Raises:
        CollmError: it is not UTF-8.
    """
    text = decoded(sys.stdin.buffer.read(), "standard input")
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Forgiving(io.FileIO):
    """An output whose lines may get lost: on a full disk, what they are about goes on. A closed pipe is told."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            return memoryview(data).nbytes


def _forgiving_output() -> None:
    """What an output's encoding lacks is shown as "?": better than to lose the text that was written. And a place for
    signs and warnings that is full is no reason to stop."""
    told = sys.stderr
    if told is sys.__stderr__ and told is not None:
        own = io.BufferedWriter(_Forgiving(told.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(own, told.encoding, told.errors, line_buffering=True, write_through=True)
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if getattr(stream, "errors", None) == "strict" and reconfigure is not None:
            reconfigure(errors="replace")


class Command(click.Command):
    """A command whose errors become exit codes.

    What users can put right ends with one line and exit code 1 (usage: 2), Ctrl-C with 130, a bug with its traceback.
    """

    def resumes(self, params: Mapping[str, Any]) -> bool:
        """Does a second run with the same parameters go on where the first was stopped?"""
        return False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(["--verbose"], is_flag=True, help="Let the libraries speak, too."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        _forgiving_output()
        verbose, debug = ctx.params.pop("verbose"), ctx.params.pop("debug")
        try:
            with speaking(verbose):
                return super().invoke(ctx)
        except KeyboardInterrupt:
            again = "run the same command again to resume" if self.resumes(ctx.params) else "nothing was changed"
            click.echo(f"\nstopped; {again}", err=True)
            ctx.exit(130)
        except (CollmError, OSError) as error:
            # A closed pipe (`collm ... | head`) is click's affair.
            if debug or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                error.__suppress_context__ = False  # what it came from, too
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(error.name or "")
            if debug or extra is None:
                raise
            click.echo(f"error: this needs the package {error.name}; pip install 'collm[{extra}]'", err=True)
            ctx.exit(1)


class ResumableCommand(Command):
    """One that goes on where it was stopped when it is run again."""

    def resumes(self, params: Mapping[str, Any]) -> bool:
        return params.get("out", "given by the recipe") is not None
