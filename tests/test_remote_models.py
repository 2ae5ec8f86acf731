"""Models behind servers in a system: the same texts as in one process, whoever is served; and what breaks."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import make_model
from remote_systems import SYSTEMS, local, remote_base, same, urls
from served import Pair, Served, listening, make_pair
from torch import Tensor
from writers import questions

from collm.calibration import calibrate
from collm.cli import main
from collm.cli.serve import _require_servable
from collm.errors import CollmError
from collm.identity.comparing import differences, differing
from collm.identity.finding import system_identity
from collm.llm import CollaborativeLM
from collm.remote.ahead import MOST
from collm.remote.model import RemoteModel
from collm.sampling_params import SamplingParams, Signal

PROMPTS = [f"What is {a} + {b}?" for a, b in itertools.product((1, 7, 30), (2, 8))]
PARAMS = {
    "threshold": SamplingParams(max_tokens=12, threshold=0.6),
    "rate": SamplingParams(max_tokens=12, deferral_rate=0.6),
    "expected_gain": SamplingParams(max_tokens=12, deferral="expected_gain", threshold=0.4),
    "entropy": SamplingParams(max_tokens=12, deferral="entropy", threshold=3.2),
    "top_probability": SamplingParams(max_tokens=12, deferral="top_probability", threshold=0.12),
    "sampled": SamplingParams(max_tokens=12, deferral="sampled"),
    "random": SamplingParams(max_tokens=12, deferral="random", threshold=0.4),
    "always": SamplingParams(max_tokens=8, deferral="always"),
    "never": SamplingParams(max_tokens=12, deferral="never"),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "two"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = make_pair(tmp_path_factory.mktemp("pair"), request.param)
    with listening(made.base, *made.others):
        yield made


@pytest.fixture(autouse=True)
def no_trouble(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"pair", "one"} & set(request.fixturenames):
        made: Pair = request.getfixturevalue(name)
        for server in (made.base, *made.others):
            server.troubles.clear()
            server.bodies.clear()
            server.always, server.seconds_per_token, server.repetition_penalty = None, 0.0, 1.0


@pytest.mark.parametrize("system", SYSTEMS)
def test_texts_are_those_of_one_process(pair: Pair, system: str) -> None:
    """Token for token, for every way to defer, all of them at once."""
    plain, served = local(pair), SYSTEMS[system](pair)
    asked = [(prompt, params) for params in PARAMS.values() for prompt in PROMPTS[:2]]
    prompts, params = [prompt for prompt, _ in asked], [params for _, params in asked]
    expected = plain.generate_batch(prompts, params, len(asked))
    found = served.generate_batch(prompts, params, len(asked))
    for one, other in zip(expected, found, strict=True):
        same(one, other)
    authors = {step.author for generation in found for step in generation.steps}
    assert authors == set(range(1 + len(pair.assistants))), "worth nothing unless all of them write"
    for each in (plain, served):
        each.close()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_generation_config_s_penalty_changes_nothing(pair: Pair, system: str) -> None:
    """A vLLM heeds it where a request does not say: Qwen2.5-Instruct names one."""
    for server in (pair.base, *pair.others):
        server.repetition_penalty = 1.5
    plain, served = local(pair), SYSTEMS[system](pair)
    for params in (PARAMS["threshold"], PARAMS["always"], PARAMS["never"]):
        same(plain.generate(PROMPTS[0], params), served.generate(PROMPTS[0], params))
    for each in (plain, served):
        each.close()


def test_a_base_is_asked_once_for_each_deferral_and_not_for_each_token(pair: Pair) -> None:
    served = remote_base(pair, [str(path) for path in pair.assistants])
    pair.base.bodies.clear()
    generation = served.generate(PROMPTS[0], SamplingParams(max_tokens=40, threshold=0.85))
    deferrals = sum(step.deferred for step in generation.steps)
    assert 0 < deferrals < len(generation.steps) - 4
    assert len(pair.base.bodies) <= deferrals + 1


@pytest.mark.parametrize("system", ["assistants served", "all served"])
def test_a_run_of_deferrals_is_written_ahead(pair: Pair, system: str) -> None:
    """Its assistant is asked for several tokens at a time, which are thrown away where the base writes instead."""
    plain, served = local(pair), SYSTEMS[system](pair)
    for temperature in (0.0, 1.0):
        always = SamplingParams(max_tokens=40, deferral="always", temperature=temperature, seed=3)
        found = served.generate(PROMPTS[0], always)
        calls = sum(len(server.bodies) for server in pair.others)
        deferrals = sum(step.deferred for step in found.steps)
        # One assistant: 1, 2, 4, 7, and then the most. Two take turns.
        assert deferrals >= 10 and calls <= (4 + deferrals / MOST if len(pair.others) == 1 else deferrals)
        if temperature:
            assert found.token_ids == served.generate(PROMPTS[0], always).token_ids
        else:
            same(plain.generate(PROMPTS[0], always), found)
        for server in (pair.base, *pair.others):
            server.bodies.clear()
    params = [SamplingParams(max_tokens=30, deferral="random", threshold=0.6, seed=n) for n in range(len(PROMPTS))]
    texts = served.generate_batch(PROMPTS, params, len(PROMPTS))
    for one, other in zip(plain.generate_batch(PROMPTS, params, 1), texts, strict=True):
        same(one, other)
    deferrals = sum(step.deferred for text in texts for step in text.steps)
    assert sum(len(server.bodies) for server in pair.others) < (0.9 if len(pair.others) == 1 else 1) * deferrals
    models = [model for model in served.models[1:] if isinstance(model, RemoteModel)]
    until = time.monotonic() + 10
    while any(model._ahead._written or model._ahead._runs for model in models if model._ahead):
        assert time.monotonic() < until, "what has ended is forgotten"
        time.sleep(0.01)
    assert models


@pytest.mark.parametrize("system", ["base served", "all served"])
def test_a_server_writes_no_further_than_the_text(
    pair: Pair, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder's generation config names an end of which the server does not know."""
    whole = local(pair).generate(PROMPTS[0], SamplingParams(max_tokens=60, deferral="never"))
    end = next(number for number in whole.token_ids[4:] if number not in whole.token_ids[:4])
    folder = shutil.copytree(pair.exported, tmp_path / "exported")
    config = json.loads((folder / "generation_config.json").read_text())
    ends = config["eos_token_id"] if isinstance(config["eos_token_id"], list) else [config["eos_token_id"]]
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [*ends, end]}))
    served = SYSTEMS[system](replace(pair, exported=folder))
    written, logits = list[int](), pair.base._logits

    def counted(ids: Sequence[int]) -> Tensor:
        written.append(len(ids))
        return logits(ids)

    monkeypatch.setattr(pair.base, "_logits", counted)
    found = served.generate(PROMPTS[0], SamplingParams(max_tokens=60, deferral="never"))
    assert found.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1] and found.finish_reason == "stop"
    time.sleep(0.2)
    assert len(written) == len(found.token_ids)


@pytest.mark.parametrize("system", ["base served", "all served"])
def test_alone_and_drawn_texts(pair: Pair, system: str) -> None:
    served, plain = SYSTEMS[system](pair), local(pair)
    for alone in ("base", "expert0"):
        same(
            plain.generate(PROMPTS[0], SamplingParams(max_tokens=20), alone=alone),
            served.generate(PROMPTS[0], SamplingParams(max_tokens=20), alone=alone),
        )
    drawn = SamplingParams(max_tokens=20, temperature=1.0, seed=3)
    again = [served.generate(PROMPTS[0], drawn).token_ids for _ in range(2)]
    assert again[0] == again[1] and again[0] != served.generate(PROMPTS[0], SamplingParams(max_tokens=20)).token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(deferral="compose"), "compose cannot be had from base: .* not whole laws"),
        (SamplingParams(deferral="mixture"), "mixture cannot be had"),
        (SamplingParams(threshold=0.5, top_log_probs=2), "top_log_probs cannot be had from base: it tells the gate"),
    ],
)
def test_what_a_server_does_not_tell_is_refused_by_name(pair: Pair, params: SamplingParams, message: str) -> None:
    served = SYSTEMS["all served"](pair)
    with pytest.raises(CollmError, match=message):
        served.generate(PROMPTS[0], params)


def test_signals_that_a_server_keeps_to_itself_are_refused_before_a_text_is_written(pair: Pair) -> None:
    """They were missed when all texts of the base had been written, by an assertion."""
    served = SYSTEMS["base served"](pair)
    settings: dict[str, Any] = {"params": SamplingParams(max_tokens=4), "target_rates": (0, 0.5), "progress": False}
    signals: tuple[Signal, ...] = ("entropy", "top_probability", "expected_gain")
    for signal in signals:
        pair.base.bodies.clear()
        with pytest.raises(CollmError, match=f"does not tell the {signal.replace('_', ' ')}"):
            calibrate(served, "exact_match", questions(2), signal=signal, **settings)
        assert not pair.base.bodies
    table = calibrate(served, "exact_match", questions(2), signal="random", **settings)
    assert [row.target_rate for row in table.rows] == [0, 0.5]


def test_a_plain_base_tells_no_entropy_and_the_most_probable_tokens(pair: Pair) -> None:
    expert, path = pair.others[0], pair.assistants[0]
    served = CollaborativeLM.from_pretrained(
        f"openai+{expert.url}?tokenizer={path}", assistants=[f"e=openai+{expert.url}"]
    )
    plain = CollaborativeLM.from_pretrained(path, assistants=[f"e={path}"])
    with pytest.raises(CollmError, match="entropy cannot be had"):
        served.generate(PROMPTS[0], SamplingParams(deferral="entropy", threshold=1.0))
    with pytest.raises(CollmError, match="needs a gate"):
        served.generate(PROMPTS[0], SamplingParams(threshold=0.5))
    for own in ({"deferral": "top_probability", "threshold": 0.2}, {"deferral": "random", "threshold": 0.3}):
        params = SamplingParams(max_tokens=12, top_log_probs=3, **own)  # type: ignore[arg-type]
        one, other = (each.generate(PROMPTS[0], params) for each in (plain, served))
        same(one, other)
        for a, b in zip(one.steps, other.steps, strict=True):
            assert [token for token, _ in a.top] == [token for token, _ in b.top]
            assert a.signal is None or math.isclose(a.signal, b.signal or 0, abs_tol=2e-4)


@pytest.mark.parametrize(
    ("path", "base", "message"),
    [
        ("vllm+http://h", None, "tokenizer=FOLDER"),
        ("{exported}", "openai+http://h", "needs a vLLM that runs collm's plugin"),
        ("{checkpoint}", "vllm+http://h", "is no export"),
        ("vllm+http://h?tokenizer={exported}", "{checkpoint}", "leave out --base"),
        ("wllm+http://h", None, "say what kind of server"),
        ("{exported}", None, "was written by collm export"),
    ],
)
def test_specs_that_cannot_be_are_refused_before_anything_is_asked(
    pair: Pair, path: str, base: str | None, message: str
) -> None:
    places = {"exported": pair.exported, "checkpoint": pair.checkpoint}
    with pytest.raises(CollmError, match=message):
        CollaborativeLM.from_pretrained(path.format(**places), base=base and base.format(**places))


def test_what_is_served_is_known_by_what_it_says_and_not_by_where_it_is(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of a system on servers are taken up again through other addresses, and refused with another model."""
    monkeypatch.setenv("COLLM_TEST_KEY", "sesame-123")
    again = [Served(each.network, each.tokenizer, each.info, name=each.name) for each in (pair.base, *pair.others)]
    with listening(*again):
        moved = Pair(pair.checkpoint, pair.exported, pair.assistants, again[0], again[1:])
        spec = f"vllm+{again[0].url}?tokenizer={pair.exported}&key_env=COLLM_TEST_KEY"
        one, other = SYSTEMS["all served"](pair), CollaborativeLM.from_pretrained(spec, urls(moved))
        told, now = (system_identity(llm.models, llm.formatters) for llm in (one, other))
        assert differences(told, now) == ""
        assert set(again[0].keys) == {"Bearer sesame-123"} and set(again[1].keys) == {None}
        assert "sesame" not in json.dumps(now) and "127.0.0.1" not in json.dumps(now)
        again[1].network = make_model(seed=77, num_hidden_layers=1)
        fake = CollaborativeLM.from_pretrained(spec, urls(moved))
        found = differing(told, system_identity(fake.models, fake.formatters))
        assert list(found) == ["models.expert0.probe"]
    here = local(pair)
    assert "models.base.kind" in differing(told, system_identity(here.models, here.formatters))


def test_on_the_command_line(pair: Pair) -> None:
    """`collm generate` with URLs says what it says without; `collm serve` takes them as they are."""
    shared = ["--max-tokens", "10", "--threshold", "0.6", "--json", PROMPTS[0]]

    def said(*arguments: object) -> dict[str, Any]:
        found = CliRunner().invoke(main, ["generate", *map(str, arguments), *shared])
        assert found.exit_code == 0, found.output
        told: dict[str, Any] = json.loads(found.stdout)
        return told

    given = [word for url in urls(pair) for word in ("--assistant", url)]
    one, other = said(pair.checkpoint), said(pair.exported, "--base", f"vllm+{pair.base.url}", *given)
    assert one["text"] == other["text"] and one["deferral_rate"] == other["deferral_rate"] > 0
    options: dict[str, Any] = {"assistants": urls(pair), "base": None, "dtype": "float32"}
    _require_servable(f"vllm+{pair.base.url}?tokenizer={pair.exported}", options, PARAMS["rate"])
    refused = CliRunner().invoke(main, ["generate", str(pair.exported), "--base", "vllm+http://h?modle=x", "hi"])
    assert refused.exit_code == 1 and "did you mean 'model'" in refused.output
