"""Files of an earlier version are read, or refused with the command that renews them: never gone on with unsaid."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import make_tokenizer

from collm.calibration import store_table
from collm.data.examples import load_examples
from collm.data.formatting import Formatter
from collm.data.scores import FORMAT_VERSION, load_info, load_scores, scores_fingerprint
from collm.data.scoring import score
from collm.errors import CollmError
from collm.evaluation.evaluate import evaluate
from collm.evaluation.reading import read
from collm.evaluation.result import EvalResult
from collm.evaluation.written import read_written
from collm.identity.finding import local_identity
from collm.llm import CollaborativeLM
from collm.models import info as checkpoints
from collm.models.loading import load_model
from collm.report.trace import read_traces
from collm.sampling_params import SamplingParams
from collm.training.recipe import load_recipe
from collm.training.train import train

PRETRAINED = Path(__file__).parent.parent / "pretrained" / "smollm2-135m-calculator"


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A copy of the folder, to work in: paths in it are relative."""
    shutil.copytree(Path(__file__).parent / "old", tmp_path / "old")
    here = Path.cwd()
    os.chdir(tmp_path / "old")
    yield tmp_path / "old"
    os.chdir(here)


def test_a_checkpoint_loads_as_it_was_and_is_renewed_by_its_next_table(old: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its weights are known for what they were
        llm = CollaborativeLM.from_pretrained("run")
    assert llm.info.format_version == 1 and llm.model_names == ("base", "helper")
    assert [row.target_rate for row in llm.info.calibration[0].rows][0] == 0.0
    assert llm.generate("12 + 30 =", SamplingParams(max_tokens=3, deferral_rate=1)).completion_tokens == 3
    assert store_table("run", llm.info.calibration[0]) == llm.info.calibration[0]
    renewed = checkpoints.load_info("run")
    assert renewed is not None and renewed.format_version == checkpoints.FORMAT_VERSION
    assert renewed.calibration == llm.info.calibration


def test_answers_are_read_and_not_gone_on_with(old: Path) -> None:
    result = EvalResult.load("eval.json")
    assert result.num_examples == len(read_traces("eval.jsonl")) == 2
    assert not read_written(Path("eval.json"), result).missing
    llm, examples = CollaborativeLM.from_pretrained("run"), load_examples("rows.jsonl")[:2]
    before = Path("eval.jsonl").read_bytes()
    with pytest.raises(CollmError, match="begun by an older collm.*run the same command with another output file"):
        evaluate(llm, "exact_match", examples, SamplingParams(max_tokens=3), out="eval.jsonl", progress=False)
    with pytest.raises(CollmError, match="another system.*give another file, or delete it"):
        read(llm.models, llm.formatters, examples, out="read.jsonl", progress=False)
    assert Path("eval.jsonl").read_bytes() == before


def test_scores_are_read_and_where_it_matters_of_what_renewed(old: Path) -> None:
    examples, formatter, base = load_examples("rows.jsonl"), Formatter(make_tokenizer()), load_model("base")
    assert load_info("scores")["format_version"] == 1 and len(load_scores("scores")) == 4
    expect = scores_fingerprint(examples, local_identity(base), formatter, max_length=256)
    renew = "scored by an older collm.*`collm score DATA --model M --out scores --restart`"
    with pytest.raises(CollmError, match=renew):
        load_scores("scores", expect=expect)
    with pytest.raises(CollmError, match=renew):
        score(examples, base, formatter, "scores", max_length=256, progress=False)
    before = load_scores("scores")["log_prob"][:]
    score(examples, base, formatter, "scores", max_length=256, resume=False, progress=False)
    assert load_info("scores")["format_version"] == FORMAT_VERSION
    again = load_scores("scores", expect=expect)["log_prob"][:]
    assert [pytest.approx(row, abs=1e-5) for row in before] == again


def test_a_finished_run_is_finished_and_a_stopped_one_is_not_gone_on_with(old: Path) -> None:
    assert train(load_recipe(Path("recipe.json")), progress=False) == Path("run")
    Path("run/collm.json").unlink()
    with pytest.raises(CollmError, match="begun by an older collm.*--restart"):
        train(load_recipe(Path("recipe.json")), progress=False)


def test_the_shipped_pair_is_of_this_format_with_the_thresholds_it_was_measured_with() -> None:
    info = checkpoints.load_info(PRETRAINED)
    assert info is not None and info.format_version == checkpoints.FORMAT_VERSION
    [table] = info.calibration
    assert [row.log_odds for row in table.rows] == [
        float("inf"),
        15.785802841186523,
        10.398053169250488,
        0.0,
        float("-inf"),
    ]
    assert info.base_fingerprint == "eee824d682dbd7bf-abc09e33aa953cf9"
