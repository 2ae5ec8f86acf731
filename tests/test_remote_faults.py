"""What goes wrong with servers: each ends as docs/scaling.md says, within its time; the other texts notice nothing."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_model, make_tokenizer
from remote_systems import SYSTEMS, local, same, urls
from served import Pair, Served, Trouble, listening, make_pair

from collm.errors import CollmError
from collm.llm import CollaborativeLM, GenerationFailed
from collm.remote.model import RemoteModel
from collm.sampling_params import SamplingParams

PROMPTS = [f"What is {a} + {b}?" for a, b in itertools.product((1, 7, 30), (2, 8))]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = make_pair(tmp_path_factory.mktemp("one"), 1)
    with listening(made.base, *made.others):
        yield made


@pytest.fixture(autouse=True)
def no_trouble(one: Pair) -> Iterator[None]:
    yield
    for server in (one.base, *one.others):
        server.troubles.clear()
        server.bodies.clear()
        server.always, server.seconds_per_token, server.buffers = None, 0.0, False


def test_another_model_behind_a_url_is_found_at_once(one: Pair) -> None:
    other = Served(make_model(vocab_size=300), make_tokenizer(vocab_size=300), name="other")
    with listening(other):
        with pytest.raises(CollmError, match="has another tokenizer: .* is this the server that was meant"):
            CollaborativeLM.from_pretrained(one.checkpoint, assistants=[f"openai+{other.url}"] * len(one.others))
        with pytest.raises(CollmError, match="has no model 'expert0'"):
            CollaborativeLM.from_pretrained(
                one.checkpoint, assistants=[f"openai+{other.url}?model=expert0"] * len(one.others)
            )


def test_a_server_without_the_logits_processor_is_refused(one: Pair) -> None:
    bare = Served(one.base.network, one.base.tokenizer, one.base.info, plugin=False)
    plain = Served(make_model(), one.base.tokenizer)
    with listening(bare, plain):
        for server in (bare, plain):
            with pytest.raises(CollmError, match="does not run collm's logits processor|is it|Does it serve"):
                CollaborativeLM.from_pretrained(
                    one.exported, assistants=[str(p) for p in one.assistants], base=f"vllm+{server.url}"
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


@pytest.mark.parametrize("tokens", range(1, 5))
def test_a_text_that_ends_asks_its_assistant_for_nothing_more(one: Pair, tokens: int) -> None:
    """Also where its next token was on its way already, as in a run of deferrals; and nothing of it is kept."""
    served = SYSTEMS["assistants served"](one)
    [assistant] = one.others
    stream = served.stream(PROMPTS[0], SamplingParams(max_tokens=40, deferral="always"))
    next(stream)
    assistant.seconds_per_token = 0.2
    for _ in range(1, tokens):
        next(stream)
    time.sleep(0.05)
    asked = len(assistant.bodies)
    stream.close()
    time.sleep(0.3)
    assert len(assistant.bodies) == asked
    [model] = [model for model in served.models if isinstance(model, RemoteModel)]
    assert model._ahead is not None and not model._ahead._written and not model._ahead._runs
    served.close()


def test_a_server_that_is_restarted_in_the_middle_of_a_text_is_found_again(tmp_path: Path) -> None:
    made = make_pair(tmp_path, 1)
    with listening(*made.others):
        up = listening(made.base)
        up.__enter__()
        served = CollaborativeLM.from_pretrained(f"vllm+{made.base.url}?tokenizer={made.exported}", urls(made))
        expected = served.generate(PROMPTS[0], LONG)
        made.base.seconds_per_token = 0.05
        again = listening(made.base)

        def restart() -> None:
            up.__exit__(None, None, None)
            again.__enter__()

        restarting = threading.Timer(0.15, restart)
        restarting.start()
        found = served.generate(PROMPTS[0], LONG)
        restarting.join(30)
        again.__exit__(None, None, None)
    same(expected, found)


def test_a_proxy_that_buffers_costs_time_and_nothing_else(one: Pair, quick: None) -> None:
    served = CollaborativeLM.from_pretrained(
        f"vllm+{one.base.url}?tokenizer={one.exported}&timeout=1", assistants=urls(one)
    )
    expected = served.generate(PROMPTS[0], LONG)
    one.base.buffers = True
    same(expected, served.generate(PROMPTS[0], LONG))
    one.base.seconds_per_token = 0.3  # longer than the time-out, which is for the next token
    with pytest.raises(GenerationFailed, match="no token within 1 s"):
        served.generate(PROMPTS[0], SamplingParams(max_tokens=12, deferral="never"))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_an_expired_certificate_is_named_and_a_good_one_of_one_s_own_is_trusted(tmp_path: Path) -> None:
    key, request, names = tmp_path / "key.pem", tmp_path / "request.pem", tmp_path / "names"
    names.write_text("subjectAltName=IP:127.0.0.1\n")

    def openssl(*arguments: object) -> None:
        subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=60)

    openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=server")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    server = Served(make_model(num_hidden_layers=1), make_tokenizer())
    for days in (2, -1):
        signed = tmp_path / f"{days}.pem"
        openssl("x509", "-req", "-in", request, "-signkey", key, "-days", days, "-extfile", names, "-out", signed)
        with listening(server, ssl_certfile=str(signed), ssl_keyfile=str(key)):
            spec = f"openai+{server.url}?tokenizer={tmp_path / 'tokenizer'}&ca={signed}"
            if days > 0:
                llm = CollaborativeLM.from_pretrained(spec)
                assert llm.generate(PROMPTS[0], SamplingParams(max_tokens=4)).completion_tokens == 4
            else:
                with pytest.raises(CollmError, match=r"not trusted \(certificate has expired\): renew it"):
                    CollaborativeLM.from_pretrained(spec)
