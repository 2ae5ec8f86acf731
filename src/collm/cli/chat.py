"""`collm chat`: a conversation in the terminal, coloured by author, in this process or with a server."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from collm.cli.asking import decoding_options, sampling_params
from collm.cli.console import Command
from collm.cli.options import alone_option
from collm.cli.serve import KEY_VARIABLE
from collm.cli.system import check_llm, load_llm, model_options
from collm.errors import CollmError
from collm.files import write_text
from collm.sampling_params import SamplingParams
from collm.text import Lines
from collm.types import Message, Step

if TYPE_CHECKING:
    from collm.llm import CollaborativeLM
    from collm.report.terminal import Brackets

HELP = """\
/rate 0.3        the share of tokens that assistants may write (needs a calibration)
/threshold 0.5   defer where the gate exceeds this
/alone NAME      one model writes alone; /alone without a name: all together again
/save FILE       keep the conversation as JSON
/undo            take back the last question and its answer
/clear           begin anew
/quit            leave (as Ctrl-D does)"""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one token adds; `text` is what the answer's content gains, `shown` the token's own text and its step."""

    text: str
    shown: str = ""
    step: Step | None = None
    summary: str = ""


class Partner(ABC):
    """Whoever answers."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The models, base first."""

    @abstractmethod
    def answer(self, messages: Sequence[Message], params: SamplingParams, alone: str | None) -> Iterator[Piece]:
        """The answer, token by token."""


class InProcess(Partner):
    """A system in this process."""

    def __init__(self, llm: CollaborativeLM) -> None:
        self._llm = llm

    @property
    def names(self) -> tuple[str, ...]:
        return self._llm.model_names

    def answer(self, messages: Sequence[Message], params: SamplingParams, alone: str | None) -> Iterator[Piece]:
        from collm.report.terminal import summary

        for chunk in self._llm.stream(messages, params, alone=alone):
            told = "" if chunk.generation is None else summary(chunk.generation)
            yield Piece(chunk.text, chunk.piece if chunk.step else "", chunk.step, told)
            if chunk.generation is not None and chunk.generation.error is not None:
                raise CollmError(chunk.generation.error)


class Served(Partner):
    """A server that `collm serve` started."""

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        url = url.rstrip("/").removesuffix("/v1") + "/v1/"
        self._client = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(600, connect=10))
        first = _told(self._client, "GET", "models").json()["data"][0]
        if "models" not in first:
            raise CollmError(f"{url} is no server of collm serve: it does not say which models write together")
        self._pair, self._names = first["id"], tuple(first["models"])

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def answer(self, messages: Sequence[Message], params: SamplingParams, alone: str | None) -> Iterator[Piece]:
        import httpx

        body = self._body(messages, params, alone)
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise CollmError(_message(response))
                lines = Lines()
                for data in response.iter_bytes():
                    for line in lines.push(data):
                        if line.startswith("data: ") and line != "data: [DONE]":
                            yield from self._pieces(json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            raise CollmError(f"the server does not answer: {error}") from None

    def _body(self, messages: Sequence[Message], params: SamplingParams, alone: str | None) -> dict[str, Any]:
        collm: dict[str, Any] = {"tokens": True}
        if alone is None:
            who = {"method": params.deferral, "deferral_rate": params.deferral_rate, "threshold": params.threshold}
            collm |= {name: value for name, value in {**who, "task": params.task}.items() if value is not None}
            collm |= {"speculative": params.speculative, "on_assistant_error": params.on_assistant_error}
        return {
            "model": alone or self._pair,
            "messages": list(messages),
            "stream": True,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "seed": params.seed,
            "stop": list(params.stop) or None,
            "collm": collm,
        }

    def _pieces(self, event: dict[str, Any]) -> Iterator[Piece]:
        if "error" in event:
            raise CollmError(event["error"]["message"])
        for choice in event["choices"]:
            told = choice.get("collm", {})
            yield Piece(choice["delta"].get("content") or "")
            for token in told.get("tokens", ()):
                changed = -1 if "base_text" in token else None
                author = self._names.index(token["author"])
                step = Step(token["token_id"], author, token["log_prob"], base_token_id=changed)
                yield Piece("", token["text"], step)
            if "tokens_by_author" in told:
                counts = ", ".join(f"{name} {count}" for name, count in told["tokens_by_author"].items())
                yield Piece("", summary=f"tokens: {counts}; {told['deferral_rate']:.1%} deferred")


def _told(client: Any, method: str, path: str) -> Any:
    import httpx

    try:
        response = client.request(method, path)
    except httpx.HTTPError as error:
        raise CollmError(f"there is no server at {client.base_url}: {error}") from None
    if response.status_code != 200:
        raise CollmError(_message(response))
    return response


def _message(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"


@click.command(cls=Command, short_help="Talk to a system in the terminal.")
@click.argument("checkpoint")
@click.option("--system", metavar="TEXT", help="System prompt.")
@alone_option
@decoding_options
@model_options
def chat(checkpoint: str, system: str | None, **options: Any) -> None:
    """Talk to CHECKPOINT and its assistants, or to the server at an address (http://...); /help lists what can be said.

    A server's key is read from COLLM_API_KEY.
    """
    params = sampling_params(options)
    partner: Partner
    if checkpoint.startswith(("http://", "https://")):
        partner = Served(checkpoint, os.environ.get(KEY_VARIABLE))
    else:
        check_llm(checkpoint, options, params)
        partner = InProcess(load_llm(checkpoint, options, params))
    before: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    Talk(partner, params, options["alone"], before).run()


class Talk:
    """One conversation. `before`: messages that stand at its beginning."""

    def __init__(self, partner: Partner, params: SamplingParams, alone: str | None, before: list[Message]) -> None:
        from rich.console import Console

        self.partner, self.params, self.before = partner, params, before
        self.alone: str | None = None
        self.messages: list[Message] = [*before]
        self.console = Console()
        if alone is not None:
            self._alone(alone)

    def run(self) -> None:
        from collm.report.terminal import legend

        self.console.print(legend(self.partner.names, colour=self._colour), soft_wrap=True)
        click.echo("/help lists commands", err=True)
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                click.echo()
                return
            except KeyboardInterrupt:  # a line that was given up, as in a shell
                click.echo()
                continue
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except (CollmError, OSError) as error:
                click.echo(f"error: {error}", err=True)

    @property
    def _colour(self) -> bool:
        from collm.report.terminal import in_colour

        return in_colour(self.console)

    def _answer(self, question: str) -> None:
        """Ask, and show what comes. Ctrl-C stops the answer and keeps what there is of it."""
        asked: list[Message] = [*self.messages, {"role": "user", "content": question}]
        from collm.report.terminal import Brackets

        content, told, brackets = "", "", Brackets(len(self.partner.names))
        try:
            for piece in self.partner.answer(asked, self.params, self.alone):
                content += piece.text
                told = piece.summary or told
                self._show(piece, brackets)
        except KeyboardInterrupt:
            told = "stopped"
        finally:
            click.echo(brackets.end())
        if told:
            click.echo(told, err=True)
        if content:
            self.messages = [*asked, {"role": "assistant", "content": content}]

    def _show(self, piece: Piece, brackets: Brackets) -> None:
        from collm.report.terminal import token_text

        if piece.step is not None and not self._colour:
            click.echo(brackets.push(piece.shown, piece.step), nl=False)
        elif piece.step is not None:
            self.console.print(token_text(piece.shown, piece.step), end="", soft_wrap=True, highlight=False)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in ("/rate", "/threshold"):
            self._who(name, rest)
        elif name == "/alone":
            self._alone(rest)
        elif name == "/save":
            self._save(rest)
        elif name == "/undo":
            self.messages = self.messages[: max(len(self.before), len(self.messages) - 2)]
        elif name == "/clear":
            self.messages = [*self.before]
        elif name == "/help":
            click.echo(HELP)
        else:
            raise CollmError(f"there is no command {name}; /help lists them")

    def _who(self, name: str, rest: str) -> None:
        try:
            value = float(rest)
        except ValueError:
            raise CollmError(f"{name} takes a number between 0 and 1, not {rest!r}") from None
        none = replace(self.params, deferral=None, deferral_rate=None, threshold=None)
        try:
            if name == "/rate":
                self.params = replace(none, deferral_rate=value)
            else:
                self.params = replace(none, threshold=value, task=None)
        except ValueError as error:
            raise CollmError(str(error)) from None

    def _alone(self, name: str) -> None:
        if name and name not in self.partner.names:
            raise CollmError(f"there is no model {name!r}; the models are {', '.join(self.partner.names)}")
        self.alone = name or None

    def _save(self, rest: str) -> None:
        if not rest:
            raise CollmError("say where: /save FILE")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False)
        write_text(Path(rest).expanduser(), text + "\n")
        click.echo(f"saved {rest}", err=True)
