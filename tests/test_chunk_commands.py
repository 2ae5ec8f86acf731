"""Commands over a pair with different tokenizers: from training text to a trace."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from chunk_toys import sentencepiece_like
from click.testing import CliRunner
from tiny import make_model, make_tokenizer

from collm.cli import main
from collm.data.chunks import Chunked, Reader
from collm.data.examples import Example
from collm.evaluation.result import EvalResult
from collm.models.info import load_info


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained gate over a base and an assistant of another tokenizer, calibrated."""
    folder = tmp_path_factory.mktemp("commands")
    for name, tokenizer, seed in (("base", make_tokenizer(285), 0), ("other", make_tokenizer(340), 1)):
        make_model(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"id": str(n), "answer": str(n + 1), "messages": [{"role": "user", "content": f"{n} + 1"},
                                    {"role": "assistant", "content": f"Anna has {n + 1} apples"}]}
        for n in range(16)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "out": str(folder / "pair"),
        "cache": str(folder / "cache"),
        "tune": "gate",
        "base": {"model": str(folder / "base")},
        "assistants": [{"name": "other", "model": str(folder / "other")}],
        "data": {"train": str(folder / "data.jsonl"), "validation": str(folder / "data.jsonl")},
        "training": {"epochs": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run("train", str(folder / "recipe.yaml"))
    return folder


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_pair_info(place: Path) -> None:
    told = run("pair-info", str(place / "base"), str(place / "other"))
    assert "another tokenizer" in told and "start at a cut" in told and "sums" in told
    figures = json.loads(
        run("pair-info", str(place / "base"), str(place / "other"), "--data", str(place / "data.jsonl"), "--json")
        .splitlines()[-1]
    )  # fmt: skip
    [texts] = figures["texts"].values()
    info = load_info(place / "pair")
    assert info is not None and figures["cuts"] == info.cuts
    assert 0 < texts["at_cut"] <= 1 and texts["refused"] == 0 and texts["chunks"] <= texts["tokens"]
    assert "one tokenizer" in run("pair-info", str(place / "base"), str(place / "base"))
    # What training would refuse is counted, and the first of it told.
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    rows[2]["messages"][1]["content"] += " <|im_start|>"
    rows[5]["messages"][1]["content"] += " <|im_start|> b"
    (place / "special.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = run("pair-info", str(place / "base"), str(place / "other"), "--data", str(place / "special.jsonl"))
    assert "2 texts cannot be used (the first: " in told and "'<|im_start|>' stands within what is to be learnt" in told


def test_pair_info_reads_as_training_does(place: Path) -> None:
    """Of every model its own template, and the base's own tokens; one without a template is shown the bare text."""
    rows = [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]
    for row in rows[:3]:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (place / "brief.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = make_tokenizer(340)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    own = tokenizer.chat_template
    assert isinstance(own, str)
    found = {}
    for name, template in (("strict", strict + own), ("bare", None), ("other", own)):
        tokenizer.chat_template = template
        make_model(vocab_size=len(tokenizer)).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        (place / name / "chat_template.jinja").unlink(missing_ok=template is None)
        if template is not None:
            tokenizer.save_pretrained(place / name)
        told = run("pair-info", str(place / "base"), str(place / name), "--data", str(place / "brief.jsonl"), "--json")
        [found[name]] = json.loads(told.splitlines()[-1])["texts"].values()
    assert found["bare"] == found["other"] and found["other"]["refused"] == 0
    assert found["strict"]["refused"] == 3 and "no system, please" in found["strict"]["why"]
    # The base's tokens in whole chunks are those that scoring and training count.
    run("score", str(place / "brief.jsonl"), "--model", str(place / "base"), "--with", str(place / "other"), "--out",
        str(place / "brief"))  # fmt: skip
    scores = json.loads((place / "brief" / "scores.json").read_text())
    assert found["other"]["chunks"] + len(rows) == scores["chunks"], "ends are chunks of their own"


def test_score_tells_of_the_first_texts_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of all: each text is read once for its scores."""
    monkeypatch.setattr("collm.cli.score.TOLD", 3)
    read = Reader.read
    labels: list[str] = []

    def counted(self: Reader, example: Example, max_length: int | None = None) -> Chunked:
        labels.append(example.label)
        return read(self, example, max_length)

    monkeypatch.setattr(Reader, "read", counted)
    told = run("score", str(place / "data.jsonl"), "--model", str(place / "base"), "--with", str(place / "other"),
               "--out", str(place / "first"))  # fmt: skip
    assert re.search(r"of this text's first 3 examples \d+\.\d% of the base's", " ".join(told.split())), told
    assert len(labels) == 16 + 3 and len(set(labels)) == 16


def test_few_cuts_in_the_users_own_text_are_warned_of(place: Path) -> None:
    """The shipped samples have enough of them; this text has not."""
    base, other, data = str(place / "base"), str(place / "other"), str(place / "chinese.jsonl")
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "世界你好，你好世界。" * 2}]}
    (place / "chinese.jsonl").write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n in range(4)))

    def told(*arguments: str) -> str:
        return " ".join(run(*arguments).split())

    for model, named in ((base, ("--with", other)), (other, ("--base", base))):
        found = told("score", data, "--model", model, *named, "--restart", "--out", str(place / "few"))
        assert re.search(r"of this text \d+\.\d% of the base's tokens start at a cut", found), found
        assert re.search(f"{base}, {other}: only .* of the base's tokens start at a cut", found), found
    recipe = json.loads((place / "recipe.yaml").read_text())
    recipe |= {"out": str(place / "few-pair"), "data": {"train": data, "validation": data}}
    (place / "few.yaml").write_text(json.dumps(recipe))
    found = told("train", str(place / "few.yaml"))
    assert re.search(r"of the training text \d+\.\d% of the base's tokens start at a cut", found), found
    assert re.search(r"base, other: only \d+% of the base's tokens start at a cut", found), found
    found = told("train", str(place / "recipe.yaml"), f"out={place / 'enough'}")
    assert "of the training text" in found and "only" not in found


def test_score_names_all_models(place: Path) -> None:
    base, other, data = str(place / "base"), str(place / "other"), str(place / "data.jsonl")
    told = run("score", data, "--model", base, "--with", other, "--out", str(place / "of-base"))
    assert "chunks scored" in told
    run("score", data, "--model", other, "--base", base, "--out", str(place / "of-other"))
    prints = [json.loads((place / name / "scores.json").read_text())["fingerprint"] for name in ("of-base", "of-other")]
    assert prints[0]["cuts"] == prints[1]["cuts"]


def test_generate_trace_and_oracle(place: Path) -> None:
    pair, other = str(place / "pair"), str(place / "other")
    shared = ["--assistant", f"other={other}"]
    written = json.loads(
        run("generate", pair, "3 + 1", *shared, "--deferral", "random", "--threshold", "0.5", "--max-tokens", "12",
            "--json", "--trace", str(place / "trace.jsonl")).splitlines()[-1]
    )  # fmt: skip
    assert sum(len(step["token_ids"]) for step in written["steps"]) == 12
    run("trace", str(place / "trace.jsonl"), "--html", str(place / "page.html"))
    assert "data-c=" in (place / "page.html").read_text() or all(len(s["token_ids"]) == 1 for s in written["steps"])
    told = run("oracle", pair, *shared, "--data", str(place / "data.jsonl"), "--json")
    figures = json.loads(told.splitlines()[-1])
    info = load_info(place / "pair")
    assert info is not None
    # Chunks, the same ones as in training's figures.
    [base] = [row for row in figures["rows"] if row["name"] == "base"]
    assert base["accuracy"] == pytest.approx(info.training["figures"]["eval_base_accuracy"], abs=1e-6)
    assert figures["tokens"] > 16

    # Whatever tells of these texts counts chunks, and says so.
    assert figures["unit"] == "chunk"
    told = run("oracle", pair, *shared, "--data", str(place / "data.jsonl"))
    assert f"{figures['tokens']} gold chunks of 16 examples" in told and "chunk accuracy" in told
    told = run("generate", pair, "3 + 1", *shared, "--deferral", "random", "--threshold", "0.5", "--max-tokens", "12")
    assert f"12 tokens in {len(written['steps'])} chunks" in told
    told = run("trace", str(place / "trace.jsonl"), "--classes")
    assert f"{len(written['steps'])} chunks of 1 texts" in told and "kind of chunk" in told
    page = (place / "page.html").read_text()
    assert "chunks written by assistants" in page and f"12 tokens in {len(written['steps'])} chunks" in page


def test_calibrate_and_eval(place: Path) -> None:
    pair = str(place / "pair")
    shared = ["--assistant", f"other={place / 'other'}"]
    run("calibrate", pair, *shared, "--data", str(place / "data.jsonl"), "--task", "exact_match", "--rates", "0,0.5,1",
        "--max-tokens", "12", "--limit", "6")  # fmt: skip
    info = load_info(place / "pair")
    assert info is not None
    [table] = info.calibration
    assert [row.achieved_rate for row in table.rows][0] == 0 and table.rows[-1].achieved_rate == 1
    out = place / "eval"
    run("eval", pair, *shared, "--data", str(place / "data.jsonl"), "--task", "exact_match", "--max-tokens", "12",
        "--limit", "4", "--deferral-rate", "0.5", "--out", str(out))  # fmt: skip
    [result] = [json.loads(path.read_text()) for path in place.glob("eval*.json")]
    assert result["tokens"] == 48 and 0 < result["deferral_rate"] < 1
    chunks = sum(result["written_by"].values())
    assert result["unit"] == "chunk" and chunks < 48
    assert result["changed_share"] == result["changed_tokens"] / chunks
    found = EvalResult.load(out.with_suffix(".json"))
    assert f"48 tokens in {chunks} chunks" in found.summary()
    assert replace(found, abstained=chunks).asked_rate == found.deferral_rate + 1, "of the places that there are"
    page = place / "report.html"
    run("report", str(out.with_suffix(".json")), "--out", str(page))
    assert "chunks in the place of tokens" in " ".join(page.read_text().split())
    assert "Kinds of chunks" in page.read_text() and "Kinds of tokens" not in page.read_text()


def test_what_needs_one_tokenizer_says_so(place: Path) -> None:
    pair = str(place / "pair")
    shared = ["--assistant", f"other={place / 'other'}"]
    for arguments in (
        ["generate", pair, "3", *shared, "--deferral", "compose"],
        ["generate", pair, "3", *shared, "--speculative"],
        ["export", pair, str(place / "e")],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1 and "tokenizer" in done.output, done.output
    other = make_tokenizer(300)
    make_model(vocab_size=len(other)).save_pretrained(place / "changed")
    other.save_pretrained(place / "changed")
    done = CliRunner().invoke(main, ["generate", pair, "3", "--assistant", f"other={place / 'changed'}"])
    assert done.exit_code == 1 and "their tokenizers are not those of training" in done.output


def test_three_models_with_three_tokenizers(place: Path) -> None:
    """K = 2: scores made by hand, a gate over three writers, and base and gate together; thresholds; texts of all."""
    third = sentencepiece_like()
    make_model(seed=5, vocab_size=len(third)).save_pretrained(place / "third")
    third.save_pretrained(place / "third")
    folders = {name: str(place / name) for name in ("base", "other", "third")}
    data = str(place / "data.jsonl")
    cuts = set()
    for name, folder in folders.items():
        others = [word for each in folders.values() if each != folder for word in ("--with", each)]
        base = [] if name == "base" else ["--base", folders["base"]]
        run("score", data, "--model", folder, *base, *others, "--out", str(place / f"three-{name}"))
        scores = json.loads((place / f"three-{name}" / "scores.json").read_text())
        cuts.add((scores["fingerprint"]["cuts"], scores["chunks"]))
    assert len(cuts) == 1, "all score the same chunks"

    def model(name: str) -> dict[str, str]:
        kept = str(place / f"three-{name}")
        return {"model": folders[name], "scores": kept, "validation_scores": kept}

    recipe = {
        "cache": str(place / "cache"),
        "base": model("base"),
        "assistants": [{"name": name, **model(name)} for name in ("other", "third")],
        "data": {"train": data, "validation": data},
        "training": {"epochs": 1, "batch_size": 4},
    }
    for tune in ("gate", "full"):
        pair = str(place / f"three-{tune}")
        (place / "three.yaml").write_text(json.dumps({**recipe, "out": pair, "tune": tune}))
        run("train", str(place / "three.yaml"))
        info = load_info(pair)
        assert info is not None and {info.cuts} == {each for each, _ in cuts}
        assert [each.name for each in info.assistants] == ["other", "third"]
        spec = str(Path(pair) / "checkpoint") if (Path(pair) / "checkpoint").is_dir() else pair
        shared = [word for name in ("other", "third") for word in ("--assistant", f"{name}={folders[name]}")]
        run("calibrate", spec, *shared, "--data", data, "--task", "exact_match", "--rates", "0,0.5,1", "--max-tokens",
            "8", "--limit", "3")  # fmt: skip
        told = run("generate", spec, "3 + 1", *shared, "--deferral-rate", "0.5", "--max-tokens", "8", "--json")
        assert sum(len(step["token_ids"]) for step in json.loads(told.splitlines()[-1])["steps"]) == 8
        drawn = run("generate", spec, "3 + 1", *shared, "--deferral", "random", "--threshold", "0.9", "--max-tokens",
                    "40", "--json")  # fmt: skip
        steps = json.loads(drawn.splitlines()[-1])["steps"]
        assert {step["author"] for step in steps} >= {1, 2} or {step["author"] for step in steps} >= {"other", "third"}
