"""Models behind servers in a system: the same texts as in one process, whoever is served; and what breaks."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from served import Pair, Served, Trouble, listening, make_pair

from collm.errors import CollmError
from collm.llm import CollaborativeLM, GenerationFailed
from collm.sampling_params import SamplingParams
from collm.types import Generation

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


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With one assistant, for what goes wrong."""
    made = make_pair(tmp_path_factory.mktemp("one"), 1)
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
            server.always, server.seconds_per_token = None, 0.0


def local(pair: Pair) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(pair.checkpoint, assistants=[str(path) for path in pair.assistants])


def urls(pair: Pair, kind: str = "vllm", more: str = "") -> list[str]:
    return [f"{server.name}={kind}+{server.url}?model={server.name}{more}" for server in pair.others]


def remote_base(pair: Pair, assistants: list[str]) -> CollaborativeLM:
    return CollaborativeLM.from_pretrained(pair.exported, assistants=assistants, base=f"vllm+{pair.base.url}")


SYSTEMS = {
    "base served": lambda pair: remote_base(pair, [str(path) for path in pair.assistants]),
    "assistants served": lambda pair: CollaborativeLM.from_pretrained(pair.checkpoint, assistants=urls(pair, "openai")),
    "all served": lambda pair: CollaborativeLM.from_pretrained(
        f"vllm+{pair.base.url}?tokenizer={pair.exported}", assistants=urls(pair)
    ),
}


def same(one: Generation, other: Generation) -> None:
    assert one.token_ids == other.token_ids
    assert [step.author for step in one.steps] == [step.author for step in other.steps]
    assert one.finish_reason == other.finish_reason and one.text == other.text
    for a, b in zip(one.steps, other.steps, strict=True):
        assert math.isclose(a.log_prob, b.log_prob, abs_tol=2e-4)
        assert b.base_token_id in (None, a.base_token_id)
        if b.gate and a.gate:
            assert all(math.isclose(x, y, abs_tol=2e-4) for x, y in zip(a.gate, b.gate, strict=True))


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


def test_a_base_is_asked_once_for_each_deferral_and_not_for_each_token(pair: Pair) -> None:
    served = remote_base(pair, [str(path) for path in pair.assistants])
    pair.base.bodies.clear()
    generation = served.generate(PROMPTS[0], SamplingParams(max_tokens=40, threshold=0.85))
    deferrals = sum(step.deferred for step in generation.steps)
    assert 0 < deferrals < len(generation.steps) - 4
    assert len(pair.base.bodies) <= deferrals + 1


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


# -- what goes wrong


def test_another_model_behind_a_url_is_found_at_once(pair: Pair) -> None:
    other = Served(make_model(vocab_size=300), make_tokenizer(vocab_size=300), name="other")
    with listening(other):
        with pytest.raises(CollmError, match="has another tokenizer: .* is this the server that was meant"):
            CollaborativeLM.from_pretrained(pair.checkpoint, assistants=[f"openai+{other.url}"] * len(pair.others))
        with pytest.raises(CollmError, match="has no model 'expert0'"):
            CollaborativeLM.from_pretrained(
                pair.checkpoint, assistants=[f"openai+{other.url}?model=expert0"] * len(pair.others)
            )


def test_a_server_without_the_logits_processor_is_refused(pair: Pair) -> None:
    bare = Served(pair.base.network, pair.base.tokenizer, pair.base.info, plugin=False)
    plain = Served(make_model(), pair.base.tokenizer)
    with listening(bare, plain):
        for server in (bare, plain):
            with pytest.raises(CollmError, match="does not run collm's logits processor|is it|Does it serve"):
                CollaborativeLM.from_pretrained(
                    pair.exported, assistants=[str(p) for p in pair.assistants], base=f"vllm+{server.url}"
                )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of a hundredth."""
    monkeypatch.setattr("collm.remote.faults.FIRST_PAUSE", 0.002)
    monkeypatch.setattr("collm.remote.faults.LONGEST_PAUSE", 0.08)


LONG = SamplingParams(max_tokens=12, threshold=0.6)


@pytest.mark.parametrize(
    "trouble",
    [
        Trouble(after=0, then="cut"),
        Trouble(after=3, then="cut"),
        Trouble(after=2, then="garbage"),
        Trouble(after=1, then="hang"),
        Trouble(status=503),
        Trouble(status=429, headers={"Retry-After": "0.05"}),
        Trouble(status=503, headers={"Retry-After": "0.05"}),
        Trouble(status=500),
    ],
    ids=lambda trouble: f"{trouble.status}{trouble.then}{trouble.after}{'later' if trouble.headers else ''}",
)
def test_what_passes_leaves_no_trace(one: Pair, quick: None, trouble: Trouble) -> None:
    """Base and assistants fail here and there; the texts are those of servers that do not."""
    served = CollaborativeLM.from_pretrained(
        f"vllm+{one.base.url}?tokenizer={one.exported}&timeout=0.5", assistants=urls(one, more="&timeout=0.5")
    )
    expected = served.generate_batch(PROMPTS[:3], LONG)
    for server in (one.base, *one.others):
        server.troubles.extend([trouble, Trouble(), trouble])
    for a, b in zip(expected, served.generate_batch(PROMPTS[:3], LONG), strict=True):
        same(a, b)
    assert not any(server.troubles for server in (one.base, *one.others)), "worth nothing unless they happened"


@pytest.mark.parametrize(
    ("trouble", "says"),
    [
        (Trouble(then="cut"), "broke|ended in the middle"),
        (Trouble(then="garbage"), "no JSON"),
        (Trouble(then="hang"), "no token within 0.3 s"),
        (Trouble(then="ids", after=-1), "wrote token 100000"),
        (Trouble(then="text", after=-1), "gives no token ids"),
        (Trouble(status=404), "status 404"),
        (Trouble(status=401), "wants a key"),
    ],
    ids=lambda value: value.then or str(value.status) if isinstance(value, Trouble) else "",
)
def test_an_assistant_that_is_gone_ends_the_text_or_the_base_goes_on_as_asked(
    one: Pair, quick: None, trouble: Trouble, says: str
) -> None:
    served = CollaborativeLM.from_pretrained(
        f"vllm+{one.base.url}?tokenizer={one.exported}", assistants=urls(one, more="&timeout=0.3")
    )
    for server in one.others:
        server.always = trouble
    began = time.monotonic()
    with pytest.raises(GenerationFailed, match=f"expert[01]: .*({says})") as failed:
        served.generate(PROMPTS[0], LONG)
    assert all(not step.deferred for step in failed.value.generation.steps)
    going_on = SamplingParams(max_tokens=12, threshold=0.6, on_assistant_error="base")
    generation = served.generate(PROMPTS[0], going_on)
    same(local(one).generate(PROMPTS[0], SamplingParams(max_tokens=12), alone="base"), generation)
    flagged = [step for step in generation.steps if step.fault is not None]
    assert flagged and all(step.abstained and "expert" in str(step.fault) for step in flagged)
    assert time.monotonic() - began < 20


def test_a_broken_assistant_is_left_alone_and_comes_back(
    one: Pair, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collm.remote.health.COOLDOWN", 0.5)
    served = SYSTEMS["all served"](one)
    going_on = SamplingParams(max_tokens=12, threshold=0.6, on_assistant_error="base")
    expected = served.generate(PROMPTS[0], going_on)
    for server in one.others:
        server.always = Trouble(status=500)
        server.bodies.clear()
    assert any("left alone" in str(step.fault) for step in served.generate(PROMPTS[0], going_on).steps)
    assert all(len(server.bodies) < 12 for server in one.others), "its breaker is open"
    for server in one.others:
        server.always = None
    time.sleep(0.6)
    same(expected, served.generate(PROMPTS[0], going_on))


def test_one_text_s_trouble_is_no_other_s(one: Pair, quick: None) -> None:
    served = SYSTEMS["all served"](one)
    expected = served.generate_batch(PROMPTS, LONG)
    one.base.troubles.append(Trouble(status=400))
    found = served.generate_batch(PROMPTS, LONG)
    broken = [generation for generation in found if generation.error]
    assert len(broken) == 1 and "status 400" in str(broken[0].error)
    for a, b in zip(expected, found, strict=True):
        if b.error is None:
            same(a, b)


def test_replicas_share_the_work_and_stand_in_for_one_another(one: Pair, quick: None) -> None:
    again = Served(one.base.network, one.base.tokenizer, one.base.info)
    with listening(again):
        spec = f"vllm+{one.base.url}?tokenizer={one.exported}&replica={again.url}"
        served = CollaborativeLM.from_pretrained(spec, assistants=urls(one))
        one.base.bodies.clear()
        again.bodies.clear()
        one.base.seconds_per_token = again.seconds_per_token = 0.002
        expected = served.generate_batch(PROMPTS, LONG, len(PROMPTS))
        assert one.base.bodies and again.bodies
        again.always = Trouble(then="cut")
        for a, b in zip(expected, served.generate_batch(PROMPTS, LONG, len(PROMPTS)), strict=True):
            same(a, b)


def test_a_server_that_is_not_there_is_named_within_its_attempts(quick: None, tmp_path: Any) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CollmError, match="http://127.0.0.1:9: no connection"):
        CollaborativeLM.from_pretrained(f"openai+http://127.0.0.1:9?tokenizer={tmp_path}")


def test_a_cancelled_text_frees_its_server(one: Pair) -> None:
    served = SYSTEMS["all served"](one)
    one.base.seconds_per_token = 0.02
    stream = served.stream(PROMPTS[0], SamplingParams(max_tokens=200, deferral="never", stop_token_ids=()))
    next(stream)
    stream.close()
    assert served.engine.load.running + served.engine.load.waiting <= 1
    one.base.seconds_per_token = 0.0
    assert served.generate(PROMPTS[1], LONG).steps
