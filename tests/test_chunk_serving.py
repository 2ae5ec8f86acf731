"""A pair with different tokenizers behind the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from servers import Live, live
from test_chunked import system

from collm.sampling_params import SamplingParams

USER = [{"role": "user", "content": "How many apples?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(system()) as running:
        yield running


def test_a_chunk_stands_for_a_token(server: Live) -> None:
    params = SamplingParams(max_tokens=16, deferral="random", threshold=0.5, seed=7)
    here = server.llm.generate(USER, params)
    body = {"collm": {"method": "random", "threshold": 0.5, "tokens": True}}
    answer = server.client().chat.completions.create(
        model="pair",
        messages=USER,
        max_tokens=16,
        seed=7,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body=body,
    )
    [choice] = answer.choices
    assert choice.message.content == here.text and answer.usage.completion_tokens == 16
    assert all(step.data is not None and sum(step.token_lengths) == len(step.data) for step in here.steps)
    told = choice.model_extra["collm"]["tokens"]
    assert sum(len(each["token_ids"]) for each in told) == 16
    assert [tuple(each["token_texts"]) for each in told] == [step.token_pieces for step in here.steps]
    assert [each["author"] for each in told] == [here.model_names[step.author] for step in here.steps]
    found = choice.logprobs.content
    assert [each.logprob for each in found] == pytest.approx([step.log_prob for step in here.steps], abs=1e-3)
    assert {bool(each.top_logprobs) for each, step in zip(found, here.steps, strict=True) if step.author} == {False}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("pair", {"prompt": [5, 6]}),
        ("pair", {"prompt": "a b", "echo": True, "logprobs": 1}),
        ("one", {"prompt": "a"}),
        ("pair", {"prompt": "a", "extra_body": {"collm": {"speculative": True}}}),
    ],
)
def test_what_needs_one_tokenizer_is_refused(server: Live, model: str, more: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        server.client().completions.create(model=model, max_tokens=4, **more)
