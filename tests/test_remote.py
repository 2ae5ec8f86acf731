"""Models behind HTTP, against answers recorded from vLLM 0.32 and llama.cpp, and against everything that goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx
import pytest
from conftest import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from collm.errors import CollmError
from collm.models.tokenizers import PROBES
from collm.remote import Address, Client, Completion, End, Given, Sampling, ServerFault, Token, is_url
from collm.remote.ahead import Ahead
from collm.remote.connecting import connect
from collm.remote.faults import ATTEMPTS, PATIENCE
from collm.remote.health import COOLDOWN, FAILURES, SLACK, Replica, Replicas
from collm.values import Query
from collm.views import View

T = TypeVar("T")
Handler = Callable[[httpx.Request], httpx.Response]

# -- recorded: vLLM 0.32, streamed, with watched tokens; its answers to a prompt to score; llama.cpp, a block


def vllm_chunk(number: int, log_prob: float, finish: str | None = None, **watched: float) -> str:
    top = {f"token_id:{number}": log_prob} | {f"token_id:{name[1:]}": value for name, value in watched.items()}
    told = {
        "text_offset": [0],
        "token_logprobs": [log_prob],
        "tokens": [f"token_id:{number}"],
        "top_logprobs": [top],
    }
    choice = {
        "index": 0,
        "text": "pp",
        "logprobs": told,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": [number],
    }
    return (
        f"data: {json.dumps({'id': 'cmpl-a', 'object': 'text_completion', 'model': 'base', 'choices': [choice]})}\n\n"
    )


SCORED = {
    "choices": [
        {
            "index": 0,
            "text": "",
            "finish_reason": "length",
            "token_ids": [297],
            "prompt_logprobs": [
                None,
                {"6": {"logprob": -6.88, "rank": 153, "decoded_token": "$"}},
                {"7": {"logprob": -0.25, "rank": 1, "decoded_token": "%"}},
            ],
        }
    ]
}


def llama_block(numbers: Sequence[int], stop_type: str = "limit") -> dict[str, Any]:
    told = [
        {
            "id": n,
            "token": "",
            "bytes": [],
            "logprob": -n / 10,
            "top_logprobs": [{"id": n, "token": "", "bytes": [], "logprob": -n / 10}],
        }
        for n in numbers
    ]
    return {
        "content": "",
        "tokens": list(numbers),
        "stop": True,
        "stop_type": stop_type,
        "completion_probabilities": told,
    }


# -- a world without a network and with a clock of its own


class World:
    """Time passes by sleeping alone."""

    def __init__(self, handler: Handler) -> None:
        self.handler, self.now, self.slept = handler, 0.0, list[float]()
        self.requests: list[httpx.Request] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)

    def client(self, spec: str = "vllm+http://one") -> Client:
        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            return self.handler(request)

        transport = httpx.MockTransport(handle)
        return Client(Address.parse(spec), transport=transport, clock=self.clock, sleep=self.sleep)

    def run(self, ask: Callable[[Client], Coroutine[Any, Any, T]], spec: str = "vllm+http://one") -> T:
        async def main() -> T:
            async with self.client(spec) as client:
                return await ask(client)

        return asyncio.run(main())

    def complete(self, completion: Completion, spec: str = "vllm+http://one") -> list[Token | End]:
        async def ask(client: Client) -> list[Token | End]:
            return [event async for event in client.complete(completion)]

        return self.run(ask, spec)

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.content) for request in self.requests]


class Pieces(httpx.AsyncByteStream):
    """A stream that may break, or hang."""

    def __init__(self, *pieces: str | bytes | Exception | float) -> None:
        self.pieces, self.closed, self.whole = pieces, False, False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield piece if isinstance(piece, bytes) else piece.encode()
        self.whole = True

    async def aclose(self) -> None:
        self.closed = True


def stream(*pieces: str | bytes | Exception | float) -> httpx.Response:
    return httpx.Response(200, stream=Pieces(*pieces))


def in_turn(*answers: httpx.Response | Exception) -> Handler:
    """The answers one after the other, the last one for ever."""
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    return handle


GOOD = (vllm_chunk(284, -2.5), vllm_chunk(147, -1.5, "stop"), "data: [DONE]\n\n")
ASKED = Completion([5, 6, 7], 8)


# -- what is sent and what comes back


def test_vllm_ids_in_ids_and_log_probabilities_out() -> None:
    world = World(
        in_turn(stream(vllm_chunk(284, -2.5, _320=-7.5, _322=-7.25), vllm_chunk(320, -7.0, "stop", _322=-7.2)))
    )
    asked = Completion([5, 6], 8, stop_ids=(2, 320), watch=(320, 322), settings={"collm_threshold": 0.5})
    assert world.complete(asked, "vllm+http://one/?model=base") == [
        Token(284, -2.5, (), (-7.5, -7.25)),
        Token(320, -7.0, (), (-7.0, -7.2)),
        End("stop"),
    ]
    [request] = world.requests
    assert str(request.url) == "http://one/v1/completions"
    assert world.bodies() == [
        {
            "model": "base",
            "prompt": [5, 6],
            "max_tokens": 8,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_p": 0.0,
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "logprobs": 1,
            "logprob_token_ids": [320, 322],
            "stop_token_ids": [2, 320],
            "vllm_xargs": {"collm_threshold": 0.5},
        }
    ]


def test_a_server_need_not_list_the_most_probable_tokens() -> None:
    """As OpenAI's, where they are none."""
    chunks = [
        chunk.replace(json.dumps([{f"token_id:{n}": p}]), "null")
        for n, p, chunk in ((284, -2.5, GOOD[0]), (147, -1.5, GOOD[1]))
    ]
    assert all('"top_logprobs": null' in chunk for chunk in chunks)
    assert World(in_turn(stream(*chunks))).complete(ASKED) == [Token(284, -2.5), Token(147, -1.5), End("stop")]


def test_vllm_tells_the_most_probable_tokens_and_takes_sampling() -> None:
    world = World(in_turn(stream(vllm_chunk(9, -3.0, _4=-0.5, _6=-2.0), vllm_chunk(4, -0.1, "length", _9=-3.0))))
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, seed=5)
    first, second, end = world.complete(Completion([1], 2, sampling, num_top=2))
    assert first == Token(9, -3.0, ((4, -0.5), (6, -2.0))) and second == Token(4, -0.1, ((4, -0.1), (9, -3.0)))
    assert end == End("length")
    body = world.bodies()[0]
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "seed", "logprobs")} == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 5,
        "logprobs": 2,
    }


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_text_with_line_separators_is_one_line(end: str) -> None:
    """vLLM writes JSON with such characters as they are, and its stream may come byte by byte."""
    chunks = [chunk.replace('"pp"', '"a\u2028b\u2029c\x85d"').replace("\n", end) for chunk in GOOD]
    for pieces in (chunks, [bytes([byte]) for byte in "".join(chunks).encode()]):
        world = World(in_turn(stream(*pieces)))
        assert world.complete(ASKED) == [Token(284, -2.5), Token(147, -1.5), End("stop")]
        assert len(world.requests) == 1


def test_a_stream_may_end_at_any_byte() -> None:
    """What has come is good, and the rest is asked for; nothing is taken for a token that is none."""
    chunks = [vllm_chunk(284, -2.5), vllm_chunk(147, -1.5), vllm_chunk(9, -0.5, "stop")]
    whole = "".join(chunks).encode()

    def behind(start: bytes) -> Handler:
        first = [stream(start)]

        def handle(request: httpx.Request) -> httpx.Response:
            return first.pop() if first else stream(*chunks[len(json.loads(request.content)["prompt"]) - 3 :])

        return handle

    for at in range(0, len(whole), 3):
        *tokens, end = World(behind(whole[:at])).complete(Completion([5, 6, 7], 8))
        assert [token.token_id for token in tokens if isinstance(token, Token)] == [284, 147, 9]
        assert end == End("stop")


def test_llama_cpp_is_asked_in_blocks() -> None:
    blocks = [llama_block(range(1, 17)), llama_block(range(17, 33)), llama_block([33, 2], "eos")]
    world = World(in_turn(*(httpx.Response(200, json=block) for block in blocks)))
    *tokens, end = world.complete(Completion([50], 40, Sampling(seed=3), num_top=1), "llamacpp+http://one")
    assert [token.token_id for token in tokens if isinstance(token, Token)] == [*range(1, 34), 2] and end == End("stop")
    assert tokens[2] == Token(3, -0.3, ((3, -0.3),))
    assert [len(body["prompt"]) for body in world.bodies()] == [1, 17, 33]
    assert [(body["n_predict"], body["seed"]) for body in world.bodies()] == [(16, 3), (16, 19), (8, 35)]
    # Its own defaults would truncate the law.
    assert all(body["top_k"] == 0 and body["top_p"] == 1 and body["min_p"] == 0 for body in world.bodies())
    assert all(body["mirostat"] == 0 and body["dynatemp_range"] == 0 for body in world.bodies())
    # Of all seeds this one would be another each time.
    world = World(in_turn(httpx.Response(200, json=llama_block([2], "eos"))))
    world.complete(Completion([50], 4, Sampling(1.0, seed=2**32 - 1)), "llamacpp+http://one")
    assert world.bodies()[0]["seed"] < 2**32 - 1


@pytest.mark.parametrize(
    ("block", "stop_ids", "written", "reason"),
    [
        (llama_block([4, 5, 6]), (), [4, 5, 6], "length"),
        (llama_block([4, 5, 6]), (5,), [4, 5], "stop"),
        (llama_block([4]), (), [4], "length"),  # its context is full
    ],
)
def test_llama_cpp_ends(block: dict[str, Any], stop_ids: tuple[int, ...], written: list[int], reason: str) -> None:
    world = World(in_turn(httpx.Response(200, json=block)))
    *tokens, end = world.complete(Completion([1], 3, stop_ids=stop_ids), "llamacpp+http://one")
    assert [token.token_id for token in tokens if isinstance(token, Token)] == written
    assert isinstance(end, End) and end.reason == reason


def test_llama_cpp_tells_no_log_probability_of_tokens_that_end_inside_a_character() -> None:
    """As recorded: an emoji is three tokens, and only the one that completes it has an entry."""
    block = llama_block([227, 10813, 232, 227])
    block["completion_probabilities"] = [block["completion_probabilities"][i] for i in (0, 3)]
    *tokens, _ = World(in_turn(httpx.Response(200, json=block))).complete(Completion([1], 4), "llamacpp+http://one")
    assert [token.token_id for token in tokens if isinstance(token, Token)] == [227, 10813, 232, 227]
    told = [token.log_prob for token in tokens if isinstance(token, Token)]
    assert told[0] == told[3] == -22.7 and math.isnan(told[1]) and math.isnan(told[2])
    # Asked for one token, which is such a one: as recorded, there is no list at all.
    block = llama_block([10813])
    del block["completion_probabilities"]
    [token, end] = World(in_turn(httpx.Response(200, json=block))).complete(Completion([1], 1), "llamacpp+http://one")
    assert isinstance(token, Token) and token.token_id == 10813 and math.isnan(token.log_prob) and end == End("length")
    # Two tokens of one id and one number: whose is it?
    block = llama_block([9, 9])
    del block["completion_probabilities"][0]
    *tokens, _ = World(in_turn(httpx.Response(200, json=block))).complete(Completion([1], 2), "llamacpp+http://one")
    assert all(isinstance(token, Token) and math.isnan(token.log_prob) for token in tokens)


def test_scores_of_given_tokens() -> None:
    world = World(in_turn(httpx.Response(200, json=SCORED)))
    assert world.run(lambda client: client.score([5, 6, 7])) == [Given(-6.88, False), Given(-0.25, True)]
    body = world.bodies()[0]
    assert body == {"prompt": [5, 6, 7], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    assert world.run(lambda client: client.score([5])) == []
    with pytest.raises(ServerFault, match="score with the GGUF file"):
        world.run(lambda client: client.score([5, 6]), "llamacpp+http://one")


def test_which_model_it_is() -> None:
    cards = {"base": {"id": "base", "max_model_len": 256}, "other": {"id": "other", "max_model_len": 128}}

    def served(*names: str) -> httpx.Response:
        return httpx.Response(200, json={"object": "list", "data": [cards[name] for name in names]})

    async def ask(client: Client) -> tuple[str, int | None, str | None]:
        card = await client.card()
        return card.name, card.context_length, client.model

    assert World(in_turn(served("base"))).run(ask) == ("base", 256, "base")
    assert World(in_turn(served("base", "other"))).run(ask, "vllm+http://one?model=other") == ("other", 128, "other")
    with pytest.raises(ServerFault, match=r"has several models: name one .* base, other"):
        World(in_turn(served("base", "other"))).run(ask)
    with pytest.raises(ServerFault, match="has no model 'bose'; did you mean 'base'"):
        World(in_turn(served("base"))).run(ask, "vllm+http://one?model=bose")
    # All replicas must have it.
    with pytest.raises(ServerFault, match="http://two has no model 'base'"):
        World(in_turn(served("base"), served("other"))).run(ask, "vllm+http://one?replica=http://two")
    llama = {"data": [{"id": "m.gguf", "meta": {"n_ctx": 1024, "n_ctx_train": 8192}}]}
    assert World(in_turn(httpx.Response(200, json=llama))).run(ask, "llamacpp+http://one")[:2] == ("m.gguf", 1024)


@pytest.mark.parametrize("kind", ["vllm", "llamacpp"])
def test_another_tokenizer_behind_the_url_is_found(kind: str) -> None:
    right, wrong = make_tokenizer(), make_tokenizer(vocab_size=300)

    def encode(text: str) -> list[int]:
        return list(right.encode(text, add_special_tokens=False))

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        text = body["prompt"] if kind == "vllm" else body["content"]
        tokenizer = wrong if request.url.host == "two" else right
        return httpx.Response(200, json={"tokens": tokenizer.encode(text, add_special_tokens=False)})

    world = World(handle)
    world.run(lambda client: client.compare_tokenizer(encode, PROBES), f"{kind}+http://one")
    assert len(world.requests) == len(PROBES)
    with pytest.raises(
        ServerFault, match=r"http://two has another tokenizer: 'The quick .* gives token \d+ is \d+, not"
    ):
        world.run(lambda client: client.compare_tokenizer(encode, PROBES), f"{kind}+http://one?replica=http://two")


# -- what goes wrong


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.ConnectTimeout("slow"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("garbage"),
        httpx.Response(500, json={"error": {"message": "EngineCore died"}}),
        httpx.Response(502, text="<html>Bad Gateway</html>"),
        httpx.Response(503),
        httpx.Response(429, headers={"Retry-After": "1"}),
        httpx.Response(200, text="data: {not json\n\n"),
        httpx.Response(200, text='data: {"choices": [{"index": 0}]}\n\n'),
        httpx.Response(200, text="data: [1, 2]\n\n"),
        httpx.Response(200, text='data: {"error": {"message": "out of memory"}}\n\n'),
        httpx.Response(200, text=""),
    ],
    ids=lambda fault: repr(fault)[:40],
)
def test_what_may_be_repeated_is_asked_again(fault: httpx.Response | Exception) -> None:
    world = World(in_turn(fault, stream(*GOOD)))
    assert world.complete(ASKED) == [Token(284, -2.5), Token(147, -1.5), End("stop")]
    assert len(world.requests) == 2 and len(world.slept) == 1 and 0 < world.slept[0] <= 1.0


@pytest.mark.parametrize("body", [b"<html>", b"<html>Caf\xe9</html>", b"[", b"null", b"[1]", b"3", b"{}"])
@pytest.mark.parametrize("kind", ["llamacpp", "vllm"])
def test_a_proxy_that_answers_something_else_is_no_server(kind: str, body: bytes) -> None:
    """In whatever letters."""
    world = World(lambda request: httpx.Response(200, content=body))
    with pytest.raises(ServerFault, match="the server answered something"):
        world.run(lambda client: client.card(), f"{kind}+http://one")
    with pytest.raises(ServerFault, match="the server answered something|ended in the middle"):
        world.complete(ASKED, f"{kind}+http://one")
    assert len(world.requests) > ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            httpx.Response(400, json={"error": {"message": "ignore_eos together with deferral"}}),
            "status 400: ignore_eos",
        ),
        (httpx.Response(404, text="Not Found"), "status 404: Not Found"),
        (httpx.Response(401, json={"error": "Unauthorized"}), r"wants a key \(status 401\): name where its key is"),
        (httpx.Response(302, headers={"Location": "http://elsewhere"}), "status 302"),
        (httpx.Response(200, text='data: {"choices": [{"text": "a"}]}\n\n'), "gives no token ids"),
        (httpx.Response(200, text='data: {"choices": [{"token_ids": [1]}]}\n\n'), "gives no log-probabilities"),
    ],
)
def test_what_cannot_help_is_not_repeated(answer: httpx.Response, message: str) -> None:
    world = World(in_turn(answer))
    with pytest.raises(ServerFault, match=f"^http://one: .*{message}"):
        world.complete(ASKED)
    assert len(world.requests) == 1 and not world.slept


def test_a_broken_connection_goes_on_where_it_was() -> None:
    """Nothing is lost and nothing comes twice; the noise of the rest is another than that of the start."""
    first = stream(vllm_chunk(284, -2.5), vllm_chunk(147, -1.5), httpx.ReadError("reset"))
    second = stream(vllm_chunk(9, -0.5, "length"))
    world = World(in_turn(first, second))
    asked = Completion([5, 6, 7], 3, Sampling(temperature=1.0, seed=11))
    assert world.complete(asked) == [Token(284, -2.5), Token(147, -1.5), Token(9, -0.5), End("length")]
    again = world.bodies()[1]
    assert (again["prompt"], again["max_tokens"], again["seed"]) == ([5, 6, 7, 284, 147], 1, 13)


@pytest.mark.parametrize(
    ("asked", "reason"), [(Completion([5], 2), "length"), (Completion([5], 9, stop_ids=(147,)), "stop")]
)
def test_a_connection_that_breaks_behind_the_last_token(asked: Completion, reason: str) -> None:
    """All has come; to ask again would write on behind the end."""
    world = World(in_turn(stream(vllm_chunk(284, -2.5), vllm_chunk(147, -1.5), httpx.ReadError("reset"))))
    *_, end = world.complete(asked)
    assert isinstance(end, End) and end.reason == reason and len(world.requests) == 1


def test_a_server_that_stays_broken_is_given_up_with_what_was_wrong() -> None:
    world = World(in_turn(httpx.ConnectError("refused")))
    with pytest.raises(ServerFault, match=f"http://one: no connection .*refused.* \\(asked {ATTEMPTS} times"):
        world.complete(ASKED)
    assert len(world.requests) == ATTEMPTS == len(world.slept) + 1
    assert world.slept == sorted(world.slept) and world.slept[-1] <= 8


def test_retry_after_is_heeded_within_reason() -> None:
    world = World(in_turn(httpx.Response(503, headers={"Retry-After": "7"}), stream(*GOOD)))
    world.complete(ASKED)
    assert world.slept == [7.0]
    world = World(in_turn(httpx.Response(429, headers={"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}), stream(*GOOD)))
    world.complete(ASKED)
    assert len(world.slept) == 1 and world.slept[0] < 1
    world = World(in_turn(httpx.Response(429, headers={"Retry-After": str(PATIENCE + 1)})))
    with pytest.raises(ServerFault, match="which asks to wait 121 s"):
        world.complete(ASKED)
    assert not world.slept


def test_nobody_waits_for_ever_for_a_token() -> None:
    """Signs of life are no tokens."""
    hanging = [stream(": ping\n\n", 0.05, ": ping\n\n", 5.0, *GOOD) for _ in range(ATTEMPTS)]
    world = World(in_turn(*hanging))
    with pytest.raises(ServerFault, match=r"no token within 0\.1 s"):
        world.complete(ASKED, "vllm+http://one?timeout=0.1")
    # Longer than that for all of its tokens, but not for any of them.
    slow = [piece for number in range(30) for piece in (0.05, vllm_chunk(number, -1.0))]
    whole = World(in_turn(stream(*slow, GOOD[1]))).complete(Completion([5], 40), "vllm+http://one?timeout=1")
    assert len(whole) == 32


def test_who_stops_listening_ends_the_request_and_nobody_is_blamed() -> None:
    pieces = Pieces(vllm_chunk(1, -1.0), vllm_chunk(2, -1.0), 60.0)
    world = World(lambda request: httpx.Response(200, stream=pieces))

    async def ask(client: Client) -> Replica:
        events = client.complete(ASKED)
        assert await anext(events) == Token(1, -1.0)
        await events.aclose()
        return client.replicas.all[0]

    replica = world.run(ask)
    assert pieces.closed and (replica.in_flight, replica.failures) == (0, 0)


def test_an_answer_is_read_whole_so_that_its_connection_serves_again() -> None:
    pieces = Pieces(*GOOD)
    assert len(World(lambda request: httpx.Response(200, stream=pieces)).complete(ASKED)) == 3
    assert pieces.whole


def test_an_expired_certificate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed")
    cause.verify_message = "certificate has expired"
    error = httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")
    error.__cause__ = cause
    world = World(in_turn(error))
    with pytest.raises(ServerFault, match=r"certificate is not trusted \(certificate has expired\): renew it"):
        world.complete(ASKED, "vllm+https://one")
    assert len(world.requests) == 1


# -- replicas and the circuit breaker


def test_a_broken_server_is_left_alone_and_tried_again() -> None:
    broken = True

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(500, text="down") if broken else stream(*GOOD)

    world = World(handle)

    async def ask(client: Client) -> None:
        async def complete() -> list[Token | End]:
            return [event async for event in client.complete(ASKED)]

        nonlocal broken
        with pytest.raises(ServerFault):
            await complete()
        asked = len(world.requests)
        assert asked == FAILURES
        with pytest.raises(
            ServerFault, match=r"left alone for 15 s more after 5 failures in a row, the last: status 500"
        ):
            await complete()
        assert len(world.requests) == asked, "nobody asks it, nobody waits for it"
        world.now += COOLDOWN
        with pytest.raises(ServerFault):  # one tries, and fails: it is left alone again
            await complete()
        assert len(world.requests) == asked + 1
        world.now += COOLDOWN
        broken = False
        assert len(await complete()) == 3
        assert len(await complete()) == 3

    world.run(ask)


def test_a_refusal_or_a_full_server_is_not_a_broken_one() -> None:
    for answer in (
        httpx.Response(400, json={}),
        httpx.Response(429),
        httpx.Response(503, headers={"Retry-After": "0"}),
    ):
        world = World(in_turn(answer))

        async def ask(client: Client) -> int:
            for _ in range(3):
                with pytest.raises(ServerFault):
                    _ = [event async for event in client.complete(ASKED)]
            return client.replicas.all[0].failures

        assert world.run(ask) == 0


def test_another_replica_takes_over() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.host == "one":
            return stream(vllm_chunk(284, -2.5), httpx.ReadError("killed"))
        body = json.loads(request.content)
        assert body["prompt"] == [5, 6, 7, 284]
        return stream(vllm_chunk(147, -1.5, "stop"))

    world = World(handle)

    async def ask(client: Client) -> list[Token | End]:
        client.replicas.all[0].failures = FAILURES - 1
        return [event async for event in client.complete(ASKED, text="a")]

    assert world.run(ask, "vllm+http://one?replica=http://two") == [Token(284, -2.5), Token(147, -1.5), End("stop")]
    assert [request.url.host for request in world.requests] == ["one", "two"]


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["begin", "end", "fail"])), max_size=60))
def test_the_least_busy_is_chosen_and_texts_stay_where_their_prefix_is(moves: list[tuple[int, str]]) -> None:
    now = 0.0
    replicas = Replicas([Replica(str(i)) for i in range(3)], lambda: now)
    running: list[Replica] = []
    homes: dict[int, Replica] = {}
    for text, move in moves:
        now += 1.0
        if move == "begin":
            there = [replica for replica in replicas.all if replica.available(now)]
            if not there:
                with pytest.raises(ServerFault, match="left alone"):
                    replicas.choose(text)
                continue
            least = min(replica.in_flight for replica in there)
            home = homes.get(text)
            chosen = replicas.choose(text)
            assert chosen in there and chosen.in_flight <= least + SLACK
            if home in there and home is not None and home.in_flight <= least + SLACK:
                assert chosen is home
            else:
                assert chosen.in_flight == least
            homes[text] = chosen
            chosen.began()
            running.append(chosen)
        elif running:
            replica = running.pop(0)
            if move == "fail":
                replica.failed(ServerFault("down"), now, now)
            else:
                replica.succeeded()
            replica.ended(False)
    assert sum(replica.in_flight for replica in replicas.all) == len(running)


# -- specs and keys


def test_specs() -> None:
    assert Address.parse(
        "vllm+http://host:8000/?model=a/b&replica=http://other:1&replica=http://third&timeout=5"
    ) == Address("vllm", ("http://host:8000", "http://other:1", "http://third"), "a/b", timeout=5.0)
    assert Address.parse("openai+https://host/prefix").urls == ("https://host/prefix",)
    assert [is_url(spec) for spec in ("vllm+http://a", "http://a", "./a", "pkg:a/b.gguf", "a/b", "s3://a")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("http://host", r"^http://\.\.\.: say what kind .* vllm\+http, llamacpp\+http, openai\+http"),
        ("vlm+http://host", "say what kind"),
        ("vllm+http://host?modell=a", "did you mean 'model'"),
        ("vllm+http://host?model=", "model is empty"),
        ("vllm+http://host?model=a&model=b", "given twice"),
        ("vllm+http://host?timeout=soon", "number of seconds, not 'soon'"),
        ("vllm+http://host?timeout=inf", "number of seconds"),
        ("vllm+http://host?ca=/no/such/file", "no file /no/such/file"),
        ("vllm+http://", "is no URL"),
        ("vllm+http://host:port", "is no URL"),
        ("vllm+http://host?replica=host2", "is no URL"),
        ("vllm+http://me:hidden@host", "a key does not belong into a URL"),
        ("vllm+http://host?replica=https://me:hidden@other", "a key does not belong into a URL"),
        ("vllm+http://me:hidden@host?api_key=hidden", "there is no setting 'api_key'"),
    ],
)
def test_specs_that_mean_nothing_are_refused_and_show_no_key(spec: str, message: str) -> None:
    with pytest.raises(CollmError, match=message) as caught:
        Address.parse(spec)
    assert "hidden" not in str(caught.value)


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    spec = "vllm+http://one?key_env=MY_KEY"
    with pytest.raises(CollmError, match=r"MY_KEY \(key_env\) is not set"):
        World(in_turn()).client(spec)
    monkeypatch.setenv("MY_KEY", "s3cret")
    world = World(in_turn(httpx.ConnectError("refused"), httpx.Response(401, json={"error": "Unauthorized"})))
    with pytest.raises(ServerFault, match="is the key in MY_KEY right") as caught:
        world.complete(ASKED, spec)
    assert world.requests[0].headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in f"{caught.value!r} {Address.parse(spec)!r} {caplog.text}"


# -- tokens that are on their way already


def test_what_is_written_ahead_ends_when_nobody_waits_for_it() -> None:
    """A time-out cancels a question: then the server's work for it ends, too, and it can be asked again."""
    asked: list[tuple[int, ...]] = []
    ended: list[bool] = []

    async def ask(query: Query, ids: Sequence[int], count: int) -> AsyncGenerator[Token | End, None]:
        asked.append(tuple(ids))
        try:
            if len(asked) == 1:
                await asyncio.sleep(60)
            yield Token(7, -0.5)
        finally:
            ended.append(True)

    async def main() -> Token | None:
        ahead, query = Ahead(ask), Query(1, View([1, 2]), 2)
        waiting = asyncio.create_task(ahead.token(query, [1, 2]))
        while not asked:
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert waiting.cancelled() and ended == [True]
        return await ahead.token(query, [1, 2])

    assert asyncio.run(main()) == Token(7, -0.5) and asked == [(1, 2), (1, 2)]


# -- whose numbers tell it from other models


@pytest.mark.parametrize("trouble", ["none", "inside", "silent", "gone"])
def test_a_server_is_known_by_what_it_tells_or_not_at_all(trouble: str) -> None:
    """A number that is missing where a token ends inside a character is none; a failure is no part of who it is."""
    tokenizer = make_tokenizer(320)

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "one"}]})
        if request.url.path == "/props":
            return httpx.Response(200, json={"build_info": "b1"})
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": tokenizer.encode(body["content"], add_special_tokens=False)})
        if trouble == "gone" and len(body["prompt"]) > 40:
            return httpx.Response(400, json={"error": {"message": "no such slot"}})
        block = llama_block([5])
        if trouble == "silent" or (trouble == "inside" and len(body["prompt"]) > 40):
            del block["completion_probabilities"]
        return httpx.Response(200, json=block)

    model = connect("llamacpp+http://one", tokenizer, transport=httpx.MockTransport(handler))
    if trouble in ("silent", "gone"):
        with pytest.raises(CollmError, match="tells no log-probabilities" if trouble == "silent" else "no such slot"):
            model.identity()
        return
    probe = model.identity()["probe"]
    assert len(probe) == 12 and probe[0] == -0.5
    assert (None in probe) == (trouble == "inside")
