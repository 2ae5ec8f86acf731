"""The script that measures a GPU, tried out on the CPU: on a lent machine it must not fail for a silly reason."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def imported(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_script", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [*sys.path])
    return imported("gpu")


def test_every_section_runs_and_every_demand_is_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.card.timed, "__defaults__", (1, 1))
    assert script.main([str(tmp_path), "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["errors"] == {}
    on_cuda_alone = {"launches_a_pass", "waits_a_pass", "compiled.base.T16"}
    assert {key for key, each in found["demands"].items() if each["found"] is None} == on_cuda_alone
    for batch in (1, 16):  # the whole engine, with the twins of the kernels
        assert found["figures"][f"tok_s.speculative.b{batch}"]["equal_to_plain"] == 1.0
    for how in ("plain", "speculative"):
        assert found["figures"][f"devices.texts_like_the_whole.{how}"] == 1.0
    assert found["figures"]["exact.assistant"]["top_log_prob_off"] < 1e-4


def test_a_section_that_fails_costs_the_others_nothing(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: object) -> None:
        raise SystemExit("no such card")

    def fine(bench: Any) -> None:
        bench.ratio("pass.base.T16", 1.2)

    monkeypatch.setattr(script, "SECTIONS", [("broken", broken, 0), ("fine", fine, 0), ("late", fine, 1e9)])
    assert script.main([str(tmp_path), "--device", "cpu"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["errors"]) == ["broken", "late"] and "no such card" in found["errors"]["broken"]
    assert found["demands"]["pass.base.T16"] == {"limit": "<= 1.4", "found": 1.2, "holds": True}


def test_the_simulation_of_the_host_runs_with_stand_ins_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reaches into what records graphs: if it no longer stands in for them, passes run without any."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(BENCHMARKS)])
    simulation = imported("bench_host_gpu")
    for name, value in {"TOKENS": 24, "SEEDS": 2, "CASES": [("alone", 2), ("speculative", 2)]}.items():
        monkeypatch.setattr(simulation, name, value)
    rows = simulation.measure([2])
    assert set(rows) == {"alone b2", "speculative b2"}
    assert all(row["wall_over_graphs"] > 1 and row["tok_s"] > 0 for row in rows.values())
    assert rows["speculative b2"]["over_alone"] != 1.0
    between = {key.removeprefix("us ") for key in rows["speculative b2"] if key.startswith("us ")}
    assert {"base to base", "base to assistant", "assistant to base"} <= between
    shares = sum(value for key, value in rows["speculative b2"].items() if key.startswith("% "))
    assert 0 < shares <= 100 * (1 - 1 / rows["speculative b2"]["wall_over_graphs"]) + 1e-9
