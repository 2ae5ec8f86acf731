"""The simulation of pairs behind servers, against what can be reckoned by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from collm.bench.simulation import Load, ServerCosts, gpu_costs, simulate

FREE = ServerCosts(step=1e-9)


@pytest.fixture
def one_token_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written ahead, which is easier to reckon."""
    monkeypatch.setattr("collm.remote.ahead.MOST", 1)


def test_runs_of_deferrals_are_written_ahead() -> None:
    """Eight tokens of the assistant take eight steps and one call, while the base is asked about each of them."""
    base = ServerCosts(step=0.010, call=0.004)
    assistant = ServerCosts(step=0.050, call=0.006)
    found = simulate(base, assistant, Load(1, 1.0, tokens=400, prompt=10, texts=2))
    assert math.isclose(1 / found.tokens_per_second, (8 * 0.050 + 0.006 + 0.010 + 0.004) / 8, rel_tol=0.02)
    assert math.isclose(found.calls_per_token, 1 + 1 / 8, abs_tol=0.02)
    for streams in (1, 16):  # what is written in vain costs less than what is gained
        load = Load(streams, 0.5, tokens=64, prompt=10, texts=32)
        with pytest.MonkeyPatch.context() as never:
            never.setattr("collm.remote.ahead.MOST", 1)
            plain = simulate(base, assistant, load).tokens_per_second
        assert simulate(base, assistant, load).tokens_per_second > plain


def test_one_stream_takes_its_steps_and_its_calls(one_token_a_call: None) -> None:
    """Each token costs a step of its author, each deferral one more of the base; each request a call."""
    base = ServerCosts(step=0.010, call=0.004)
    assistant = ServerCosts(step=0.050, call=0.006)
    for rate in (0.0, 0.3, 1.0):
        load = Load(1, rate, tokens=400, prompt=10, texts=4)
        found = simulate(base, assistant, load)
        # Behind every deferral the base is asked again, but for a text's last token.
        seconds = 0.010 + rate * (0.050 + 0.006 + 0.004)
        assert math.isclose(found.tokens_per_second, 1 / seconds, rel_tol=0.05), rate
        assert math.isclose(found.calls_per_token, 2 * rate, abs_tol=0.06)
        assert math.isclose(found.busy[1], rate * 0.050 / seconds, rel_tol=0.08, abs_tol=1e-6)


def test_streams_share_steps_until_a_server_is_busy() -> None:
    costs = ServerCosts(step=0.010, row=0.0001, call=0.002)
    rates = [simulate(costs, FREE, Load(n, 0.0, tokens=64, prompt=1)).tokens_per_second for n in (1, 16, 256)]
    assert math.isclose(rates[1], 16 / (0.010 + 15 * 0.0001), rel_tol=0.05)
    assert math.isclose(rates[2], 256 / (0.010 + 255 * 0.0001), rel_tol=0.05)
    full = simulate(replace(costs, seats=64), FREE, Load(256, 0.0, tokens=64, prompt=1))
    assert math.isclose(full.tokens_per_second, 64 / (0.010 + 63 * 0.0001), rel_tol=0.08)


def test_what_a_prefix_cache_does_not_keep_is_read_again(one_token_a_call: None) -> None:
    load = Load(1, 1.0, tokens=100, prompt=1000, texts=2)
    none, some, all_of_it = (
        simulate(FREE, ServerCosts(step=0.01, read=0.001, block=block), load).text_seconds for block in (0, 128, 1)
    )
    assert math.isclose(none, 100 * (0.01 + 1.05), rel_tol=0.02)
    assert math.isclose(all_of_it, 100 * 0.01 + 1.0, rel_tol=0.15)
    assert all_of_it < some < none / 5


def test_replicas_share_the_work_of_many_streams() -> None:
    costs = ServerCosts(step=0.030, row=0.0005)
    for replicas in (1, 4, 64):
        load = Load(128, 1.0, tokens=24, prompt=1)
        found = simulate(FREE, costs, load, assistant_replicas=replicas).tokens_per_second
        each = 128 / replicas
        most = 128 / (0.030 + (each - 1) * 0.0005)
        # At worst every other text comes when a step has just begun.
        assert 0.45 * most < found < 1.05 * most


def test_company_is_worth_waiting_for(one_token_a_call: None) -> None:
    """Texts that were answered together come again one behind the other; who begins with the first makes the others
    wait for a whole step. Alone, there is nobody to wait for."""
    eager = ServerCosts(step=0.030, row=0.0005)
    patient = replace(eager, company=2, patience=0.002)
    both = Load(2, 1.0, tokens=64, prompt=1)
    one, other = (simulate(FREE, costs, both).tokens_per_second for costs in (eager, patient))
    assert other > 1.8 * one and math.isclose(other, 2 / 0.0305, rel_tol=0.03)
    simulate(eager, replace(patient, company=8), Load(16, 0.3, tokens=32, prompt=1))  # nobody waits for ever
    alone = replace(both, streams=1)
    one, other = (simulate(FREE, costs, alone).tokens_per_second for costs in (eager, patient))
    assert math.isclose(other, 1 / 0.032, rel_tol=0.01) and one > other


def test_thousands_of_streams_are_simulated_in_seconds() -> None:
    found = simulate(
        ServerCosts(step=0.02, seats=4096), ServerCosts(step=0.05, seats=4096), Load(2000, 0.2, 8, 1, 2000)
    )
    assert found.tokens_per_second > 10_000


@pytest.mark.parametrize("wrong", [{"step": 0}, {"step": 1, "row": -1}, {"step": 1, "seats": 0}])
def test_costs_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="takes time"):
        ServerCosts(**wrong)  # type: ignore[arg-type]


def test_gpus_are_reckoned_from_bytes_and_operations() -> None:
    """70 billion parameters of 2 bytes over 4 GPUs that read 2 TB/s: 17.5 ms and what launching costs."""
    costs = gpu_costs(70, 4)
    assert math.isclose(costs.step, 0.0175 + 0.002)
    assert math.isclose(costs.read, 140e9 / 1600e12)
    assert math.isclose(costs.row, 0.13e6 * 1024 / 8e12)
