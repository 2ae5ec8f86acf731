"""The acceptance list of an OpenAI-compatible server, with the official client against a live one on fake models."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import make_tokenizer
from servers import Live, fake_pair, live, saying
from test_llm import pair
from test_serving_same import system

from collm.data.formatting import Formatter, PromptFormat
from collm.errors import CollmError
from collm.evaluation.likelihood import GivenText, likelihoods
from collm.llm import CollaborativeLM, TokenPrompt
from collm.models.fake import FakeModel
from collm.sampling_params import SamplingParams
from collm.serving.fields import NEUTRAL, Request
from collm.serving.openapi import KINDS

USER = [{"role": "user", "content": "How many apples?"}]
CHAT = {"model": "pair", "messages": USER, "max_tokens": 16, "seed": 7}
TEXT = {"model": "pair", "prompt": "Paris is the", "max_tokens": 12, "seed": 7}


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(fake_pair(eos=True, max_model_len=256)) as running:
        yield running


@pytest.fixture
def client(server: Live) -> openai.OpenAI:
    return server.client()


def chat(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{**CHAT, **more})


def complete(client: openai.OpenAI, **more: Any) -> Any:
    return client.completions.create(**{**TEXT, **more})


def refusal(client: openai.OpenAI, path: str = "/chat/completions", **more: Any) -> openai.APIStatusError:
    body = {**(CHAT if "chat" in path else TEXT), **more}
    with pytest.raises(openai.APIStatusError) as caught:
        client.post(path, body=body, cast_to=httpx.Response)
    assert set(caught.value.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    return caught.value


# 1-9: models, streams, usage


def test_models_and_health(server: Live, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pair", "base", "helper"]
    assert client.models.retrieve("helper").object == "model"
    assert httpx.get(server.url + "/health").status_code == 200


def test_a_stream_is_server_sent_events(server: Live) -> None:
    response = server.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == "" and events.pop() == "data: [DONE]"
    assert all(isinstance(json.loads(event.removeprefix("data: ")), dict) for event in events)


def test_chat_chunks(client: openai.OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert len({(c.id, c.model, c.created) for c in chunks}) == 1
    deltas = [c.choices[0].delta for c in chunks]
    assert deltas[0].role == "assistant" and not deltas[0].content
    assert all(delta.role is None for delta in deltas[1:])
    reasons = [c.choices[0].finish_reason for c in chunks]
    assert reasons[-1] in ("stop", "length") and reasons[:-1] == [None] * (len(chunks) - 1)
    assert deltas[-1].model_dump(exclude_unset=True) == {}
    assert all(c.usage is None for c in chunks)


@pytest.mark.parametrize("temperature", [0, 1])
def test_streamed_whole_and_in_process_texts_are_one(server: Live, client: openai.OpenAI, temperature: float) -> None:
    more = {"temperature": temperature, "max_tokens": 60}
    whole = chat(client, **more).choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chat(client, stream=True, **more)) == whole
    assert server.llm.generate(USER, SamplingParams(max_tokens=60, seed=7, temperature=temperature)).text == whole
    text = complete(client, **more).choices[0].text
    assert "".join(c.choices[0].text for c in complete(client, stream=True, **more)) == text
    assert (
        server.llm.generate("Paris is the", SamplingParams(max_tokens=60, seed=7, temperature=temperature)).text == text
    )


@pytest.mark.parametrize("method", ["threshold", "sampled", "compose", "never", "always", "mixture", "confident"])
def test_every_method_writes_what_it_writes_in_process(server: Live, method: str) -> None:
    """Under concurrency: many requests at once, each its own text."""

    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        found = await client.completions.create(
            model="pair", prompt="Rome", max_tokens=20, seed=seed, extra_body={"collm": {"method": method}}
        )
        return found.choices[0].text

    async def ask_all() -> list[str]:
        async with server.asynchronous() as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(6)))

    params = [SamplingParams(max_tokens=20, temperature=1, seed=seed, deferral=method) for seed in range(6)]  # type: ignore[arg-type]
    assert asyncio.run(ask_all()) == [found.text for found in server.llm.generate_batch(["Rome"] * 6, params)]


def test_usage(client: openai.OpenAI, server: Live) -> None:
    whole = chat(client)
    prompt = len(server.llm.formatters[0].prompt(USER))
    assert whole.usage.prompt_tokens == prompt and 0 < whole.usage.completion_tokens <= 16
    assert whole.usage.total_tokens == prompt + whole.usage.completion_tokens
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.to_dict() == whole.usage.to_dict()
    assert all(chunk.usage is None for chunk in chunks[:-1])
    each = list(chat(client, stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [chunk.usage.completion_tokens for chunk in each]
    assert counts == sorted(counts) and counts[-1] == whole.usage.completion_tokens
    ids = complete(client, prompt=[5, 6, 7])
    assert ids.usage.prompt_tokens == 3
    assert refusal(client, stream_options={"include_usage": True}).param == "stream_options"


# 10-15: prompts, log-probabilities, n


def test_prompts_of_all_kinds(client: openai.OpenAI, server: Live) -> None:
    ids = server.llm.tokenizer.encode("Paris is the")
    one = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=0, prompt=ids).choices[0].text == one
    other = complete(client, temperature=0, prompt="Rome").choices[0].text
    for prompts in (["Paris is the", "Rome"], [ids, "Rome"], [ids, server.llm.tokenizer.encode("Rome")]):
        found = complete(client, temperature=0, prompt=prompts)
        assert [choice.index for choice in found.choices] == [0, 1]
        assert [choice.text for choice in found.choices] == [one, other]
    for wrong in ([], [[]], [320], [-1], [True], [1.5], {"a": 1}, None, [["a"]]):
        assert refusal(client, "/completions", prompt=wrong).param == "prompt"


def test_log_probs_of_completions(client: openai.OpenAI) -> None:
    assert complete(client).choices[0].logprobs is None
    for k in (0, 1, 5, 20):
        choice = complete(client, logprobs=k, max_tokens=30).choices[0]
        found = choice.logprobs
        assert "".join(found.tokens) == choice.text
        assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
        assert all(value <= 0 for value in found.token_logprobs)
        assert all(max(1, k) <= len(top) <= k + 1 for top in found.top_logprobs)
        assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]


def test_echo_tells_the_marginal_law(client: openai.OpenAI, server: Live) -> None:
    """As `lm_eval --model local-completions` asks for it."""
    ids = server.llm.tokenizer.encode("Paris is the capital of")
    found = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=1).choices[0]
    assert found.text.startswith("Paris is the capital of")
    assert found.logprobs.token_logprobs[0] is None and found.logprobs.top_logprobs[0] is None
    [expected] = likelihoods(server.llm.models, [GivenText(((ids[0],),) * 2, tuple(ids[1:]))])
    given = found.logprobs.token_logprobs[1 : len(ids)]
    assert sum(given) == pytest.approx(expected.log_prob, abs=1e-4)
    tops = found.logprobs.top_logprobs[1 : len(ids)]
    assert all(value <= max(top.values()) for value, top in zip(given, tops, strict=True))
    alone = complete(client, model="helper", prompt=ids, echo=True, logprobs=1, max_tokens=0).choices[0]
    [own] = likelihoods(server.llm.models, [GivenText(((ids[0],),) * 2, tuple(ids[1:]))], alone=1)
    assert sum(alone.logprobs.token_logprobs[1:]) == pytest.approx(own.log_prob, abs=1e-4)
    assert alone.text == "Paris is the capital of" and alone.finish_reason == "length"
    text = complete(client, echo=True).choices[0].text
    assert text.startswith("Paris is the") and text == "".join(
        c.choices[0].text for c in complete(client, echo=True, stream=True)
    )
    assert refusal(client, "/completions", max_tokens=0).param == "max_tokens"


def test_greedy_continuations_are_the_most_probable_ones(client: openai.OpenAI, server: Live) -> None:
    """lm_eval compares the numbers: a token is greedy if its own is the largest."""
    ids = server.llm.tokenizer.encode("Paris")
    law = server.llm.generate(TokenPrompt((tuple(ids),) * 2), SamplingParams(max_tokens=1, deferral="compose"))
    asked = complete(client, prompt=[*ids, *law.token_ids], echo=True, logprobs=1, max_tokens=0)
    last = asked.choices[0].logprobs
    assert last.token_logprobs[-1] == max(last.top_logprobs[-1].values())


def test_log_probs_of_chats(client: openai.OpenAI) -> None:
    assert chat(client, logprobs=False).choices[0].logprobs is None
    for k in (0, 3, 20):
        choice = chat(client, logprobs=True, top_logprobs=k, max_tokens=30).choices[0]
        content = choice.logprobs.content
        assert "".join(item.token for item in content) == choice.message.content
        assert all(item.logprob <= 0 and len(item.top_logprobs) == k for item in content)
        assert all(bytes(item.bytes).decode() == item.token for item in content)
        chunks = list(chat(client, logprobs=True, top_logprobs=k, max_tokens=30, stream=True))
        streamed = [item for c in chunks if c.choices[0].logprobs for item in c.choices[0].logprobs.content]
        assert [item.to_dict() for item in streamed] == [item.to_dict() for item in content]


@pytest.mark.parametrize("method", ["threshold", "compose", "always", "nudging"])
def test_the_most_probable_tokens_are_told_whatever_the_method(client: openai.OpenAI, method: str) -> None:
    who = {"collm": {"method": method}}
    [choice] = chat(client, temperature=0, logprobs=True, top_logprobs=2, extra_body=who).choices
    for item in choice.logprobs.content:
        assert item.logprob == pytest.approx(item.top_logprobs[0].logprob, abs=1e-5)


def test_too_many_log_probs_are_refused_and_the_next_request_is_answered(client: openai.OpenAI) -> None:
    assert refusal(client, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refusal(client, "/completions", logprobs=21).param == "logprobs"
    assert refusal(client, "/completions", logprobs=21, stream=True).status_code == 400
    assert refusal(client, top_logprobs=2).param == "top_logprobs"
    assert chat(client).choices


def test_n(client: openai.OpenAI) -> None:
    found = chat(client, n=3)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.index for choice in found.choices] == [0, 1, 2] and len(set(texts)) == 3
    streamed, reasons = ["", "", ""], [0, 0, 0]
    order = []
    for chunk in chat(client, n=3, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason is not None
        order.append(choice.index)
    assert streamed == texts and reasons == [1, 1, 1] and order != sorted(order)
    two = complete(client, prompt=["Rome", "Paris"], n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[2].text == complete(client, prompt="Paris").choices[0].text


# 16-20: stops, seeds, limits, errors, prefill


def test_stop_strings_are_never_told(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=40).choices[0].text
    stop = [whole[9:12], "never there"]
    cut = whole[: whole.find(stop[0])]
    found = complete(client, max_tokens=40, stop=stop, logprobs=0)
    assert found.choices[0].text == cut and found.choices[0].finish_reason == "stop"
    assert "".join(found.choices[0].logprobs.tokens) == cut
    chunks = list(
        complete(client, max_tokens=40, stop=stop, stream=True, logprobs=0, extra_body={"collm": {"tokens": True}})
    )
    assert "".join(c.choices[0].text for c in chunks) == cut
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert "".join(tokens) == cut and stop[0] not in "".join(tokens)
    assert complete(client, max_tokens=40, stop=stop[0]).choices[0].text == cut
    assert refusal(client, stop=[""]).param == "stop"
    assert refusal(client, stop=5).param == "stop"


BROKEN: dict[str, tuple[tuple[str | bytes, ...], dict[str, Any], str]] = {
    "a special token inside a character": ((b"\xe2", "<|endoftext|>", b"\x98\x83", "ab12"), {}, "☃ab12"),
    "a stop string behind half a character": ((b"\xe2", "<|endoftext|>", "pita"), {"stop": "a"}, "\ufffdpit"),
    "an end inside a character": (("12", b"\xe2\x98"), {}, "12\ufffd"),
    "a stop token inside a character": (("12", b"\xe2\x98", "7"), {"stop_token_ids": []}, "12\ufffd"),
    "a limit inside a character": (("12", b"\xe2\x98"), {"max_tokens": 3}, "12\ufffd"),
    "bytes that begin no character": ((b"\x80" * 6,), {}, "\ufffd" * 6),
    "a limit behind bytes that begin no character": ((b"\x80" * 6,), {"max_tokens": 5}, "\ufffd" * 5),
}
"""Tokens that a model writes, what is asked, and the text."""


@pytest.mark.parametrize("case", BROKEN)
def test_tokens_join_to_the_text_whatever_its_bytes(case: str) -> None:
    said, more, text = BROKEN[case]
    with live(saying(*said)) as server:
        [seven] = server.llm.tokenizer.encode("7", add_special_tokens=False)
        if "stop_token_ids" in more:
            more = {"stop_token_ids": [seven]}
        asked = {"max_tokens": 20, "temperature": 0, "logprobs": 0, "prompt": "x", "collm": {"tokens": True}, **more}
        whole = server.post("/v1/completions", json=asked).json()["choices"][0]
        streamed = server.post("/v1/completions", json={**asked, "stream": True}).text
        events = [json.loads(line[6:]) for line in streamed.split("\n") if line.startswith("data: {")]
        pieces = [piece for event in events for piece in event["choices"]]
        assert whole["text"] == "".join(piece["text"] for piece in pieces) == text
        told, tokens = whole["logprobs"], [token["text"] for token in whole["collm"]["tokens"]]
        assert "".join(told["tokens"]) == "".join(tokens) == text
        assert all(text[at:].startswith(own) for own, at in zip(told["tokens"], told["text_offset"], strict=True))
        assert [own for piece in pieces for own in (piece["logprobs"] or {"tokens": []})["tokens"]] == told["tokens"]
        assert [t["text"] for piece in pieces for t in piece.get("collm", {}).get("tokens", ())] == tokens
        chat = {name: value for name, value in asked.items() if name != "prompt"}
        chat |= {"messages": USER, "logprobs": True}
        content = server.post("/v1/chat/completions", json=chat).json()["choices"][0]["logprobs"]["content"]
        assert b"".join(bytes(item["bytes"]) for item in content).decode() == text


def test_stop_tokens(client: openai.OpenAI, server: Live) -> None:
    steps = server.llm.generate("Paris is the", SamplingParams(max_tokens=12, seed=7, temperature=1)).steps
    token = steps[6].token_id
    first = next(n for n, step in enumerate(steps) if step.token_id == token)
    found = complete(client, extra_body={"stop_token_ids": [token]})
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == first + 1


def test_seeds(client: openai.OpenAI) -> None:
    assert chat(client).choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client).choices[0].message.content != chat(client, seed=8).choices[0].message.content
    unseeded = {chat(client, seed=None).choices[0].message.content for _ in range(3)}
    assert len(unseeded) == 3


def test_limits_of_length(client: openai.OpenAI) -> None:
    assert complete(client, max_tokens=5).usage.completion_tokens <= 5
    assert chat(client, max_tokens=None, max_completion_tokens=3).choices[0].finish_reason == "length"
    told = refusal(client, messages=[{"role": "user", "content": "apples " * 300}])
    assert told.status_code == 400 and told.code == "context_length_exceeded"
    assert refusal(client, "/completions", prompt=[5] * 257).code == "context_length_exceeded"
    # What the request leaves open ends with the context.
    found = chat(client, max_tokens=None, model="base")
    assert found.usage.total_tokens <= 257


WRONG: dict[str, dict[str, Any]] = {
    "messages": {"messages": None},
    "messages-text": {"messages": "hi"},
    "messages-number": {"messages": [123]},
    "messages-role": {"messages": [{"content": "hi"}]},
    "messages-image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    "messages-empty": {"messages": []},
    "messages-half": {"messages": [{"role": "user", "content": "\ud83d"}]},
    "response_format": {"response_format": {"type": "json_object"}},
    "response_format-unknown": {"response_format": {"type": "sausage"}},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "logit_bias": {"logit_bias": {"5": 10}},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "temperature": {"temperature": -1},
    "temperature-text": {"temperature": "hot"},
    "top_p": {"top_p": 0},
    "n": {"n": 0},
    "n-many": {"n": 1000},
    "max_tokens": {"max_tokens": 0},
    "max_tokens-beyond": {"max_tokens": 10**400},
    "seed": {"seed": 1.5},
    "temprature": {"temprature": 1},
    "collm.rate": {"collm": {"rate": 0.5}},
    "collm.threshold": {"collm": {"threshold": 1.5}},
    "collm.deferral_rate": {"collm": {"deferral_rate": -0.5}},
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(server: Live, case: str) -> None:
    data = json.dumps({**CHAT, **WRONG[case]}).encode()
    response = server.post("/v1/chat/completions", content=data, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, error
    named = case.partition("-")[0]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"] == named or case == "messages-half", error
    assert set(error) == {"message", "type", "param", "code"}


def test_other_errors_have_the_same_form(server: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat(client, model="nobody")
    assert refusal(client, model="helpr").message.endswith("did you mean 'helper'?")
    assert "did you mean 'temperature'" in refusal(client, temprature=1).message
    path = "/v1/chat/completions"
    assert server.post(path, content=json.dumps(CHAT), headers={"Content-Type": "text/plain"}).status_code == 400
    for body in (b"[]", b"{", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000, b""):
        response = server.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], body[:20]
    for method, where, status in (("GET", path, 405), ("POST", "/v1/nothing", 404), ("GET", "/nothing", 404)):
        response = httpx.request(method, server.url + where)
        assert response.status_code == status and response.json()["error"]["message"]


def test_neutral_values_and_what_cannot_change_the_text_are_accepted(client: openai.OpenAI) -> None:
    neutral = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "user": "anna",
        "metadata": {"a": "b"},
        "store": False,
        "tools": None,
    }
    assert chat(client, **neutral).choices[0].message.content == chat(client).choices[0].message.content


def test_a_last_message_of_the_assistant_begins_the_answer(client: openai.OpenAI, server: Live) -> None:
    begun = [*USER, {"role": "assistant", "content": "There are 12"}]
    formatter = server.llm.formatters[0]
    ids = formatter.prompt(USER) + formatter.continuation(USER, "There are 12")
    found = chat(client, messages=begun, temperature=0)
    assert found.usage.prompt_tokens == len(ids)
    expected = server.llm.generate(TokenPrompt((ids, ids)), SamplingParams(max_tokens=16))
    assert found.choices[0].message.content == expected.text
    assert refusal(client, messages=[*begun, {"role": "assistant", "content": "b"}]).param == "messages"


# 31: who wrote what


def test_models_alone(client: openai.OpenAI, server: Live) -> None:
    for name in ("base", "helper"):
        text = chat(client, model=name, temperature=0).choices[0].message.content
        assert text == server.llm.generate(USER, SamplingParams(max_tokens=16), alone=name).text
    assert refusal(client, model="base", collm={"deferral_rate": 0.5}).param == "collm.deferral_rate"


class Short(FakeModel):
    """It reads no more than 40 tokens."""

    context_length = 40


def test_models_alone_are_bound_and_counted_by_themselves() -> None:
    """By their own prompts and contexts, whatever the others have."""
    tokenizer = make_tokenizer()
    models = [Short("base", 320, num_assistants=1, concentration=0.05), FakeModel("helper", 320, concentration=0.05)]
    own = PromptFormat(system_prompt="Answer in one word, and do not say why; nobody wants to know.")
    llm = CollaborativeLM(models, [Formatter(tokenizer), Formatter(tokenizer, own)])
    plain, told = (len(formatter.prompt(USER)) for formatter in llm.formatters)
    assert plain < 40 < told
    here = llm.generate(USER, SamplingParams(max_tokens=45), alone="helper")
    assert (here.prompt_tokens, here.completion_tokens) == (told, 45)
    with pytest.raises(CollmError, match="context of 40 tokens of base"):
        llm.generate(TokenPrompt(((70,) * 41,) * 2), SamplingParams(max_tokens=3), alone="base")
    with live(llm) as server:
        client = server.client()
        for name, count, written in (("pair", plain, 41 - plain), ("base", plain, 41 - plain), ("helper", told, 45)):
            answer = chat(client, model=name, max_tokens=45)
            assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count, written)
            assert answer.usage.prompt_tokens_details.cached_tokens < count
            assert answer.choices[0].finish_reason == "length"
        listed = {model.id: model.max_model_len for model in client.models.list()}
        assert listed == {"pair": 40, "base": 40, "helper": None}
        for name, refused in (("pair", True), ("base", True), ("helper", False)):
            body = {"model": name, "prompt": [70] * 41, "max_tokens": 3}
            assert server.post("/v1/completions", json=body).status_code == (400 if refused else 200)


def test_authors_are_told_to_those_who_ask(client: openai.OpenAI, server: Live) -> None:
    ordinary = chat(client).to_dict()
    assert "collm" not in json.dumps(ordinary) and "author" not in json.dumps(ordinary)
    params = SamplingParams(max_tokens=16, seed=7, temperature=1, threshold=0.3)
    expected = server.llm.generate(USER, params)
    who = {"collm": {"threshold": 0.3, "tokens": True}}
    choice = chat(client, extra_body=who).choices[0]
    told = choice.collm
    assert [server.llm.model_names[step.author] for step in expected.steps] == [t["author"] for t in told["tokens"]]
    assert [step.token_id for step in expected.steps] == [t["token_id"] for t in told["tokens"]]
    assert [step.gate for step in expected.steps] == [tuple(t["gate"].values()) for t in told["tokens"]]
    assert "".join(t["text"] for t in told["tokens"]) == choice.message.content
    assert told["tokens_by_author"] == {
        "base": told["tokens_by_author"]["base"],
        "helper": sum(s.deferred for s in expected.steps),
    }
    chunks = list(chat(client, extra_body=who, stream=True))
    tokens = [t for c in chunks for t in (c.choices[0].model_extra or {}).get("collm", {}).get("tokens", ())]
    without_draft = [{**t, "draft": None} for t in tokens]
    assert without_draft == [{**t, "draft": None} for t in told["tokens"]]
    assert chunks[-1].choices[0].collm["tokens_by_author"] == told["tokens_by_author"]
    usage = chat(client, extra_body={"collm": {"threshold": 0.3}}).usage
    assert usage.completion_tokens_by_author == told["tokens_by_author"]


def test_without_a_calibration_a_rate_is_refused(client: openai.OpenAI) -> None:
    assert "calibration" in refusal(client, collm={"deferral_rate": 0.2}).message
    assert refusal(client, collm={"deferral_rate": 0.2, "threshold": 0.2}).status_code == 400


# 25: metrics


def test_metrics_count_requests_and_tokens() -> None:
    with live(fake_pair()) as server:
        client = server.client()
        for _ in range(3):
            chat(client, extra_body={"collm": {"threshold": 0.3}})
        list(complete(client, stream=True, n=2))
        found = server.metrics()
        assert found["collm:request_success_total"] == 5
        prompts = 3 * len(server.llm.formatters[0].prompt(USER)) + len(server.llm.formatters[0].prompt("Paris is the"))
        assert found["collm:prompt_tokens_total"] == prompts
        assert found["collm:generation_tokens_total"] == 3 * 16 + 2 * 12
        assert found["collm:generation_tokens_by_author_total"] == found["collm:generation_tokens_total"]
        assert 0 < found["collm:deferred_tokens_total"] < found["collm:generation_tokens_total"]
        assert found["collm:inter_token_latency_seconds_count"] == found["collm:generation_tokens_total"] - 5
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
            assert found[f"collm:{name}_seconds_count"] == 5
        assert found["collm:http_requests_client_disconnected_total"] == 0


EXPECTED = """num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total
prefix_cache_hits_total num_preemptions_total prompt_tokens_total generation_tokens_total iteration_tokens_total_count
request_success_total request_prompt_tokens_sum request_generation_tokens_sum request_params_n_sum
request_params_max_tokens_sum time_to_first_token_seconds_sum inter_token_latency_seconds_sum
e2e_request_latency_seconds_sum request_queue_time_seconds_sum request_inference_time_seconds_sum
request_prefill_time_seconds_sum request_decode_time_seconds_sum
http_requests_client_disconnected_total""".split()
"""Of vLLM's own test, but its shapes of memory (`cache_config_info`) and what it calls deprecated."""


def test_prompts_that_are_there_already_are_counted() -> None:
    """By text (`cached_tokens`) and in all; and what passes read, under vLLM's names."""
    llm = system(1)
    with live(llm) as server:
        client = server.client()
        prompt = "What is the capital of France, and what is that of Italy? " * 3
        length = len(llm.formatters[0].prompt(prompt))
        told = [complete(client, prompt=prompt, max_tokens=4).usage for _ in range(3)]
        cached = [usage.prompt_tokens_details.cached_tokens for usage in told]
        assert cached == [0, length - 1, length - 1]
        alone = complete(client, prompt=prompt, max_tokens=4, model=llm.model_names[0]).usage
        assert alone.prompt_tokens_details.cached_tokens == length - 1
        streamed = list(complete(client, prompt=prompt, stream=True, stream_options={"include_usage": True}))
        assert streamed[-1].usage.prompt_tokens_details.cached_tokens == length - 1
        found = server.metrics()
        assert not {f"collm:{name}" for name in EXPECTED} - found.keys()
        labelled = server.samples()
        base = f'{{model_name="pair",of="{llm.model_names[0]}"}}'
        assert labelled["collm:prefix_cache_queries_total" + base] == 5 * length
        assert labelled["collm:prefix_cache_hits_total" + base] == 4 * (length - 1)
        usage = llm.generate(prompt, SamplingParams(max_tokens=4, speculative=False)).usage
        before, after = found, server.metrics()
        passes = after["collm:iteration_tokens_total_count"] - before["collm:iteration_tokens_total_count"]
        assert passes == sum(usage.forward_passes)


# -- real models, and the harness


def test_transformers_write_what_they_write_in_process() -> None:
    """Float32: greedy and sampled, many at once, streamed and whole."""
    llm = pair(make_tokenizer())
    prompts = ["Paris is the", "56 * 9 = ", "Anna has 12 apples", "The train"]
    with live(llm) as server:

        async def ask(client: openai.AsyncOpenAI, prompt: str, temperature: float) -> str:
            stream = await client.completions.create(
                model="pair", prompt=prompt, max_tokens=24, seed=3, temperature=temperature, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        async def ask_all() -> list[str]:
            async with server.asynchronous() as client:
                return await asyncio.gather(*(ask(client, p, t) for t in (0, 0.8) for p in prompts))

        found = asyncio.run(ask_all())
    again = pair(make_tokenizer())
    expected = [
        again.generate(prompt, SamplingParams(max_tokens=24, seed=3, temperature=temperature)).text
        for temperature in (0, 0.8)
        for prompt in prompts
    ]
    assert found == expected


def test_the_harness_finds_the_same_likelihoods(server: Live, tmp_path: Path) -> None:
    """`lm_eval --model local-completions` against the server, and the model of ours in this process."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from collm.evaluation.harness.model import CollaborativeHarnessLM

    server.llm.tokenizer.save_pretrained(tmp_path)
    remote = LocalCompletionsAPI(
        model="pair", base_url=f"{server.url}/v1/completions", tokenizer=str(tmp_path), batch_size=1, max_length=256
    )
    pairs = [("Paris is the capital of", " France"), ("12 + 30 =", " 42"), ("Anna has", " 12 apples.")]
    requests = [Instance("loglikelihood", {}, each, n) for n, each in enumerate(pairs)]
    own = CollaborativeHarnessLM(server.llm, progress=False).loglikelihood(requests)
    found = remote.loglikelihood(requests)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in own], abs=1e-4)
    assert [x for _, x in found] == [x for _, x in own]


# -- what the page asks for


def test_what_the_others_would_have_written(server: Live, client: openai.OpenAI) -> None:
    """One block pass of each model: what each finds most probable, and what it thinks of the token there."""
    llm = server.llm
    written = llm.generate(USER, SamplingParams(max_tokens=12, threshold=0.3))
    before = [server.model(number).calls for number in (0, 1)]
    body = {"messages": USER, "token_ids": written.token_ids}
    found = server.post("/v1/collm/others", json=body).json()
    assert [server.model(number).calls for number in (0, 1)] == [calls + 1 for calls in before]
    assert found["models"] == ["base", "helper"] and len(found["tokens"]) == len(written.steps)
    assert "".join(token["text"] for token in found["tokens"]) == llm.decode(written.token_ids)
    for token, step in zip(found["tokens"], written.steps, strict=True):
        by_model = token["by_model"]
        assert token["token_id"] == step.token_id and by_model["base"]["token_id"] == step.base_token_id
        author = by_model[llm.model_names[step.author]]
        assert author["given_log_prob"] == pytest.approx(step.log_prob, abs=1e-5)
        assert author["token_id"] == step.token_id, "greedy: what its author found most probable"
        assert tuple(token["gate"].values()) == pytest.approx(step.gate)
    plain = server.post("/v1/collm/others", json={"prompt": "Rome", "token_ids": [5, 6]}).json()
    assert len(plain["tokens"]) == 2


def test_a_model_that_fails_costs_the_others_nothing(server: Live) -> None:
    server.model(1).fails_after = 0
    try:
        found = server.post("/v1/collm/others", json={"prompt": "Rome", "token_ids": [5]}).json()["tokens"][0]
    finally:
        server.model(1).fails_after = None
    assert "cables" in found["by_model"]["helper"]["fault"] and found["by_model"]["base"]["given_log_prob"] <= 0


OTHERS_WRONG: dict[str, dict[str, Any]] = {
    "messages": {"token_ids": [5]},
    "messages-both": {"token_ids": [5], "prompt": "Rome", "messages": USER},
    "token_ids": {"prompt": "Rome"},
    "token_ids-empty": {"prompt": "Rome", "token_ids": []},
    "token_ids-unknown": {"prompt": "Rome", "token_ids": [320]},
    "token_ids-long": {"prompt": "Rome", "token_ids": [5] * 256},
    "prompt": {"prompt": ["Rome", "Paris"], "token_ids": [5]},
    "temperature": {"prompt": "Rome", "token_ids": [5], "temperature": 1},
}


@pytest.mark.parametrize("case", OTHERS_WRONG)
def test_others_of_no_text(server: Live, case: str) -> None:
    response = server.post("/v1/collm/others", json=OTHERS_WRONG[case])
    assert response.status_code == 400 and response.json()["error"]["param"] == case.partition("-")[0]


def test_the_system_is_told(server: Live) -> None:
    told = httpx.get(server.url + "/v1/collm").json()
    assert told["pair"] == "pair" and told["models"] == ["base", "helper"] and told["has_gate"]
    assert told["defaults"]["method"] == "threshold" and told["calibration"] == [] == told["examples"]


def test_the_description_names_every_address_and_every_field(server: Live) -> None:
    """Made from what reads the requests; here, that nothing is missing and every reference leads somewhere."""
    told = httpx.get(server.url + "/openapi.json").json()
    for path, operations in told["paths"].items():
        for method in set(operations) & {"get", "post"}:
            found = httpx.request(method, server.url + path.replace("{name}", "pair"))
            assert found.status_code == (400 if method == "post" else 200), path
    text = json.dumps(told)
    schemas = told["components"]["schemas"]
    assert all(name in schemas for name in re.findall(r'#/components/schemas/(\w+)"', text))
    for kind in KINDS:
        properties = schemas[kind.__name__]["properties"]
        fields = {*kind.model_fields, *(NEUTRAL if issubclass(kind, Request) else ())}
        assert fields <= set(properties) and schemas[kind.__name__]["additionalProperties"] is False
