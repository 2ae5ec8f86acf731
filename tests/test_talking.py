"""`collm chat`, in this process and with a server: one conversation, one text."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Live, fake_pair, live, saying

from collm.cli.chat import InProcess, Partner, Served, Talk
from collm.errors import CollmError
from collm.report.terminal import plain
from collm.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=12, threshold=0.3)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(fake_pair()) as running:
        yield running


@pytest.fixture(params=["in process", "served"])
def partner(request: pytest.FixtureRequest, server: Live) -> Partner:
    return InProcess(server.llm) if request.param == "in process" else Served(server.url, None)


def say(monkeypatch: pytest.MonkeyPatch, talk: Talk, *lines: str) -> None:
    said = iter(lines)

    def prompt(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", prompt)
    talk.run()


def test_turns(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    partner: Partner,
    server: Live,
    tmp_path: Path,
) -> None:
    talk, file = Talk(partner, PARAMS, None, []), tmp_path / "talk.json"
    say(
        monkeypatch,
        talk,
        "hi",
        "and?",
        "/alone helper",
        "you?",
        f"/save {file}",
        "/undo",
        "/nothing",
        "/rate x",
        "/rate 2",
    )
    llm = server.llm
    first = [{"role": "user", "content": "hi"}]
    one = llm.generate(first, PARAMS)
    second = [*first, {"role": "assistant", "content": one.text}, {"role": "user", "content": "and?"}]
    two = llm.generate(second, PARAMS)
    third = [*second, {"role": "assistant", "content": two.text}, {"role": "user", "content": "you?"}]
    three = llm.generate(third, SamplingParams(max_tokens=12), alone="helper")
    whole = [*third, {"role": "assistant", "content": three.text}]
    assert json.loads(file.read_text())["messages"] == whole and talk.messages == whole[:-2]
    out = capsys.readouterr()
    assert plain(one) in out.out and plain(two) in out.out and "[" in plain(one), "brackets, where there is no colour"
    assert "deferred" in out.err and "no command /nothing" in out.err and "deferral_rate must lie" in out.err
    assert "number between 0 and 1" in out.err


def test_colours_show_who_wrote(partner: Partner) -> None:
    steps = [piece.step for piece in partner.answer([{"role": "user", "content": "hi"}], PARAMS, None) if piece.step]
    assert {step.author for step in steps} == {0, 1}


def test_line_separators_in_an_answer_are_no_ends_of_lines() -> None:
    said = "1\u20282\u2029a\x85b ☃"
    with live(saying(said)) as server:
        pieces = Served(server.url, None).answer(
            [{"role": "user", "content": "hi"}], SamplingParams(max_tokens=40), None
        )
        assert "".join(piece.text for piece in pieces) == said


def test_what_the_server_refuses_is_told_and_the_talk_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], partner: Partner
) -> None:
    talk = Talk(partner, PARAMS, None, [{"role": "system", "content": "Be brief."}])
    say(monkeypatch, talk, "/rate 0.2", "hi", "/threshold 0.5", "hi", "/clear")
    assert "calibration" in capsys.readouterr().err and len(talk.messages) == 1
    with pytest.raises(CollmError, match="there is no model"):
        Talk(partner, PARAMS, "nobody", [])


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(CollmError, match="there is no server"):
        Served("http://127.0.0.1:9", None)
