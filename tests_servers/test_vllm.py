"""A real vLLM on the CPU: what it writes and where it stops is what this process finds, token for token in float32."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from conftest import ask, vllm
from transformers import AutoModelForCausalLM, PreTrainedModel

from collm.decoding.policies import to_log_odds
from collm.gate import log_gate
from collm.llm import CollaborativeLM
from collm.models.checkpoint import load_base, save_checkpoint
from collm.models.export import export
from collm.models.head import DeferralHead
from collm.models.info import AssistantInfo, CalibrationRow, CalibrationTable, CheckpointInfo
from collm.models.served import ServedInfo
from collm.models.tokenizers import PROBES
from collm.remote import Client, Completion, End, Sampling, ServerFault, Token
from collm.sampling_params import SamplingParams
from collm.types import Generation
from collm.vllm_plugin.columns import Gate
from collm.vllm_plugin.request import rule

NEAR = 2e-4
"""How close to its threshold a signal must lie for float32 to leave it open."""


def row(rate: float, cut: float) -> CalibrationRow:
    return CalibrationRow(target_rate=rate, achieved_rate=rate, threshold=0.5, log_odds=cut, metric_value=0.0)


TABLE = CalibrationTable(task="gsm8k", metric="accuracy", seed=0, num_prompts=1, rows=[row(0.2, 1.5), row(0.6, -0.5)])


@dataclass(frozen=True)
class Pair:
    """A base on a server, and all of it here, too."""

    spec: str
    url: str
    served: ServedInfo
    base: PreTrainedModel
    head: DeferralHead
    assistants: Sequence[PreTrainedModel]
    root: Path

    @torch.inference_mode()
    def signals(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """After each token, from this process: law `[T, V]` of the base, gate `[T, 1+K]`, the four signals `[T, 4]`."""
        out = self.base(torch.tensor([ids]), output_hidden_states=True)
        logits, scores = out.logits[0], self.head(out.hidden_states[-1][0])
        signals = Gate(self.served, logits.device).signals(logits, torch.logsumexp(scores, dim=-1))
        return torch.log_softmax(logits, dim=-1), log_gate(scores), signals


def make_pair(root: Path, num_assistants: int) -> tuple[Path, list[PreTrainedModel]]:
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    assistants = [tiny.make_model(seed=k + 1, **shape) for k in range(num_assistants)]
    for k, assistant in enumerate(assistants):
        assistant.save_pretrained(root / f"expert{k}")
        tiny.make_tokenizer().save_pretrained(root / f"expert{k}")
    torch.manual_seed(5)
    head = DeferralHead(64, num_assistants)
    torch.nn.init.normal_(head.weight, std=0.3)
    torch.nn.init.normal_(head.bias, std=0.5)
    infos = [AssistantInfo(name=f"expert{k}", spec="x") for k in range(num_assistants)]
    info = CheckpointInfo(assistants=infos, calibration=[TABLE])
    tokenizer = tiny.make_tokenizer()
    base = tiny.make_model(**shape)
    base.generation_config.repetition_penalty = 1.5  # a vLLM heeds it where a request does not say
    save_checkpoint(root / "checkpoint", info, base, head, tokenizer)
    export(root / "checkpoint", root / "exported")
    return root, assistants


@pytest.fixture(scope="module", params=[2, 1], ids=["two", "one"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    root, assistants = make_pair(tmp_path_factory.mktemp("pair"), request.param)
    base, head, _, _ = load_base(root / "checkpoint")
    assert head is not None
    served = ServedInfo.from_config(json.loads((root / "exported" / "config.json").read_text())["collm"])
    # The second time with a cache that 200 texts fill many times over.
    small = ("--num-gpu-blocks-override", "48") if request.param == 1 else ()
    with vllm(root / "exported", "--dtype", "float32", "--max-model-len", "256", *small) as url:
        yield Pair(f"vllm+{url}?model=base", url, served, base, head, assistants, root)


async def written(client: Client, completion: Completion) -> tuple[list[Token], End]:
    *tokens, end = [event async for event in client.complete(completion)]
    return tokens, end


def prompt(rng: random.Random, longest: int = 60) -> list[int]:
    return [rng.randrange(3, 320) for _ in range(rng.randrange(1, longest))]


def greedy(model: PreTrainedModel, ids: Sequence[int]) -> int:
    with torch.inference_mode():
        return int(model(torch.tensor([ids])).logits[0, -1, :320].argmax())


def test_texts_are_those_of_this_process(pair: Pair) -> None:
    """The base writes on the server up to each deferral, the assistant here; against the plain loop, token by token."""
    cut = to_log_odds(0.6)

    def plain(ids: list[int], n: int) -> list[tuple[int, int]]:
        out: list[tuple[int, int]] = []
        while len(out) < n and (not out or out[-1][0] != 2):
            law, gate, signals = pair.signals([*ids, *(number for number, _ in out)])
            who = int(gate[-1, 1:].argmax()) + 1 if float(signals[-1, 0]) > cut else 0
            so_far = [*ids, *(number for number, _ in out)]
            out.append((greedy(pair.assistants[who - 1], so_far) if who else int(law[-1].argmax()), who))
        return out

    async def collaborate(client: Client, ids: list[int], n: int) -> list[tuple[int, int]]:
        out: list[tuple[int, int]] = []
        while len(out) < n and (not out or out[-1][0] != 2):
            so_far = [*ids, *(number for number, _ in out)]
            asked = Completion(so_far, n - len(out), settings={"collm_signal": "gate", "collm_cut": cut})
            tokens, end = await written(client, asked)
            last = tokens[-1].token_id
            if last in pair.served.defer_token_ids:
                assert end == End("stop")
                out += [(token.token_id, 0) for token in tokens[:-1]]
                who = pair.served.defer_token_ids.index(last) + 1
                so_far = [*ids, *(number for number, _ in out)]
                out.append((greedy(pair.assistants[who - 1], so_far), who))
            else:
                out += [(token.token_id, 0) for token in tokens]
        return out

    prompts = [prompt(random.Random(i)) for i in range(12)]

    async def all_of_them(client: Client) -> list[list[tuple[int, int]]]:
        return await asyncio.gather(*(collaborate(client, ids, 32) for ids in prompts))

    found = ask(pair.spec, all_of_them)
    assert found == [plain(ids, 32) for ids in prompts]
    authors = {who for text in found for _, who in text}
    assert authors == set(range(1 + len(pair.assistants))), "the test is worth nothing unless all of them write"


ASKED = (
    SamplingParams(threshold=0.5),
    SamplingParams(threshold=0.85),
    SamplingParams(deferral_rate=0.2),
    SamplingParams(deferral="expected_gain", threshold=0.4),
    SamplingParams(deferral="entropy", threshold=3.2),
    SamplingParams(deferral="top_probability", threshold=0.12),
    SamplingParams(deferral="sampled"),
    SamplingParams(deferral="random", threshold=0.3),
    SamplingParams(deferral="never"),
)


def systems(pair: Pair, **served: Any) -> tuple[CollaborativeLM, CollaborativeLM]:
    """All of it in this process, and with something on the server."""
    here = [f"expert{k}={pair.root / f'expert{k}'}" for k in range(len(pair.assistants))]
    return (
        CollaborativeLM.from_pretrained(pair.root / "checkpoint", assistants=here),
        CollaborativeLM.from_pretrained(**{"path": pair.root / "exported", "assistants": here, **served}),
    )


def same(
    plain: CollaborativeLM, found: CollaborativeLM, count: int, longest: int, near: float = NEAR
) -> list[Generation]:
    """So many texts at once, each with its own rule, are the same token for token, by the same authors."""
    texts = [f"What is {i} + {7 * i}?" for i in range(count)]
    asked = [replace(ASKED[i % len(ASKED)], max_tokens=4 + i % longest) for i in range(count)]
    expected, written = plain.generate_batch(texts, asked, 16), found.generate_batch(texts, asked, count)
    for one, other in zip(expected, written, strict=True):
        assert other.error is None
        assert one.token_ids == other.token_ids
        assert [step.author for step in one.steps] == [step.author for step in other.steps]
        for a, b in zip(one.steps, other.steps, strict=True):
            assert abs(a.log_prob - b.log_prob) < near
    return written


def test_the_engine_writes_with_a_served_base_as_in_one_process(pair: Pair) -> None:
    """200 at once with mixed rules; base on the server, assistants here."""
    plain, served = systems(pair, base=pair.spec)
    written = same(plain, served, 200, 40)
    authors = {step.author for generation in written for step in generation.steps}
    assert authors == set(range(1 + len(pair.assistants)))
    for generation, asked in zip(written, itertools.cycle(ASKED), strict=False):
        if asked.deferral == "threshold":  # round trips are counted in deferrals
            deferrals = sum(step.deferred for step in generation.steps)
            assert generation.usage.forward_passes[0] <= deferrals + 1


def test_the_engine_writes_with_a_served_assistant_as_in_one_process(pair: Pair) -> None:
    """The server's base is the first assistant here; it never defers when it is one."""
    names = [f"expert{k}" for k in range(len(pair.assistants))]
    others = [f"{name}={pair.root / name}" for name in names[1:]]
    path = pair.root / "checkpoint"
    plain = CollaborativeLM.from_pretrained(path, assistants=[f"{names[0]}={path}", *others])
    served = CollaborativeLM.from_pretrained(path, assistants=[f"{names[0]}=openai+{pair.url}?model=base", *others])
    # What a plain client is told of an export's law holds the rows of the gate, a percent or so.
    same(plain, served, 36, 24, near=0.03)


def test_two_hundred_requests_at_once_each_with_its_own_rule(pair: Pair) -> None:
    """Every token's decision, and what is told about it, against this process."""
    rng = random.Random(7)
    asked: list[dict[str, Any] | None] = [
        None,
        {"collm_deferral": "never"},
        {"collm_deferral": "always"},
        {"collm_threshold": 0.5},
        {"collm_threshold": 0.85},
        {"collm_deferral_rate": 0.4, "collm_task": "gsm8k"},
        {"collm_deferral": "expected_gain", "collm_threshold": 0.4},
        {"collm_deferral": "entropy", "collm_threshold": 3.2},
        {"collm_deferral": "top_probability", "collm_threshold": 0.12},
        {"collm_signal": "gate", "collm_cut": -0.2},
    ]
    served = pair.served
    watch = (*served.defer_token_ids, served.zero_token_id)
    requests = []
    for i in range(200):
        sampling = Sampling(temperature=rng.choice([0.0, 1.0]), seed=i, top_p=rng.choice([1.0, 0.8]))
        settings = asked[i % len(asked)] or {}
        requests.append(
            Completion(prompt(rng), rng.randrange(1, 60), sampling, stop_ids=(2,), watch=watch, settings=settings)
        )

    async def all_of_them(client: Client) -> list[tuple[list[Token], End]]:
        return await asyncio.gather(*(written(client, request) for request in requests))

    deferred, tokens_written = 0, 0
    for request, (tokens, end) in zip(requests, ask(pair.spec, all_of_them), strict=True):
        ids = [token.token_id for token in tokens]
        law, gate, signals = pair.signals([*request.token_ids, *ids[:-1]])
        law, gate, signals = (x[len(request.token_ids) - 1 :] for x in (law, gate, signals))
        found = rule(request.settings, served)
        for i, token in enumerate(tokens):
            value = float(signals[i, found.signal])
            defers = token.token_id in served.defer_token_ids
            assert defers == (value > found.cut) or abs(value - found.cut) < NEAR
            if defers:
                deferred += 1
                assert i == len(tokens) - 1 and end == End("stop")
                scores = gate[i, 1:]
                assert scores[served.defer_token_ids.index(token.token_id)] >= scores.max() - NEAR
            else:
                assert token.token_id < served.vocab_size
                if request.sampling.temperature == 0:
                    assert law[i, token.token_id] >= law[i].max() - NEAR
            # What a client makes of the log-probabilities it is told: `ServedInfo`.
            told = torch.tensor(token.watched)
            hidden = told[:-1].exp().sum() + served.zero_columns * told[-1].exp()
            scores = (told[:-1] - told[-1]) * served.scale + torch.tensor(served.bias)
            torch.testing.assert_close(log_gate(scores), gate[i], atol=NEAR, rtol=0)
            if not defers:
                own = token.log_prob - float(torch.log1p(-hidden))
                assert abs(own - float(law[i, token.token_id])) < NEAR
        tokens_written += len(tokens)
    assert tokens_written > 800 and 50 < deferred < 190, "the test is worth nothing without both"


def test_scores_are_those_of_this_process(pair: Pair) -> None:
    ids = prompt(random.Random(1), 100) + [5, 6]
    found = ask(pair.spec, lambda client: client.score(ids))
    with torch.inference_mode():
        exported = AutoModelForCausalLM.from_pretrained(Path(pair.base.name_or_path).parent / "exported")
        law = torch.log_softmax(exported(torch.tensor([ids])).logits[0], dim=-1)
    expected = law[range(len(ids) - 1), ids[1:]]
    torch.testing.assert_close(torch.tensor([given.log_prob for given in found]), expected, atol=NEAR, rtol=0)
    assert [given.is_top for given in found] == [int(law[i].argmax()) == ids[i + 1] for i in range(len(found))]


def test_the_tokenizer_is_compared_and_the_model_named(pair: Pair) -> None:
    def encode(tokenizer: Any) -> Any:
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False))

    right, wrong = tiny.make_tokenizer(), tiny.make_tokenizer(vocab_size=300)
    ask(pair.spec, lambda client: client.compare_tokenizer(encode(right), PROBES))
    with pytest.raises(ServerFault, match="has another tokenizer"):
        ask(pair.spec, lambda client: client.compare_tokenizer(encode(wrong), PROBES))
    with pytest.raises(ServerFault, match="did you mean 'base'"):
        ask(pair.spec.replace("base", "bese"), lambda client: client.card())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ignore_eos": True}, "ignore_eos together with deferral"),
        ({"min_tokens": 3}, "min_tokens together with deferral"),
        ({"logit_bias": {"320": 5.0}}, "logit_bias together with deferral"),
        ({"allowed_token_ids": [5, 6]}, "allowed_token_ids together with deferral"),
        ({"response_format": {"type": "json_object"}}, "response_format together with deferral"),
        ({"vllm_xargs": {"collm_treshold": 0.5}}, "did you mean"),
        ({"vllm_xargs": {"collm_deferral_rate": 0.3, "collm_task": "drop"}}, "not calibrated for task"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(pair: Pair, settings: dict[str, Any], message: str) -> None:
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 4, "vllm_xargs": {"collm_threshold": 0.5}}
    answer = httpx.post(f"{pair.url}/v1/completions", json=body | settings, timeout=60)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    if "vllm_xargs" not in settings:  # the same without deferral is none of our business
        answer = httpx.post(f"{pair.url}/v1/completions", json=body | settings | {"vllm_xargs": {}}, timeout=60)
        assert answer.status_code == 200
        assert not set(pair.served.defer_token_ids) & set(answer.json()["choices"][0].get("token_ids") or [])


def test_a_plain_request_never_defers_even_where_it_is_pushed(pair: Pair) -> None:
    biased = {str(number): 100.0 for number in (*pair.served.defer_token_ids, pair.served.zero_token_id)}
    body = {"model": "base", "prompt": [5, 6], "max_tokens": 20, "logit_bias": biased, "return_token_ids": True}
    answer = httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).json()
    assert all(number < pair.served.vocab_size for number in answer["choices"][0]["token_ids"])
