"""Scores through a server: those of this process, resumed as ever, and refused where they would be others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from served import Pair, Served, Trouble, listening, make_pair

from collm.cli import main
from collm.data import served as scoring_served
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scores import load_info, load_scores
from collm.errors import CollmError
from collm.training.recipe import ModelSection
from collm.training.writers import Writer, assistant_info, make_writer, scores_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = make_pair(tmp_path_factory.mktemp("pair"), 1)
    with listening(made.base, *made.others):
        yield made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}\n#### {2 * n}"} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["score", *map(str, arguments)], catch_exceptions=True)
    return result.exit_code, result.output + (result.stderr if result.stderr_bytes else "")


def same(one: Path, other: Path) -> None:
    here, there = list(load_scores(one)), list(load_scores(other))
    assert len(here) == len(there) == 30
    for a, b in zip(here, there, strict=True):
        assert a["id"] == b["id"]
        np.testing.assert_allclose(a["log_prob"], b["log_prob"], atol=2e-4)
        np.testing.assert_array_equal(a["top1"], b["top1"])


def test_scores_are_those_of_this_process_and_tell_where_they_are_from(pair: Pair, data: Path, tmp_path: Path) -> None:
    [expert], [path] = pair.others, pair.assistants
    url = f"vllm+{expert.url}?model={expert.name}"
    assert run(data, "--model", path, "--out", tmp_path / "here")[0] == 0
    code, told = run(data, "--model", f"{url}&tokenizer={path}", "--out", tmp_path / "there")
    assert code == 0, told
    same(tmp_path / "here", tmp_path / "there")
    model = load_info(tmp_path / "there")["fingerprint"]["model"]
    assert (model["kind"], model["name"], model["version"]) == ("remote", expert.name, "0.32.0")
    # The same again asks for nothing but who it is; another model under the same name is another one.
    expert.bodies.clear()
    assert run(data, "--model", url, "--base", path, "--out", tmp_path / "there")[0] == 0
    assert len(expert.bodies) == 1
    other = Served(pair.base.network, pair.others[0].tokenizer, name=expert.name)
    with listening(other):
        code, told = run(data, "--model", f"vllm+{other.url}", "--base", path, "--out", tmp_path / "there")
    assert code == 1 and "log-probabilities of a fixed text" in told


def test_what_is_finished_is_kept_where_a_server_goes(
    pair: Pair, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_served, "KEPT_TOKENS", 100)
    [expert], [path] = pair.others, pair.assistants
    asked = (data, "--model", f"vllm+{expert.url}", "--base", path, "--out", tmp_path / "out", "--batch-tokens", 100)
    expert.troubles.extend([Trouble()] * 12 + [Trouble(status=400)])
    code, told = run(*asked)
    assert code == 1 and "status 400" in told
    expert.troubles.clear()
    expert.bodies.clear()
    code, told = run(*asked)
    assert code == 0, told
    assert 1 < len(expert.bodies) < 30, "it went on from there"
    assert run(data, "--model", path, "--out", tmp_path / "here")[0] == 0
    same(tmp_path / "here", tmp_path / "out")


def test_a_recipe_s_assistant_may_be_behind_a_server(pair: Pair, data: Path, tmp_path: Path) -> None:
    [expert], [path] = pair.others, pair.assistants
    url = f"vllm+{expert.url}?key_env=COLLM_TEST_KEY"
    examples, formatter = load_examples(str(data)), Formatter(expert.tokenizer)
    base = Writer("base", ModelSection(model=str(path)), formatter)
    for spec, out in ((url.partition("?")[0], "there"), (str(path), "here")):
        writer = make_writer("expert0", ModelSection(model=spec), base, one_file=True)
        found = scores_of(writer, {"train": examples}, formatter, 64, tmp_path / out, progress=False)
        info = assistant_info(writer, found["train"])
        found["train"].rename(tmp_path / out / "scores")
        assert (
            info.spec == spec and info.tokenizer_fingerprint and (info.weights_fingerprint is None) == (out == "there")
        )
    same(tmp_path / "here" / "scores", tmp_path / "there" / "scores")
    with pytest.raises(CollmError, match="COLLM_TEST_KEY .* is not set"):
        scores_of(replace(writer, section=ModelSection(model=url)), {}, formatter, 64, tmp_path, progress=False)


def test_an_export_and_a_server_without_a_tokenizer_are_refused(pair: Pair, data: Path, tmp_path: Path) -> None:
    code, told = run(data, "--model", f"vllm+{pair.base.url}", "--base", pair.exported, "--out", tmp_path / "out")
    assert code == 1 and "is an export" in told and not (tmp_path / "out").exists()
    code, told = run(data, "--model", f"vllm+{pair.base.url}", "--out", tmp_path / "out")
    assert code == 1 and "name the model's tokenizer" in told
