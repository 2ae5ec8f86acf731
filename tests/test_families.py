"""The study of two families and three: its steps with tiny models in the place of those that are downloaded."""

from __future__ import annotations

import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from chunk_toys import sentencepiece_like
from click.testing import CliRunner
from tiny import make_model, make_tokenizer

from collm.cli import main

ROOT = Path(__file__).parent.parent


def rows(kind: str, part: str, count: int) -> list[dict[str, object]]:
    if kind == "mbpp":
        return [
            {
                "id": f"{part}-{n}",
                "messages": [
                    {"role": "user", "content": f"Write add{n}."},
                    {"role": "assistant", "content": f"```python\ndef add{n}(a):\n    return a + {n}\n```"},
                ],
                "answer": [f"assert add{n}(1) == {n + 1}"],
            }
            for n in range(count)
        ]
    return [
        {
            "id": f"{part}-{n}",
            "messages": [
                {"role": "user", "content": f"Anna has {n} apples and buys 3."},
                {"role": "assistant", "content": f"Anna has {n} + 3 = {n + 3} apples.\n#### {n + 3}"},
            ],
            "answer": str(n + 3),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    tokenizers = {
        "base": make_tokenizer(285),
        "weights/Qwen2.5-Coder-0.5B-Instruct": make_tokenizer(340),
        "weights/Qwen2.5-Coder-1.5B-Instruct": make_tokenizer(340),
        "weights/gemma-3-270m": sentencepiece_like(),
    }
    for seed, (name, tokenizer) in enumerate(tokenizers.items()):
        make_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for kind, parts in (
        ("gsm8k", ("train", "spent", "calibration", "test")),
        ("mbpp", ("train", "calibration", "test")),
    ):
        (folder / "data" / kind).mkdir(parents=True)
        for part in (*parts, "spent"):
            found = rows(kind, part, 60 if part == "calibration" else 8)
            (folder / "data" / kind / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    # As where it was downloaded: the last step gives it the template.
    (folder / "weights" / "gemma-3-270m" / "chat_template.jinja").write_text(
        (ROOT / "recipes" / "families" / "plain.jinja").read_text()
    )
    return folder


def run(goal: str, place: Path, monkeypatch: pytest.MonkeyPatch, *settings: str) -> None:
    """What make would do, in this process."""
    given = [f"{name}={place / name.lower()}" for name in ("DATA", "RUNS", "WEIGHTS")]
    given += [f"MODEL={place / 'base'}", "PYTHON=python", "KEPT=", *settings]
    monkeypatch.chdir(ROOT)
    done = subprocess.run(
        ["make", "-n", "-f", "recipes/families/study.mk", goal, *given],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    for line in done.stdout.replace("\\\n", " ").splitlines():
        words = shlex.split(line)
        if words[0] != "python":
            subprocess.run(line, shell=True, check=True)
        elif words[1] == "-m":
            words += ["training.epochs=1"] * (words[3] == "train")  # the recipe as it is, but for the time it takes
            result = CliRunner().invoke(main, words[3:], catch_exceptions=False)
            assert result.exit_code == 0, (words, result.output)
        else:
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")


def test_three_families(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("look-gemma", place, monkeypatch)
    header, *read = (place / "runs" / "gsm8k" / "look-three-oracle.jsonl").read_text().splitlines()
    assert json.loads(header)["models"] == ["base", "qwen", "gemma"] and len(read) == 18
    told = capsys.readouterr().out
    chunks = sum(len(json.loads(line)["right"]) for line in read)
    assert f"18 problems, {chunks} chunks; nats a chunk" in told
    for name in ("base", "half-calibration", "gemma-calibration"):
        assert f"\n{name} alone" in told
    assert "gate less gate, qwen alone" in told and "gate less gate, gemma alone" in told


def test_code_in_texts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("small-mbpp", place, monkeypatch, "CODE_LONG=12", "CODE_TESTED=3")
    found = {path.stem: json.loads(path.read_text()) for path in (place / "runs/small/mbpp/test").glob("*.json")}
    assert set(found) == {"base", "half", "gate_20", "entropy_20", "random_20", "nudging"}
    assert {result["num_examples"] for result in found.values()} == {3}
    assert (place / "runs/small/mbpp/test/report.html").stat().st_size > 0


def test_what_drafts_of_chunks_could_gain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script = ROOT / "recipes" / "families" / "paired.py"
    reading = runpy.run_path(str(script))["Reading"]
    right = np.array([[1, 1], [1, 1], [1, 0], [1, 1], [0, 0], [1, 1], [1, 1], [0, 1]], np.float64)
    of = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = reading(["other"], ["a", "b"], of, right, {})
    writer = np.array([0, 1, 1, 0, 1, 0, 1, 1])
    equal = found.equal(writer)
    assert np.array_equal(equal, [1, 1, 0, 1, np.nan, 1, 1, 0], equal_nan=True)
    # One at a time: every chunk is drafted once, each refused one takes another pass.
    assert found.drafted(writer, equal == 1, 1) == (8, 5 + 3)
    # Two: chunks 0 to 2, refused at 2; 3 to 5, refused at 4, so that 5 is drafted again; 6 and 7, refused at 7.
    assert found.drafted(writer, equal == 1, 2) == (3 + 3 + 1 + 2, 3 + 3)
    # Three, the one that nobody knows equal: 0 to 4, refused at 2; 3 to 5; 6 and 7.
    assert found.drafted(writer, equal != 0, 3) == (5 + 3 + 2, 3 + 2)
    kept = ROOT / "recipes" / "families" / "kept"
    arguments = [str(script), str(kept / "oracle.jsonl"), "--rate", "0.2", "--drafts", str(kept / "gate_20.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    assert "612 chunks in 398 runs of deferrals; passes of assistants now 859" in told
    assert "at 4: 2 to be judged, passes (3846, 647), time 0.99" in told, "as in docs/log.md"
