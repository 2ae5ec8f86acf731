"""What a policy is asked token by token is what it decides."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from collm.decoding.policies import (
    Always,
    ByEntropy,
    ByTopProbability,
    ExpectedGain,
    Never,
    Policy,
    Random,
    Sampled,
    Threshold,
    decide,
    defers,
)
from collm.types import BASE
from collm.values import Answer, Draw

SHARES = st.floats(1e-6, 1 - 1e-6)
POLICIES = st.one_of(
    SHARES.map(Threshold.of_probability),
    SHARES.map(ExpectedGain.of_probability),
    st.just(Sampled()),
    SHARES.map(lambda rate: Random(rate, 2)),
    st.floats(0, 5).map(lambda nats: ByEntropy(nats, 2)),
    st.floats(0, 5).map(lambda nats: ByTopProbability(nats, 2)),
    st.just(Never()),
    st.just(Always()),
)


@given(
    POLICIES,
    st.lists(st.floats(1e-9, 1), min_size=2, max_size=4),
    st.floats(0, 5),
    st.floats(-5, 0),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10**4),
    st.none() | st.booleans(),
)
def test_defers_is_what_is_decided(
    policy: Policy, gate: list[float], entropy: float, top: float, seed: int, position: int, tested: bool | None
) -> None:
    log_gate = tuple(math.log(share / math.fsum(gate)) for share in gate)
    answer = Answer(5, top, 5, top, entropy, log_gate, defers=tested)
    draw = Draw(seed)
    assert defers(policy, answer, draw, position) == (decide(policy, answer, draw, position).authors[0] != BASE)


def test_a_gate_at_the_threshold_does_not_defer() -> None:
    answer = Answer(5, -1.0, 5, -1.0, 1.0, (-1.25, -0.75))
    for policy, expected in ((Threshold(0.5), False), (Threshold(math.nextafter(0.5, 0)), True)):
        assert defers(policy, answer, Draw(), 3) is expected
        assert (decide(policy, answer, Draw(), 3).authors[0] != BASE) is expected
