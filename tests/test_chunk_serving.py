"""A pair with different tokenizers behind the OpenAI API."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import openai
import pytest
from servers import Live, live
from test_chunked import system

from collm.sampling_params import SamplingParams
from collm.serving.tokens import Token
from collm.types import Step

USER = [{"role": "user", "content": "How many apples?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(system()) as running:
        yield running


def test_a_chunk_stands_for_a_token(server: Live) -> None:
    params = SamplingParams(max_tokens=40, deferral="random", threshold=0.5, seed=7)
    here = server.llm.generate(USER, params)
    body = {"collm": {"method": "random", "threshold": 0.5, "tokens": True}}
    answer = server.client().chat.completions.create(
        model="pair",
        messages=USER,
        max_tokens=40,
        seed=7,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body=body,
    )
    [choice] = answer.choices
    assert choice.message.content == here.text and answer.usage.completion_tokens == 40
    assert all(step.data is not None and sum(step.token_lengths) == len(step.data) for step in here.steps)
    told = choice.model_extra["collm"]["tokens"]
    assert sum(len(each["token_ids"]) for each in told) == 40
    assert [tuple(each["token_texts"]) for each in told] == [step.token_pieces for step in here.steps]
    assert [each["author"] for each in told] == [here.model_names[step.author] for step in here.steps]
    found = choice.logprobs.content
    assert len(found) == 40 == len(here.token_ids)
    assert b"".join(bytes(each.bytes) for each in found).decode() == here.text
    at = list(accumulate((len(step.token_ids) for step in here.steps), initial=0))[:-1]
    assert [found[n].logprob for n in at] == pytest.approx([step.log_prob for step in here.steps], abs=1e-3)
    rest = [each for n, each in enumerate(found) if n not in at]
    assert rest and all(each.logprob is None and not each.top_logprobs for each in rest)
    assert all(len(found[n].top_logprobs) == (0 if step.author else 2) for n, step in zip(at, here.steps, strict=True))
    listed = (
        server.client()
        .completions.create(
            model="pair",
            prompt="How many?",
            max_tokens=40,
            temperature=0,
            logprobs=1,
            extra_body={"collm": {"method": "always"}},
        )
        .choices[0]
    )
    assert None in listed.logprobs.token_logprobs and listed.logprobs.token_logprobs[0] is not None
    assert listed.logprobs.text_offset == sorted(listed.logprobs.text_offset)
    for value, top in zip(listed.logprobs.token_logprobs, listed.logprobs.top_logprobs, strict=True):
        assert (value is None) == (top is None)


@pytest.mark.parametrize(
    ("shown", "parts"),
    [
        ('Größ"', [(b"Gr\xc3", 7), (b"\xb6", 9), (b'\xc3\x9f"', 10)]),
        ("Gr", [(b"Gr", 7)]),  # a stop string follows
        ("", [(b"", 7)] * 3),  # the next chunk brings the rest of a character
    ],
)
def test_a_chunk_falls_into_its_tokens(shown: str, parts: list[tuple[bytes, int]]) -> None:
    step = Step(5, 0, -1.0, token_ids=(5, 6, 7), data='Größ"'.encode(), token_lengths=(3, 1, 3))
    found = Token(step, shown, 7).parts
    assert [(part.data, part.offset) for part in found] == parts
    assert [part.first for part in found] == [True, *[False] * (len(parts) - 1)]


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
