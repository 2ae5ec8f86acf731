"""Programs as answers: where they stand in a text, and what the sandbox keeps in."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from writers import PairWriter

from collm.cli import main
from collm.data.examples import Example
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate_with_traces
from collm.evaluation.shipped import get_task
from collm.evaluation.tasks import sandbox
from collm.evaluation.tasks.mbpp import judge_program, program
from collm.evaluation.tasks.sandbox import Limits, passes

SMALL = Limits(seconds=1, memory=1 << 28, file_size=1 << 20)
BWRAP = pytest.mark.skipif(shutil.which("bwrap") is None or bool(sandbox._what_is_wrong()), reason="no sandbox here")


@pytest.fixture(params=[pytest.param(True, marks=BWRAP, id="sandboxed"), pytest.param(False, id="unsandboxed")])
def sandboxed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox._what_is_wrong.cache_clear()
    yield
    sandbox._what_is_wrong.cache_clear()


# ---- where a program stands


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\ndef f():\n\treturn 1\n```", "def f():\n\treturn 1"),
        ("Here it is:\n\n```\ndef f(): pass\n```\nIt does nothing.", "def f(): pass"),
        ("```python\nprint(f(1))\n```\n```python\nf = lambda x: x\n```", "f = lambda x: x"),
        ("```python\ndef f(): pass\n```\nUse it:\n```python\ndef g(): f()\n```", "def f(): pass"),
        ("```bash\npip install f\n```\n```py\nimport re\n```", "import re"),
        ("```Python\ndef f():\n    return '''```'''\n", "def f():\n    return '''```'''"),
        ("```python\ndef f():\n  cut off", "def f():\n  cut off"),
        ("Sure!\nimport re\n\ndef f(): pass\n[DONE]\ndef g(): pass", "import re\n\ndef f(): pass"),
        ("from math import pi\nx = pi", "from math import pi\nx = pi"),
        ("@cache\ndef f(): pass", "@cache\ndef f(): pass"),
        ("from the list, import what you need; class dismissed", None),
        ("I define nothing.", None),
        ("```python\n```", None),
        ("```\n\n", None),
        ("", None),
    ],
)
def test_the_program_in_a_text(text: str, code: str | None) -> None:
    assert program(text) == code


def test_gold_tests_are_a_list_of_sources() -> None:
    task = get_task("mbpp")
    good = Example("a", prompt="q", fields={"answer": ["assert f()", "assert g()"]})
    assert json.loads(task.gold(good)) == ["assert f()", "assert g()"]
    for answer in ([], ["", "assert f()"], "assert f()", [1], None, {"test": "assert f()"}):
        with pytest.raises(CollmError, match="no gold answer for task 'mbpp'"):
            task.gold(Example("a", prompt="q", fields={"answer": answer}))


# ---- what passes, shut in or not


@pytest.mark.parametrize(
    ("sources", "passed"),
    [
        (["def f(x): return x + 1", "assert f(1) == 2"], True),
        (["def f(x): return x + 1", "assert f(1) == 2", "assert f(2) == 2"], False),
        (["import collections, heapq, math, re, sys, itertools, datetime, array, bisect, operator, cmath"], True),
        (
            [
                "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P: x: int",
                "P(1)",
            ],
            True,
        ),
        (["def f(: pass"], False),
        (["def f(n): return f(n)", "f(1)"], False),
        (["raise SystemExit(0)", "assert False"], False),
        (["import os\nos._exit(0)", "assert False"], False),
        (["import sys\nsys.exit()"], False),
        (["print('ready')\nprint('passed')", "assert False"], False),
        (["import sys\nprint('x' * 10**6, file=sys.stderr)\nprint('x' * 10**6)"], True),
        (["assert input() == ''"], False),
        (["if __name__ == '__main__':\n    raise ValueError"], True),
        (["assert hash('a') == hash('a')\nassert 'ä' == '\\xe4'"], True),
        (["open('f', 'w').write('x' * 100)", "assert open('f').read() == 'x' * 100"], True),
        (["open('f', 'wb').write(b'x' * (1 << 22))"], False),
        (["x = bytearray(1 << 30)"], False),
        (["while True: pass"], False),
    ],
)
def test_what_passes(sources: list[str], passed: bool, sandboxed: bool) -> None:
    assert passes(sources, sandboxed=sandboxed, limits=SMALL) is passed


def test_a_program_that_sleeps_is_ended(sandboxed: bool) -> None:
    begin = time.monotonic()
    assert not passes(["import time\ntime.sleep(60)"], sandboxed=sandboxed, limits=Limits(seconds=1))
    assert time.monotonic() - begin < 20


def test_a_program_that_the_machine_had_no_time_to_start_is_not_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sandbox, "_python", lambda: str(slow))
    with pytest.raises(CollmError, match=r"could not be started for want of .* time"):
        passes(["pass"], sandboxed=False, limits=Limits(seconds=1))


@pytest.mark.slow
def test_a_slow_start_takes_none_of_the_program_s_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Six seconds may pass on the clock: here three of the start, and then five of the program."""
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 3\nexec {sandbox._python()} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sandbox, "_python", lambda: str(slow))
    assert passes(["import time\ntime.sleep(5)"], sandboxed=False, limits=Limits(seconds=2))


def test_what_a_program_does_is_the_same_each_time(sandboxed: bool) -> None:
    """Sets of texts have an order that hangs on a seed: fixed, or a test would pass now and then."""
    order = subprocess.run(
        [sys.executable, "-c", "print(list({'b', 'a', 'c', 'd'}))"],
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert passes([f"assert list({{'b', 'a', 'c', 'd'}}) == {order}"], sandboxed=sandboxed)


# ---- what the sandbox keeps in


@BWRAP
def test_a_program_sees_neither_files_nor_network_nor_processes(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        sources = [
            f"import os, socket\nassert not os.path.exists({str(tmp_path)!r})\nassert os.listdir('/tmp') == []",
            "assert os.listdir('.') == [] and not os.path.exists('/etc/passwd') and not os.path.exists('/root/.ssh')",
            "assert set(os.environ) <= {'PATH', 'PYTHONHASHSEED', 'HOME', 'LC_ALL', 'PWD'}, os.environ",
            *(
                f"try:\n    {forbidden}\nexcept OSError: pass\nelse: raise AssertionError"
                for forbidden in (
                    "open('/usr/x', 'w')",
                    f"socket.create_connection(('127.0.0.1', {port}), 2)",
                    f"os.kill({os.getpid()}, 0)",
                )
            ),
        ]
        assert passes(sources)
    # The same program outside fails at its first line: the test can fail.
    assert not passes(sources, sandboxed=False)


@BWRAP
def test_files_fill_no_disk_and_do_not_stay() -> None:
    fill = "for i in range(100): open(str(i), 'wb').write(b'x' * (1 << 20))"
    assert not passes([fill], limits=SMALL)
    assert passes(["open('left', 'w').write('x')"]) and passes(["import os\nassert not os.path.exists('left')"])


@BWRAP
def test_nothing_goes_on_after_its_program() -> None:
    mark = "collm_test_" + os.urandom(8).hex()
    leave = f"import os, time\nif os.fork() == 0:\n    os.setsid()\n    open('{mark}', 'w')\n    time.sleep(60)"
    assert passes([leave])
    left = [path for path in Path("/proc").glob("[0-9]*/fd/*") if mark in _target(path)]
    assert left == []


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


# ---- where there is no sandbox


def test_without_a_sandbox_programs_are_refused(no_bubblewrap: None, tmp_path: Path) -> None:
    llm = PairWriter()
    example = Example("a", prompt="What is 1", fields={"answer": ["assert True"]})
    with pytest.raises(CollmError, match=r"bubblewrap is not installed: apt-get install bubblewrap.*--unsandboxed"):
        evaluate_with_traces(llm, "mbpp", [example], out=tmp_path / "r.jsonl", progress=False)
    assert llm.written == 0 and not list(tmp_path.iterdir())
    with pytest.raises(CollmError, match="not installed"):
        judge_program("x = 1", '["assert x"]')


def test_a_sandbox_that_does_not_start_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    sandbox._what_is_wrong.cache_clear()
    try:
        with pytest.raises(CollmError, match=r"does not run here \(No permissions to create new namespace\)"):
            passes(["x = 1"])
    finally:
        sandbox._what_is_wrong.cache_clear()


def test_unsandboxed_is_asked_for(no_bubblewrap: None, tmp_path: Path) -> None:
    example = Example("a", prompt="What is 1", fields={"answer": ["assert f(1) == 2"]})

    class Coder(PairWriter):
        def generate_each(self, *args, **options):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            for index, generation in super().generate_each(*args, **options):
                yield index, replace(generation, text="```python\ndef f(x): return x + 1\n```")

    task = get_task("mbpp", sandboxed=False)
    result, [trace] = evaluate_with_traces(Coder(), task, [example], out=tmp_path / "r.jsonl", progress=False)
    assert (result.value, result.metric, result.task, trace.answer) == (1.0, "pass@1", "mbpp", "def f(x): return x + 1")
    # A stopped run has its verdicts in its file: nothing is run again.
    again, _ = evaluate_with_traces(PairWriter(), task, [example], out=tmp_path / "r.jsonl", progress=False)
    assert again.scores == result.scores
    with pytest.raises(CollmError, match="'gsm8k' runs no programs: leave out --unsandboxed"):
        get_task("gsm8k", sandboxed=False)


def test_the_command_line_refuses_before_it_loads_anything(no_bubblewrap: None, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "q", "answer": ["assert True"]}) + "\n")
    ask = ["eval", "no/such/model", "--data", str(tmp_path / "d.jsonl"), "--task"]
    result = CliRunner().invoke(main, [*ask, "mbpp"])
    assert result.exit_code == 1 and "apt-get install bubblewrap" in result.stderr
    result = CliRunner().invoke(main, [*ask, "mbpp", "--unsandboxed"])
    assert result.exit_code == 1 and "no/such/model" in result.stderr
    result = CliRunner().invoke(main, [*ask, "gsm8k", "--unsandboxed"])
    assert result.exit_code == 1 and "runs no programs" in result.stderr
