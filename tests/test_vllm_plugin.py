"""Deferral inside vLLM, against copies of its interfaces (`vllm_shapes`): each decision is the in-process policy's."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import vllm_shapes
from flows import says
from hypothesis import given
from hypothesis import strategies as st
from vllm_shapes import BatchUpdate, LogitsContext, MoveDirectionality, SamplingParams

from collm.decoding.policies import Policy
from collm.errors import CollmError
from collm.gate import log_gate
from collm.llm.deferral import make_policy, policy_at
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable
from collm.models.served import ServedInfo
from collm.sampling_params import SamplingParams as Asked
from collm.types import BASE
from collm.values import GREEDY
from collm.vllm_plugin import PROCESSOR, register, request
from collm.vllm_plugin.columns import Gate
from collm.vllm_plugin.request import NEVER, SIGNALS, Rule, check, rule

VOCAB, IDS, ZERO, COLUMNS = 20, [22, 23], 24, 27


def row(rate: float, cut: float) -> CalibrationRow:
    return CalibrationRow(target_rate=rate, achieved_rate=rate, threshold=0.5, log_odds=cut, metric_value=0.0)


CUTS = {"gate": (2.0, -2.0), "expected_gain": (-0.5, -3.0), "entropy": (2.5, 1.0), "top_probability": (2.0, 0.3)}
INFO = ServedInfo(
    defer_token_ids=IDS,
    zero_token_id=ZERO,
    zero_columns=COLUMNS - VOCAB - len(IDS),
    vocab_size=VOCAB,
    scale=2.0,
    bias=[0.5, -0.5],
    assistants=[AssistantInfo(name=name, spec="x") for name in "ab"],
    calibration=[
        CalibrationTable(
            task="gsm8k", metric="accuracy", seed=0, num_prompts=1, signal=signal, rows=[row(0.1, high), row(0.5, low)]
        )
        for signal, (high, low) in CUTS.items()
    ],
)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    vllm_shapes.install(monkeypatch)
    monkeypatch.setattr(request, "_served", None)
    return importlib.import_module("collm.vllm_plugin.processor")


def some_logits(n: int, seed: int = 0) -> torch.Tensor:
    """Rows whose gates and doubts are of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, COLUMNS, generator=generator) * torch.rand(n, 1, generator=generator) * 6
    logits[:, IDS] = torch.randn(n, 2, generator=generator) * 2
    return logits


def author(policy: Policy, logits: torch.Tensor) -> int:
    """Who writes, by the plain twin: one row, the law and the gate as the in-process engine has them."""
    law = torch.log_softmax(logits[:VOCAB], dim=-1)
    gate = log_gate(logits[IDS] * INFO.scale + torch.tensor(INFO.bias))
    return policy.decide(says(law, tuple(gate.tolist())), GREEDY, 0).authors[0]


def expected(extra: dict[str, Any] | None, logits: torch.Tensor) -> int:
    found = rule(extra, INFO)
    policy = policy_at(SIGNALS[found.signal], found.cut, 2)  # type: ignore[arg-type]
    return author(policy, logits)


def written(logits: torch.Tensor) -> int:
    """What a processed row lets through: 0 is text of the base, k its k-th deferral token alone."""
    finite = torch.isfinite(logits)
    assert not finite[[i for i in range(VOCAB, COLUMNS) if i not in IDS]].any(), "no padding is ever written"
    if finite[IDS].any():
        assert finite.sum() == 1
        return 1 + IDS.index(int(finite.nonzero()))
    assert finite[:VOCAB].all()
    return BASE


ASKED: list[dict[str, Any] | None] = [
    None,
    {"session_id": "someone else's"},
    {"collm_threshold": 0.5},
    {"collm_threshold": 0.9},
    {"collm_deferral": "never"},
    {"collm_deferral": "always"},
    {"collm_deferral_rate": 0.2},
    {"collm_deferral_rate": 0.5, "collm_task": "gsm8k"},
    {"collm_deferral": "expected_gain", "collm_threshold": 0.2},
    {"collm_deferral": "entropy", "collm_threshold": 1.5},
    {"collm_deferral": "top_probability", "collm_deferral_rate": 0.3},
    {"collm_signal": "gate", "collm_cut": 0.25},
    {"collm_signal": "entropy", "collm_cut": "-inf"},
]


def test_v1_decides_as_the_policies_do(processor: ModuleType) -> None:
    """Through joining, leaving and moving, each row keeps its own rule."""
    made = processor.Deferral(vllm_shapes.config(INFO.to_config(), 32), torch.device("cpu"), False)
    assert isinstance(made, vllm_shapes.V1LogitsProcessor) and not made.is_argmax_invariant()
    batch: dict[int, dict[str, Any] | None] = {}

    def agrees(seed: int) -> set[int]:
        logits = some_logits(max(batch) + 1, seed)
        out = made.apply(logits.clone())
        found = [written(out[i]) for i in range(len(logits))]
        assert found == [expected(batch.get(i), logits[i]) for i in range(len(logits))]
        assert all(torch.equal(out[i, :VOCAB], logits[i, :VOCAB]) for i, who in enumerate(found) if who == BASE)
        return set(found)

    batch.update(enumerate(ASKED))
    made.update_state(BatchUpdate(len(batch), added=[(i, SamplingParams(a), [1], []) for i, a in batch.items()]))
    assert set.union(*(agrees(seed) for seed in range(20))) == {0, 1, 2}
    made.update_state(None)
    agrees(20)
    last = len(ASKED) - 1
    made.update_state(
        BatchUpdate(
            len(batch) - 1,
            removed=[3],
            added=[(7, SamplingParams({"collm_deferral": "always"}), [1], [])],
            moved=[(last, 3, MoveDirectionality.UNIDIRECTIONAL), (0, 5, MoveDirectionality.SWAP)],
        )
    )
    batch[7] = {"collm_deferral": "always"}
    batch[3] = batch.pop(last)
    batch[0], batch[5] = batch[5], batch[0]
    for seed in range(5):
        agrees(seed)


def test_v2_decides_as_the_policies_do(processor: ModuleType) -> None:
    """Slots in any order; a request that drafts owns several rows."""
    state = vllm_shapes.LogitsProcRequestState(torch.device("cpu"), 32, COLUMNS)
    made = processor.Deferral(vllm_shapes.config(INFO.to_config()), state)
    assert isinstance(made, vllm_shapes.V2LogitsProcessor)
    slots = [(7 * i) % 32 for i in range(len(ASKED))]
    for slot, asked in zip(slots, ASKED, strict=True):
        assert made.add_request(slot, SamplingParams(asked)), "hidden tokens must be hidden from every request"
    made.apply_staged_writes()
    order = slots[::-1]
    rows_each = [1 + i % 3 for i in range(len(order))]
    of = [ASKED[slots.index(slot)] for slot, n in zip(order, rows_each, strict=True) for _ in range(n)]
    seen = set()
    for seed in range(20):
        logits = some_logits(len(of), seed)
        out = made.apply(logits.clone(), LogitsContext.of(order, rows_each))
        found = [written(r) for r in out]
        assert found == [expected(a, r) for a, r in zip(of, logits, strict=True)]
        seen |= set(found)
    assert seen == {0, 1, 2}
    made.add_request(slots[5], SamplingParams(None))  # a slot's next request
    out = made.apply(some_logits(1), LogitsContext.of([slots[5]]))
    assert written(out[0]) == BASE


def test_without_any_deferral_the_law_is_the_base_s_own(processor: ModuleType) -> None:
    made = processor.Deferral(vllm_shapes.config(INFO.to_config()), torch.device("cpu"), False)
    logits = some_logits(3)
    out = made.apply(logits.clone())
    assert torch.equal(out[:, :VOCAB], logits[:, :VOCAB]) and bool(torch.isneginf(out[:, VOCAB:]).all())


@given(st.integers(0, 2**16), st.sampled_from(range(4)), st.floats(-4, 4))
def test_signals_are_those_of_the_policies(seed: int, signal: int, cut: float) -> None:
    logits = some_logits(6, seed)
    gate = Gate(INFO, torch.device("cpu"))
    values = gate.signals(logits, torch.logsumexp(gate.scores(logits), dim=-1))[:, signal]
    near = (values - cut).abs() < 1e-5  # the two sum in another order
    out = gate.decide(
        logits.clone(), torch.full((6,), signal), torch.full((6,), cut), defers=True, reads_law=signal > 0
    )
    policy = policy_at(SIGNALS[signal], cut, 2)  # type: ignore[arg-type]
    for i in range(6):
        assert near[i] or written(out[i]) == author(policy, logits[i])


# -- what a request may ask


def test_a_rate_is_looked_up_in_the_calibration_that_travelled_along() -> None:
    for signal, (high, low) in CUTS.items():
        mode = "threshold" if signal == "gate" else signal
        asked = {"collm_deferral": mode, "collm_deferral_rate": 0.3, "collm_task": "gsm8k"}
        found = rule(asked, INFO)
        assert found == Rule(SIGNALS.index(signal), pytest.approx((high + low) / 2))
        params = Asked(deferral=mode, deferral_rate=0.3)  # type: ignore[arg-type]
        assert policy_at(signal, found.cut, 2) == make_policy(params, 2, True, INFO.calibration)  # type: ignore[arg-type]
    assert rule({"collm_deferral_rate": 0}, INFO) == rule({"collm_signal": "gate", "collm_cut": "inf"}, None) == NEVER


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"collm_treshold": 0.5}, "did you mean 'collm_threshold'"),
        ({"collm_threshold": 1.5}, r"must lie in \[0, 1\]"),
        ({"collm_threshold": "much"}, "must be a number, not 'much'"),
        ({"collm_threshold": True}, "must be a number"),
        ({"collm_deferral_rate": 0.05}, "nothing can be interpolated"),
        ({"collm_deferral_rate": 0.3, "collm_task": "drop"}, "not calibrated for task 'drop'"),
        ({"collm_threshold": 0.3, "collm_deferral_rate": 0.3}, "not both"),
        ({"collm_deferral": "compose"}, "one of threshold, expected_gain"),
        ({"collm_deferral": "always", "collm_threshold": 0.3}, "threshold is read by"),
        ({"collm_deferral": "entropy"}, "needs deferral_rate or threshold"),
        ({"collm_task": 7, "collm_deferral_rate": 0.3}, "not calibrated for task 7"),
        ({"collm_cut": 1.0}, "belong together"),
        ({"collm_signal": "mood", "collm_cut": 1.0}, "collm_signal is one of"),
        ({"collm_signal": "gate", "collm_cut": "nan"}, "must be a number"),
    ],
)
def test_settings_that_mean_nothing_are_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(CollmError, match=message):
        rule(asked, INFO)


def test_a_rate_needs_to_know_the_model() -> None:
    with pytest.raises(CollmError, match="VLLM_PLUGINS"):
        rule({"collm_deferral_rate": 0.3}, None)
    assert rule({"collm_threshold": 0.5}, None) == Rule(0, 0.0)


@pytest.mark.parametrize(
    ("settings", "always_wrong"),
    [
        ({"ignore_eos": True}, True),
        ({"min_tokens": 3}, True),
        ({"structured_outputs": object()}, True),
        ({"logit_bias": {22: 5.0}}, True),
        ({"allowed_token_ids": [1, 2]}, True),
        ({"presence_penalty": 0.5}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"bad_words": ["no"]}, False),
    ],
)
def test_what_would_be_wrong_together_with_deferral_is_refused_by_name(
    processor: ModuleType, settings: dict[str, Any], always_wrong: bool
) -> None:
    """Most is wrong with any deferral; penalties only where the law that they change is read."""
    [name] = settings
    shown = {"structured_outputs": "response_format"}.get(name, name)
    request.admit(INFO.to_config())
    validate = processor.Deferral.validate_params
    validate(SamplingParams(None, **settings))
    validate(SamplingParams({"collm_deferral": "never"}, **settings))
    with pytest.raises(ValueError, match=shown):
        validate(SamplingParams({"collm_deferral": "entropy", "collm_threshold": 1.0}, **settings))
    if always_wrong:
        with pytest.raises(ValueError, match=f"{shown} together with deferral"):
            validate(SamplingParams({"collm_threshold": 0.5}, **settings))
    else:
        validate(SamplingParams({"collm_threshold": 0.5}, **settings))


def test_the_frontend_refuses_what_it_cannot_look_up(processor: ModuleType) -> None:
    request.admit(INFO.to_config())
    check(SamplingParams({"collm_deferral_rate": 0.3}))
    with pytest.raises(CollmError, match="not calibrated for task"):
        check(SamplingParams({"collm_deferral_rate": 0.3, "collm_task": "drop"}))


# -- the entry point


def test_the_plugin_adds_the_processor_where_an_export_is_served_and_only_there(processor: ModuleType) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    register()
    assert EngineArgs(None).create_model_config().logits_processors is None
    assert EngineArgs(None, ["their:own"]).create_model_config().logits_processors == ["their:own"]
    assert request.served() is None
    served = EngineArgs(INFO.to_config(), ["their:own"]).create_model_config()
    assert served.logits_processors == ["their:own", PROCESSOR]
    assert request.served() == INFO
    assert EngineArgs(INFO.to_config(), [PROCESSOR]).create_model_config().logits_processors == [PROCESSOR]
    module, _, name = PROCESSOR.partition(":")
    named = getattr(importlib.import_module(module), name)
    assert issubclass(named, (vllm_shapes.V1LogitsProcessor,)) and issubclass(named, vllm_shapes.V2LogitsProcessor)


def test_a_damaged_export_stops_the_server_and_says_so(processor: ModuleType) -> None:
    from vllm.engine.arg_utils import EngineArgs

    register()
    with pytest.raises(CollmError, match="export the checkpoint again"):
        EngineArgs(INFO.to_config() | {"format_version": 9}).create_model_config()
