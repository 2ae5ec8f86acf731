"""The pairs under `pretrained/`: of the format of now, small, with what people need to judge them, and told of."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from collm.evaluation.result import EvalResult
from collm.llm.deferral import cut_for_rate, settled
from collm.models.head import DeferralHead
from collm.models.info import FORMAT_VERSION, CheckpointInfo, load_info
from collm.sampling_params import SamplingParams
from collm.training.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "pretrained"
READY = sorted(path for path in FOLDER.iterdir() if path.is_dir())
QWEN = FOLDER / "qwen2.5-coder-0.5b-1.5b"


@pytest.fixture(params=READY, ids=lambda path: path.name)
def ready(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def described(folder: Path) -> CheckpointInfo:
    info = load_info(folder)
    assert info is not None
    return info


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def test_it_is_a_whole_checkpoint_of_now(ready: Path) -> None:
    info = described(ready)
    assert info.format_version == FORMAT_VERSION and info.kind in ("lora", "gate")
    assert len(info.base_fingerprint or "") == 33
    assert DeferralHead.load(ready).num_assistants == len(info.assistants)
    recipe = load_recipe(ready / "recipe.yaml")
    assert recipe.tune == info.kind and recipe.base.model == info.base_model
    assert [a.model for a in recipe.assistants] == [a.spec for a in info.assistants]


def test_it_names_no_place_of_the_machine_that_made_it(ready: Path) -> None:
    info = described(ready)
    assert info.base_place is None and all(assistant.place is None for assistant in info.assistants)
    for path in ready.iterdir():
        assert not any(place in path.read_bytes() for place in (b"/home/", b"/root/", b"/tmp/", b"site-packages"))


def test_it_holds_nobody_s_weights(ready: Path) -> None:
    assert sum(file.stat().st_size for file in ready.iterdir()) < 20e6
    kept = {"gate.safetensors", *(("adapter_model.safetensors",) if described(ready).kind == "lora" else ())}
    assert {file.name for file in ready.glob("*.safetensors")} == kept


def test_its_figures_were_measured_at_a_threshold_of_its_calibration(ready: Path) -> None:
    info = described(ready)
    results = [EvalResult.load(file) for file in ready.glob("test_*.json")]
    signal = "gate" if info.chosen is None else info.chosen.signal
    assert info.chosen is None or info.chosen.task in [result.task for result in results]
    for result in results:
        [table] = [table for table in info.calibration if (table.task, table.signal) == (result.task, signal)]
        rates = [row.achieved_rate for row in table.rows]
        if info.chosen is not None:
            rates = [row.achieved_rate for row in table.rows if row.target_rate == info.chosen.deferral_rate]
        assert min(abs(rate - result.deferral_rate) for rate in rates) < 0.02


def test_people_are_told_of_it(ready: Path) -> None:
    told = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"`{ready.name}/`" in told
    assert all(percent(EvalResult.load(file).value) in told for file in ready.glob("test_*.json"))
    info, card = described(ready), (ready / "README.md").read_text(encoding="utf-8")
    assert f"`{info.base_model}`" in card and str(info.base_fingerprint) in card


def test_the_pair_of_qwen_s_names_the_hub_s_models_and_says_what_it_was_measured_on() -> None:
    info, card = described(QWEN), (QWEN / "README.md").read_text(encoding="utf-8")
    assert info.base_model == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert [assistant.spec for assistant in info.assistants] == ["Qwen/Qwen2.5-Coder-1.5B-Instruct"]
    assert DeferralHead.load(QWEN).weight.shape == (1, 896)
    assert "Q4_K_M" in card and "license: apache-2.0" in card
    for task in ("gsm8k", "mbpp"):
        assert percent(EvalResult.load(QWEN / f"test_{task}.json").value) in card


def test_a_rate_is_of_the_task_that_the_pair_was_chosen_for_unless_another_is_named() -> None:
    info = described(QWEN)
    assert info.chosen is not None

    def cut(**asked: Any) -> float:
        params = settled(SamplingParams(**asked), info.chosen)
        assert params.deferral_rate is not None
        return cut_for_rate(info.calibration, params.deferral_rate, params.task, "entropy")

    by_default = cut()
    assert by_default == cut(deferral="entropy", deferral_rate=0.2) == cut(deferral_rate=0.2)
    assert by_default < cut(deferral="entropy", deferral_rate=0.2, task="mbpp") == cut(deferral_rate=0.2, task="mbpp")
    # The gate is calibrated for one task, which need not be named.
    gate = settled(SamplingParams(deferral="threshold", deferral_rate=0.2), info.chosen)
    assert gate.task is None and math.isfinite(cut_for_rate(info.calibration, 0.2, gate.task))
