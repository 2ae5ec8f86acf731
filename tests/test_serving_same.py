"""A server's texts are those that the same system writes in this process: every method, many requests at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, get_args

import openai
import pytest
import torch
from servers import Live, live
from test_llm import gate
from tiny import make_model, make_tokenizer

from collm.data.formatting import Formatter
from collm.llm import CollaborativeLM
from collm.llm.sharing import share
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.sampling_params import Deferral, SamplingParams
from collm.types import Generation, Step

PROMPTS = ("Paris is the", "56 * 9 = ")
METHODS: tuple[Deferral, ...] = get_args(Deferral)
DIALS: dict[Deferral, float] = {
    "threshold": 0.5,
    "expected_gain": 0.2,
    "random": 0.4,
    "entropy": 3.0,
    "top_probability": 0.3,
    "nudging": 0.2,
}
DEFINED_FOR: dict[Deferral, int] = {"contrastive": 1, "nudging": 1, "proxy_tuning": 2}
"""Assistants that a method wants."""
TOKENS = 12


def system(num_assistants: int, dtype: torch.dtype = torch.float32) -> CollaborativeLM:
    """Tiny transformers of different architectures, all with laws over the whole vocabulary."""
    tokenizer, kinds = make_tokenizer(), ("llama", "qwen3", "llama")[: 1 + num_assistants]
    models = [
        LocalModel(make_model(kind, seed=z).to(dtype), tokenizer, None if z else gate(num_assistants), name=f"m{z}")
        for z, kind in enumerate(kinds)
    ]
    return CollaborativeLM(models, [Formatter(tokenizer)] * len(models))


def params(method: Deferral, temperature: float) -> SamplingParams:
    return SamplingParams(
        max_tokens=TOKENS, temperature=temperature, seed=3, deferral=method, threshold=DIALS.get(method)
    )


async def asked(client: openai.AsyncOpenAI, prompt: str, wanted: SamplingParams, stream: bool) -> Any:
    """Text, and the tokens with their authors."""
    who: dict[str, Any] = {"method": wanted.deferral, "threshold": wanted.threshold, "tokens": True}
    found: Any = await client.completions.create(
        model="pair",
        prompt=prompt,
        max_tokens=wanted.max_tokens,
        temperature=wanted.temperature,
        seed=wanted.seed,
        stream=stream,
        extra_body={"collm": {name: value for name, value in who.items() if value is not None}},
    )
    choices = [chunk.choices[0] async for chunk in found] if stream else [found.choices[0]]
    told = [token for choice in choices for token in (choice.model_extra or {}).get("collm", {}).get("tokens", ())]
    return "".join(choice.text for choice in choices), [(token["token_id"], token["author"]) for token in told]


def all_at_once(server: Live, wanted: Sequence[tuple[str, SamplingParams]]) -> list[Any]:
    async def run() -> list[Any]:
        async with server.asynchronous() as client:
            return await asyncio.gather(*(asked(client, *each, stream=i % 2 == 0) for i, each in enumerate(wanted)))

    return asyncio.run(run())


@pytest.mark.parametrize("num_assistants", [1, 2])
def test_float32_every_method_greedy_and_sampled(num_assistants: int) -> None:
    methods = [method for method in METHODS if DEFINED_FOR.get(method, num_assistants) == num_assistants]
    wanted = [(prompt, params(method, t)) for method in methods for t in (0, 0.8) for prompt in PROMPTS]
    with live(system(num_assistants)) as server:
        found = all_at_once(server, wanted)
    alone = system(num_assistants)
    for (prompt, own), (text, tokens) in zip(wanted, found, strict=True):
        expected = alone.generate(prompt, own)
        assert text == expected.text, own
        assert tokens == [(step.token_id, alone.model_names[step.author]) for step in expected.steps], own
    authors = {author for _, tokens in found for _, author in tokens}
    assert len(authors) == 1 + num_assistants


def test_models_with_different_tokenizers() -> None:
    """They write chunks: the text is the same, and what is told of it joins to it."""
    tokenizers = (make_tokenizer(), make_tokenizer(vocab_size=300))

    def mixed() -> CollaborativeLM:
        models = [
            LocalModel(make_model(vocab_size=size, seed=z), own, name=f"m{z}")
            for z, (own, size) in enumerate(zip(tokenizers, (320, 300), strict=True))
        ]
        formatters = [Formatter(own) for own in tokenizers]
        sharing = share(models, formatters, CheckpointInfo(), False)
        return CollaborativeLM(models, formatters, has_gate=False, sharing=sharing)

    wanted = [(prompt, params("random", t)) for t in (0, 0.8) for prompt in PROMPTS]
    with live(mixed()) as server:
        found = all_at_once(server, wanted)
        refused = server.post("/v1/collm/others", json={"prompt": "Rome", "token_ids": [5]})
        assert refused.status_code == 400 and "one tokenizer" in refused.json()["error"]["message"]
    alone = mixed()
    for (prompt, own), (text, tokens) in zip(wanted, found, strict=True):
        expected = alone.generate(prompt, own)
        assert text == expected.text
        assert [author for _, author in tokens] == [alone.model_names[step.author] for step in expected.steps]


def test_bfloat16_up_to_ties() -> None:
    """Where texts part, both were as good: a token of nearly the same probability, or a gate at its edge."""
    methods: tuple[Deferral, ...] = ("threshold", "compose", "never", "always")
    wanted = [(prompt, params(method, 0)) for method in methods for prompt in PROMPTS]
    with live(system(1, torch.bfloat16)) as server:
        found = all_at_once(server, wanted)
    alone = system(1, torch.bfloat16)
    for (prompt, own), (_, tokens) in zip(wanted, found, strict=True):
        expected = alone.generate(prompt, SamplingParams(**{**_fields(own), "top_log_probs": 5}))
        same_or_tied(expected, tokens, alone.model_names)


def _fields(own: SamplingParams) -> dict[str, Any]:
    return {name: getattr(own, name) for name in ("max_tokens", "seed", "deferral", "threshold")}


def same_or_tied(expected: Generation, tokens: Sequence[tuple[int, str]], names: Sequence[str]) -> None:
    for step, (token_id, author) in zip(expected.steps, tokens, strict=False):
        if (step.token_id, names[step.author]) != (token_id, author):
            assert tied(step, token_id) or at_the_edge(step), (step, token_id, author)
            return
    assert len(tokens) == len(expected.steps)


def tied(step: Step, token_id: int) -> bool:
    return step.top[0][1] - dict(step.top).get(token_id, -torch.inf) < 0.1


def at_the_edge(step: Step) -> bool:
    return abs(step.gate[0] - 0.5) < 0.02
