"""Models with different tokenizers write one text: what equals what, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from chunk_toys import byte_level, sentencepiece_like
from test_graphs import machinery
from tiny import make_model, make_tokenizer
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from collm.cuts import START, Cuts
from collm.data.formatting import Formatter
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunk_writing import FAR, Held
from collm.decoding.chunked import MISSES, _State
from collm.decoding.policies import Threshold
from collm.errors import CollmError
from collm.evaluation.chunk_likelihood import chunk_likelihoods, chunk_windows, tokens_read
from collm.evaluation.likelihood import GivenText
from collm.llm import CollaborativeLM, TokenPrompt
from collm.llm.sharing import share
from collm.models.codec import ByteCodec, NotItsText, vocabulary
from collm.models.head import DeferralHead
from collm.models.info import CheckpointInfo
from collm.models.local import LocalModel
from collm.models.pairing import SAMPLES, chunking, cuts_between, require_free_tools, tell_chunking
from collm.models.tools import Calculator, Tool
from collm.sampling_params import SamplingParams
from collm.types import Generation
from collm.values import Answer, LanguageModel, Query
from collm.views import View

PROMPT = [{"role": "user", "content": "How many apples?"}]
PROMPTS = [PROMPT, [{"role": "user", "content": "Write code."}], "12 + 30 ="]
NAMES = ("base", "one", "two")


def tokenizers() -> list[PreTrainedTokenizerFast]:
    return [byte_level("gpt2", 400), byte_level("llama3", 460, seed=1), sentencepiece_like()]


def local(
    tokenizer: PreTrainedTokenizerFast, name: str, seed: int, heads: int | None = None, **more: Any
) -> LocalModel:
    """A random model that never chooses a special token by itself; nor does it end, unless `ends` is given."""
    ends, ascii, gate = more.pop("ends", None), more.pop("ascii", False), more.pop("gate", None)
    size, context = len(tokenizer) + 3, more.pop("context", 256)
    model = make_model(seed=seed, vocab_size=size, initializer_range=0.35, max_position_embeddings=context)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.all_special_ids] = 0.0
        if ascii:  # what it writes is UTF-8
            beyond = [v for v, piece in enumerate(vocabulary(tokenizer)) if piece and not piece.isascii()]
            model.lm_head.weight[beyond] = 0.0
        if ends is not None:
            model.lm_head.weight[tokenizer.eos_token_id] = model.lm_head.weight[ends] * 1.01
    head = None
    if heads is not None:
        head = DeferralHead(32, heads)
        torch.manual_seed(7)
        torch.nn.init.normal_(head.weight, std=0.3)
        if gate is not None:
            torch.nn.init.zeros_(head.weight)
            head.bias.data[:] = torch.tensor(gate[1:])
    return LocalModel(model, tokenizer, head, name=name, **more)


def system(
    count: int = 2,
    *,
    ends: int | None = None,
    own: list[PreTrainedTokenizerFast] | None = None,
    contexts: Sequence[int] = (256, 256, 256),
    **more: Any,
) -> CollaborativeLM:
    own = own or tokenizers()[:count]
    models: list[LanguageModel] = [
        local(t, n, z, None if z else count - 1, ends=ends if z == 0 else None, context=contexts[z], **more)
        for z, (t, n) in enumerate(zip(own, NAMES, strict=False))
    ]
    formatters = [Formatter(t) for t in own]
    cuts = cuts_between(own, NAMES[:count])
    assert cuts is not None
    info = CheckpointInfo(cuts=cuts.fingerprint)
    return CollaborativeLM(models, formatters, info, sharing=share(models, formatters, info, True))


@pytest.fixture(scope="module")
def pair() -> CollaborativeLM:
    return system()


def data(generation: Generation) -> bytes:
    return b"".join(step.data or b"" for step in generation.steps)


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("max_tokens", [1, 7, 40])
def test_never_is_the_base_and_always_the_assistant(temperature: float, max_tokens: int) -> None:
    """Id for id: chunks do not change what one model writes by itself. (If it writes as its tokenizer would: a random
    model does so with a tokenizer of single bytes.)"""
    single, other = byte_level("gpt2", 259), byte_level("llama3", 460, seed=1)
    llm = system(own=[single, other], ascii=True)
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=3, deferral="never")
    for prompt in PROMPTS:
        never, alone = llm.generate(prompt, params), llm.generate(prompt, params, alone="base")
        assert never.token_ids == alone.token_ids and never.completion_tokens == max_tokens
        assert never.text == alone.text
        assert never.finish_reason == alone.finish_reason == "length"
        plain = sum(step.log_prob for step in alone.steps)
        assert sum(step.log_prob for step in never.steps) == pytest.approx(plain, abs=0.5)
    llm = system(own=[other, single], ascii=True)
    for prompt in PROMPTS:
        always = llm.generate(prompt, replace(params, deferral="always"))
        alone = llm.generate(prompt, replace(params, max_tokens=4 * max_tokens, deferral="threshold"), alone="one")
        written = b"".join(single_bytes(llm, alone.token_ids))
        assert data(always) and written.startswith(data(always))
        assert always.deferral_rate == 1.0 and always.completion_tokens <= max_tokens


def single_bytes(llm: CollaborativeLM, token_ids: tuple[int, ...]) -> list[bytes]:
    assert llm.sharing is not None
    return [llm.sharing.codecs[1].pieces[v] or b"" for v in token_ids]


@pytest.mark.parametrize(
    ("count", "who"),
    [
        (2, {"deferral": "threshold"}),
        (2, {"deferral": "sampled"}),
        (3, {"deferral": "sampled"}),
        (3, {"deferral": "expected_gain", "threshold": 0.4}),
        (2, {"deferral": "entropy", "threshold": 1.5}),
        (2, {"deferral": "random", "threshold": 0.5}),
        (2, {"deferral": "top_probability", "threshold": 0.5}),
        (2, {"deferral": "nudging", "threshold": 0.5}),
    ],
)
def test_cached_batched_and_streamed_are_the_same(count: int, who: dict[str, Any]) -> None:
    llm, plain = system(count), system(count, cache=False)
    for temperature in (0.0, 0.9):
        params = SamplingParams(max_tokens=24, temperature=temperature, seed=1, **who)
        if who["deferral"] in ("entropy", "top_probability", "nudging"):  # half of what is doubted
            everywhere = replace(params, threshold=0.0 if who["deferral"] == "nudging" else 0.99)
            signals = sorted(step.signal or 0.0 for step in llm.generate(PROMPT, everywhere).steps)
            middle = signals[len(signals) // 2]
            params = replace(params, threshold=middle if who["deferral"] == "entropy" else math.exp(-middle))
        each = [plain.generate(prompt, params) for prompt in PROMPTS]
        batch = llm.generate_batch(PROMPTS, params)
        for prompt, one, other in zip(PROMPTS, each, batch, strict=True):
            assert [(s.data, s.author, s.token_ids) for s in one.steps] == [
                (s.data, s.author, s.token_ids) for s in other.steps
            ]
            assert [s.log_prob for s in one.steps] == pytest.approx([s.log_prob for s in other.steps], abs=1e-3)
            chunks = list(llm.stream(prompt, params))
            assert "".join(chunk.text for chunk in chunks) == one.text == chunks[-1].generation.text  # type: ignore[union-attr]
            assert "".join(one.pieces) == one.text
        assert len({author for g in each for author in (s.author for s in g.steps)}) > 1
        assert [s.data for g in each for s in g.steps] == [c for g in each for c in llm.sharing.cuts.chunks(data(g))]  # type: ignore[union-attr]


@pytest.mark.parametrize("who", [{"deferral": "threshold"}, {"deferral": "random", "threshold": 0.5}])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_graphs_write_what_the_twin_writes(temperature: float, who: dict[str, Any]) -> None:
    """Whole texts, with the mask of openings inside the graphs."""
    llm, plain = system(machinery=machinery(), max_cache_tokens=800), system(cache=False)
    params = SamplingParams(max_tokens=24, temperature=temperature, top_p=0.9, seed=1, **who)
    found = [model for model in llm.models if isinstance(model, LocalModel)]
    passes = [0]
    for model in found:
        model.on_pass = lambda done: passes.__setitem__(0, passes[0] + 1)
    written, expected = llm.generate_batch(PROMPTS, params), plain.generate_batch(PROMPTS, params)
    assert {step.author for each in written for step in each.steps} == {0, 1}
    for one, other in zip(written, expected, strict=True):
        assert [(s.data, s.author, s.token_ids) for s in one.steps] == [
            (s.data, s.author, s.token_ids) for s in other.steps
        ]
        assert [s.log_prob for s in one.steps] == pytest.approx([s.log_prob for s in other.steps], abs=1e-3)
    in_graphs = sum(sum(model._stepper.counts.passes.values()) for model in found if model._stepper is not None)
    assert in_graphs == passes[0] > 20, "no pass left the graphs"


def test_each_model_keeps_its_own_ids(pair: CollaborativeLM) -> None:
    """At the end, a view holds what its tokenizer makes of the text, chunk by chunk."""
    sharing = pair.sharing
    assert sharing is not None
    params = SamplingParams(max_tokens=40, deferral="random", threshold=0.5)
    generation = pair.generate(PROMPT, params)
    for model, codec in enumerate(sharing.codecs):
        text = ChunkText([[1], [1]], sharing.codecs, sharing.cuts)
        text.chunks += [step.data for step in generation.steps if step.data]
        assert codec.data(text.read(model).token_ids[1:]) == data(generation)
    assert generation.token_ids == tuple(v for step in generation.steps if step.data for v in (step.token_ids))
    assert generation.usage.tokens_by_author[0] + generation.usage.tokens_by_author[1] == generation.completion_tokens


@pytest.mark.parametrize(("deferral", "threshold"), [("never", None), ("random", 0.5), ("nudging", 0.5)])
def test_the_most_probable_tokens_are_told_of_each_chunk_of_the_base(deferral: Any, threshold: float | None) -> None:
    """Of those too that it saw ahead, as it wrote the chunk before."""
    pair = system(ascii=True)
    sharing = pair.sharing
    assert sharing is not None
    params = SamplingParams(max_tokens=30, top_log_probs=3, seed=1, deferral=deferral, threshold=threshold)
    steps = pair.generate(PROMPT, params).steps
    text = ChunkText([f.prompt(PROMPT) for f in pair.formatters], sharing.codecs, sharing.cuts)
    for step in steps:
        view = text.read(0)
        [[answer]] = pair.models[0].predict([Query(0, view, len(view), num_top=3)])
        assert isinstance(answer, Answer) and len(answer.top) == 3
        expected = () if step.author else answer.top
        assert [token_id for token_id, _ in step.top] == [token_id for token_id, _ in expected]
        assert [value for _, value in step.top] == pytest.approx([value for _, value in expected], abs=1e-3)
        text.chunks.append(step.data or b"")
    assert sum(step.author == 0 for step in steps) > 5


def test_ends_and_stop_strings() -> None:
    llm = system(ends=66)
    ended = llm.generate_batch([f"{n} + {n} =" for n in range(12)], SamplingParams(max_tokens=60, deferral="never"))
    assert {g.finish_reason for g in ended} >= {"stop"}
    for generation in ended:
        if generation.finish_reason == "stop":
            last = generation.steps[-1]
            assert last.data == b"" and generation.pieces[-1].endswith("<|im_end|>")
            assert generation.text == data(generation).decode(errors="replace")
    params = SamplingParams(max_tokens=40, deferral="random", threshold=0.5)
    whole = system().generate(PROMPT, params)
    text = whole.text
    stop = next(text[a : a + 2] for a in range(5, len(text) - 2) if "\ufffd" not in text[a : a + 2])
    stopped = system().generate(PROMPT, replace(params, stop=(stop,)))
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("count", "who", "max_tokens", "temperature", "ends"),
    [
        (2, {"deferral": "random", "threshold": 0.3}, 48, 0.0, False),
        (2, {"deferral": "random", "threshold": 0.3}, 48, 0.8, False),
        (2, {"deferral": "always"}, 30, 0.8, False),
        (3, {"deferral": "sampled"}, 48, 0.8, False),
        (3, {"deferral": "random", "threshold": 0.3}, 48, 0.0, True),
    ],
)
def test_a_look_that_waits_changes_nothing_but_passes(
    count: int, who: dict[str, Any], max_tokens: int, temperature: float, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody reads along, an assistant looks behind its chunk in its next pass, and what was written meanwhile is
    taken back if it would have gone on."""
    counts = Counter[str]()

    def counting(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return whole(*arguments)

        monkeypatch.setattr(owner, name, counted)

    counting(Held, "look_and_open")
    counting(ChunkText, "back")
    llm = system(count, ends=66 if ends else None)
    asked = [f"{n} + {n} =" for n in range(8)] if ends else PROMPTS
    for prompt, seed in itertools.product(asked, (4,) if ends else (4, 8)):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, **who)
        waiting = llm.generate(prompt, params)
        counts["passes"] += waiting.forward_passes[1]
        told = dict(counts)
        at_once = list(llm.stream(prompt, params))[-1].generation
        assert at_once is not None and dict(counts) == told, "whoever reads along is told at once"
        counts["at once"] += at_once.forward_passes[1]
        assert len(waiting.steps) == len(at_once.steps) and waiting.finish_reason == at_once.finish_reason
        for one, other in zip(waiting.steps, at_once.steps, strict=True):
            assert one.log_prob == pytest.approx(other.log_prob, abs=1e-4)
            assert one.gate == pytest.approx(other.gate, abs=1e-5) and one.signal == pytest.approx(other.signal)
            rest = [step._replace(log_prob=0.0, gate=(), signal=None) for step in (one, other)]
            assert rest[0] == rest[1]
        assert waiting.text == at_once.text and waiting.pieces == at_once.pieces
    if who["deferral"] == "always":  # nothing is written in between
        assert counts["passes"] == counts["at once"] and not counts["look_and_open"]
        return
    assert counts["look_and_open"] > 3 and counts["back"], counts
    if who["deferral"] == "random" and count == 2:
        assert counts["passes"] < counts["at once"], counts  # by how many: tests/test_chunk_passes.py


def test_what_is_held_back_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An assistant that is seldom asked looks behind its chunk in time; where many would have gone on, none is held."""
    far: list[int] = []
    missed: list[bool] = []
    whole = _State.looked

    def looked(self: _State, text: ChunkText, verdict: Any) -> Any:
        assert self.held is not None
        far.append(text.length - self.held.mark.length)
        steps = whole(self, text, verdict)
        missed.append(steps is None)
        return steps

    monkeypatch.setattr(_State, "looked", looked)
    llm = system(ascii=True)
    seldom = SamplingParams(max_tokens=200, deferral="random", threshold=0.03, seed=3)
    found = llm.generate(PROMPT, seldom)
    assert found.completion_tokens == 200 and FAR <= max(far) < FAR + 20, far
    # A stop string that stands among what is held ends the text there all the same.
    at = next(i for i, step in enumerate(found.steps) if step.author) + 6
    stop = "".join(found.pieces[at : at + 3])
    stopped = llm.generate(PROMPT, replace(seldom, stop=(stop,)))
    told = list(llm.stream(PROMPT, replace(seldom, stop=(stop,))))[-1].generation
    assert told is not None and stopped.text == told.text == found.text[: found.text.index(stop)]
    for seed in range(6):
        far.clear(), missed.clear()
        llm.generate(PROMPT, SamplingParams(max_tokens=120, deferral="random", threshold=0.3, seed=seed))
        assert sum(missed) <= 2 + len(missed) * MISSES


def test_nudging_hands_over_words_of_chunks() -> None:
    """The assistant writes; where what it would open a chunk with is in doubt, the base writes up to the next word."""
    llm = system(ascii=True)
    sharing = llm.sharing
    assert sharing is not None
    params = SamplingParams(max_tokens=60, deferral="nudging", threshold=0.0)
    sure = [llm.generate(prompt, params) for prompt in PROMPTS]
    always = [llm.generate(prompt, replace(params, deferral="always", threshold=None)) for prompt in PROMPTS]
    assert [data(each) for each in sure] == [data(each) for each in always]
    assert {step.author for each in sure for step in each.steps} == {1}
    # Where the assistant is sure, the base is not asked.
    assert all(each.forward_passes[0] == 0 for each in sure)
    doubting = [llm.generate(prompt, replace(params, threshold=1.0)) for prompt in PROMPTS]
    never = [llm.generate(prompt, replace(params, deferral="never", threshold=None)) for prompt in PROMPTS]
    assert [each.token_ids for each in doubting] == [each.token_ids for each in never]
    signals = sorted(step.signal or 0.0 for each in sure for step in each.steps)
    middle = len(signals) // 2
    threshold = math.exp(-(signals[middle] + signals[middle + 1]) / 2)
    codes = sharing.codecs
    nudges = words_of_more = 0
    for prompt in PROMPTS:
        found = llm.generate(prompt, replace(params, threshold=threshold))
        text = ChunkText([f.prompt(prompt) for f in llm.formatters], codes, sharing.cuts)
        in_word = False
        for step in found.steps:
            answers = []
            for model in (0, 1):
                view = text.read(model)
                query = Query(model, view, len(view), last_bytes=(text.last_byte,), opens=True)
                [[answer]] = llm.models[model].predict([query])
                assert isinstance(answer, Answer)
                answers.append(answer)
            opening = (codes[0].pieces[answers[0].token_id] or b"").decode(errors="ignore")
            goes_on = in_word and not opening[:1].isspace()
            doubt = math.exp(answers[1].top_log_prob - answers[1].log_close) < threshold
            assert step.author == (0 if goes_on or doubt else 1)
            assert (step.signal is None) == goes_on and (step.base_token_id is None) == (
                step.author == 1 and not in_word
            )
            words_of_more += goes_on
            in_word = step.author == 0
            nudges += in_word
            text.chunks.append(step.data or b"")
    assert nudges > 5 and words_of_more > 2


def test_nudging_by_the_base_ends_a_text_and_stands_in_for_a_failing_writer() -> None:
    llm = system(ends=66)
    params = SamplingParams(max_tokens=60, deferral="nudging", threshold=1.0)
    ended = llm.generate_batch([f"{n} + {n} =" for n in range(12)], params)
    assert {each.finish_reason for each in ended} >= {"stop"}

    class Breaks(LocalModel):
        def predict(self, queries: Any) -> Any:
            if any(not query.opens for query in queries):
                raise RuntimeError("broken")
            return super().predict(queries)

    llm = system()
    llm.models[1].__class__ = Breaks
    params = replace(params, threshold=0.0)
    [failed] = llm.generate_batch([PROMPT], params)
    assert failed.finish_reason == "error" and "broken" in str(failed.error)
    whole = llm.generate(PROMPT, replace(params, on_assistant_error="base"))
    assert whole.completion_tokens == 60 and any(step.fault for step in whole.steps)
    assert b"".join(step.data or b"" for step in whole.steps) == data(whole)
    with pytest.raises(CollmError, match="nudging is defined for 2 models"):
        system(3).generate(PROMPT, params)


def test_a_failing_assistant(pair: CollaborativeLM) -> None:
    params = SamplingParams(max_tokens=20, deferral="always")
    llm = system()

    class Breaks(LocalModel):
        count = 0

        def predict(self, queries: Any) -> Any:
            Breaks.count += 1
            if Breaks.count % 3 == 2:
                raise RuntimeError("broken")
            return super().predict(queries)

    llm.models[1].__class__ = Breaks
    [failed] = llm.generate_batch([PROMPT], params)
    assert failed.finish_reason == "error" and "broken" in str(failed.error)
    whole = llm.generate(PROMPT, replace(params, on_assistant_error="base"))
    assert whole.completion_tokens == 20 and {step.author for step in whole.steps} == {0, 1}
    assert any(step.fault for step in whole.steps)
    assert [step.data for step in whole.steps] == llm.sharing.cuts.chunks(data(whole))  # type: ignore[union-attr]


def test_an_assistant_that_lacks_tokens_for_a_character() -> None:
    """Without byte fallback, `<unk>`: such a text is refused in training; in writing the assistant drops out of it."""
    own = [byte_level("gpt2", 400), sentencepiece_like(fallback=False)]
    llm = system(own=own)
    assert llm.sharing is not None
    poor = llm.sharing.codecs[1]
    assert poor.encode("The total is 12") and poor.pieces[own[1].convert_tokens_to_ids("<unk>")] is None
    with pytest.raises(NotItsText, match="does not give .* back byte for byte"):
        poor.encode("привет")
    # What the base writes at random is soon beyond it.
    params = SamplingParams(max_tokens=40, deferral="random", threshold=0.3, seed=2)
    [failed] = llm.generate_batch([PROMPT], params)
    assert failed.finish_reason == "error" and "one has no tokens for" in str(failed.error)
    whole = llm.generate(PROMPT, replace(params, on_assistant_error="base"))
    assert whole.completion_tokens == 40 and any("no tokens for" in (step.fault or "") for step in whole.steps)


def test_a_beginning_of_text_on_one_side(pair: CollaborativeLM) -> None:
    """A model whose tokenizer puts BOS before a text reads it, the other does not; the completion has none."""
    own = tokenizers()[:2]
    own[1].backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", own[1].bos_token_id)]
    )
    llm = system(own=own)
    params = SamplingParams(max_tokens=24, deferral="random", threshold=0.5, seed=1)
    prompts = [formatter.prompt("12 + 30 =") for formatter in llm.formatters]
    assert prompts[1] == (own[1].bos_token_id, *own[1].encode("12 + 30 =", add_special_tokens=False))
    assert own[0].bos_token_id not in prompts[0]
    generation = llm.generate("12 + 30 =", params)
    same = TokenPrompt(tuple(prompts))
    assert generation.steps == llm.generate(same, params).steps and {0, 1} == {s.author for s in generation.steps}
    assert generation.steps != pair.generate("12 + 30 =", params).steps, "the assistant sees another prompt"
    with pytest.raises(CollmError, match="given for 1 of 2 models"):
        llm.generate(TokenPrompt(tuple(prompts[:1])), params)


def test_tools_write_single_tokens() -> None:
    own = [make_tokenizer(285), make_tokenizer(340)]
    base = local(own[0], "base", 0, 2)
    assert base.head is not None
    with torch.no_grad():
        base.head.bias[0] = 100.0  # the calculator is asked first
    models: list[LanguageModel] = [base, Calculator(own[0]), local(own[1], "one", 1)]
    formatters = [Formatter(own[0]), Formatter(own[0]), Formatter(own[1])]
    cuts = cuts_between([f.tokenizer for f in formatters], ["base", "calculator", "one"])
    assert cuts is not None
    info = CheckpointInfo(cuts=cuts.fingerprint)
    llm = CollaborativeLM(models, formatters, info, sharing=share(models, formatters, info, True))
    generation = llm.generate("12 + 30 = ", SamplingParams(max_tokens=6, deferral="always"))
    asked = llm.generate("12 + 30 = ", SamplingParams(max_tokens=6), policy=Threshold(-100.0))
    # Whoever has the larger gate is asked first; the tool is silent but for the digits.
    for found in (generation, asked):
        assert {step.author for step in found.steps} <= {0, 1, 2}
        for step in found.steps:
            assert step.author != 1 or step.data in (b"4", b"2")
    digits = [step for step in generation.steps if step.author == 1]
    assert [step.data for step in digits] == [b"4", b"2"] and digits[0].log_prob == 0.0


def test_a_tool_has_to_end_with_what_stands_alone() -> None:
    """Letters do not: what a tool writes could not be told from the beginning of another word."""

    class Clock(Tool):
        def write(self, token_ids: Sequence[int]) -> int | None:
            rest = continued(self.line(token_ids), "It is", " 12:30")
            return None if rest is None else self.first_token(rest)

    class TrueClock(Clock):
        ends_in = b"0123456789"

    def continued(line: str, before: str, answer: str) -> str | None:
        _, found, told = line.rpartition(before)
        return answer[len(told) :] if found and told != answer and answer.startswith(told) else None

    own = [make_tokenizer(285), make_tokenizer(340)]
    base = local(own[0], "base", 0, 2)
    assert base.head is not None
    with torch.no_grad():
        base.head.bias[0] = 100.0
    formatters = [Formatter(own[0]), Formatter(own[0]), Formatter(own[1])]
    cuts = cuts_between(own, ["base", "one"])
    assert cuts is not None
    info = CheckpointInfo(cuts=cuts.fingerprint)

    def shared(tool: Tool) -> CollaborativeLM:
        models: list[LanguageModel] = [base, tool, local(own[1], "one", 1)]
        return CollaborativeLM(models, formatters, info, sharing=share(models, formatters, info, True))

    with pytest.raises(CollmError, match="clock writes token by token, and may end with 'A', .* let its `ends_in` say"):
        shared(Clock(own[0], "clock"))
    generation = shared(TrueClock(own[0], "clock")).generate(
        "It is ", SamplingParams(max_tokens=6), policy=Threshold(-9.0)
    )
    assert b"".join(step.data or b"" for step in generation.steps if step.author == 1) == b"12:30"
    grouped = [byte_level("llama3", 460, seed=seed) for seed in (0, 1)]
    table = cuts_between(grouped, ["base", "one"])
    assert table is not None
    with pytest.raises(CollmError, match=r"calculator .* may end with '\d', and tokens of these models hold '\d\d'"):
        require_free_tools(table, [Calculator(grouped[0])])
    # Even where no token holds two bytes a tool has to say what it ends with: a character may go on.
    bytes_alone = Cuts.of([[bytes([byte]) for byte in range(256)]])
    require_free_tools(bytes_alone, [TrueClock(own[0], "clock")])
    with pytest.raises(CollmError, match=r"clock .* may end with '\\x80', and a character may go on behind it: "):
        require_free_tools(bytes_alone, [Clock(own[0], "clock")])


@pytest.mark.parametrize("setting", [{"deferral": "compose"}, {"stop_token_ids": (5,)}, {"speculative": True}], ids=str)
def test_what_is_refused_starts_no_engine(setting: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collm.llm.shared_engine.Engine", lambda *_, **__: pytest.fail("an engine was started"))
    with pytest.raises(CollmError, match="different"):
        system(2).stream(PROMPT, **setting)


def test_refusals(pair: CollaborativeLM) -> None:
    for deferral in ("compose", "mixture", "contrastive", "confident", "proxy_tuning"):
        # Proxy tuning is defined for three models.
        with pytest.raises(CollmError, match=f"{deferral} needs models with one tokenizer, and these have different"):
            (system(3) if deferral == "proxy_tuning" else pair).generate(PROMPT, SamplingParams(deferral=deferral))
    with pytest.raises(CollmError, match="give stop, the text"):
        pair.generate(PROMPT, SamplingParams(stop_token_ids=(5,)))
    with pytest.raises(CollmError, match="speculative drafts tokens .* leave it out"):
        pair.generate(PROMPT, speculative=True)
    quiet = [pair.generate(PROMPT, max_tokens=4, speculative=said) for said in (None, False)]
    assert quiet[0].token_ids == quiet[1].token_ids and len(quiet[0].token_ids) == 4
    own = tokenizers()[:2]
    models: list[LanguageModel] = [local(own[0], "base", 0, 1), local(own[1], "one", 1)]
    formatters = [Formatter(t) for t in own]
    with pytest.raises(CollmError, match="the gate was trained for models that take turns at other places"):
        share(models, formatters, CheckpointInfo(cuts="0123"), True)
    with pytest.raises(CollmError, match="take turns at every token"):
        share(models, formatters, CheckpointInfo(), True)
    from collm.models.fake import FakeModel

    with pytest.raises(CollmError, match="cannot say which of its tokens may open a chunk"):
        share([models[0], FakeModel("fake", 400)], formatters, CheckpointInfo(), False)


def test_text_with_few_cuts_is_told_of_and_read_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chinese: bytes of its characters collide, so that a line is but a few chunks."""
    text = "世界你好，你好世界。世界！" * 3
    own = [byte_level(), byte_level("none", 420, more=[text])]
    cuts = cuts_between(own, NAMES[:2])
    assert cuts is not None
    codecs = [ByteCodec(tokenizer, cuts, name=name) for tokenizer, name in zip(own, NAMES, strict=False)]
    told, prose = (chunking(codecs, cuts, [each]) for each in (text, SAMPLES["prose"]))
    assert told.at_cut < 0.5 < prose.at_cut and told.refused == 0 and prose.doubt is None
    assert told.doubt is not None and "of the base's tokens start at a cut" in told.doubt
    monkeypatch.setattr("collm.llm.sharing.SAMPLES", {"mine": text})
    with pytest.warns(UserWarning, match="base, one: only .* start at a cut"):
        share([local(t, n, z, None if z else 1) for z, (t, n) in enumerate(zip(own, NAMES, strict=False))],
              [Formatter(t) for t in own], CheckpointInfo(), False)  # fmt: skip
    with pytest.warns(UserWarning, match="x, y: only .* start at a cut"):
        tell_chunking(told, ["x", "y"], "mine")
    read = ChunkText([(1,), (2,)], codecs, cuts)
    read.chunks += cuts.chunks(text.encode())
    assert len(read.chunks) < len(text) / 2
    for model, codec in enumerate(codecs):
        assert codec.data(read.read(model).token_ids[1:]) == text.encode()
        assert list(read.views[model].token_ids[1:]) == codec.encode(text)
    llm = system(own=own)
    asked = SamplingParams(max_tokens=20, deferral="random", threshold=0.5, seed=1)
    generation = llm.generate(text, asked)
    assert generation.completion_tokens == 20 and generation.error is None


def test_chunks_beyond_the_limit_are_refused_by_name(pair: CollaborativeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they come up: as a pair is looked at, in scoring given texts, in writing; and none that is as long."""
    sharing = pair.sharing
    assert sharing is not None
    text = "return sum(values) / 12 привет, naïve café"
    base = pair.formatters[0].tokenizer
    prompts = (tuple(base.encode("a")), tuple(sharing.codecs[1].tokenizer.encode("a")))
    given = GivenText(prompts, tuple(base.encode(text)))
    longest = [
        max(len(codec.chunk_ids(chunk)) for chunk in sharing.cuts.chunks(text.encode())) for codec in sharing.codecs
    ]
    assert longest[0] != longest[1]
    least, most, who = min(longest), max(longest), NAMES[longest.index(max(longest))]
    monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", least)
    message = f"a chunk of {most} tokens of {who}, more than the {least}"
    found = chunking(sharing.codecs, sharing.cuts, [text])
    assert found.refused == 1 and found.why is not None and message in found.why
    assert str(found) == found.doubt == f"1 text cannot be used (the first: {found.why})", "and no share of nothing"
    with pytest.warns(UserWarning, match=f"x, y: 1 text cannot be used .*{message}"):
        tell_chunking(found, ["x", "y"])
    both = chunking(sharing.codecs, sharing.cuts, [text, "a b"])
    assert "start at a cut" in str(both) and both.doubt == found.doubt
    with pytest.raises(CollmError, match=message):
        list(chunk_likelihoods(pair.models, sharing, [given]))
    monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", most)
    assert chunking(sharing.codecs, sharing.cuts, [text]).refused == 0
    [likelihood] = chunk_likelihoods(pair.models, sharing, [given])

    # In writing. The longest of the own tokens of a chunk that each model writes by itself:
    written: list[int] = []
    close = ChunkText.close

    def noting(self: ChunkText, model: int, chunk: bytes) -> bool:
        written.append(len(self.written(model)))
        return close(self, model, chunk)

    monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", 256)
    monkeypatch.setattr(ChunkText, "close", noting)
    for deferral, name in (("never", "base"), ("always", "one")):
        params = SamplingParams(max_tokens=40, deferral=deferral)  # type: ignore[arg-type]
        written.clear()
        whole = pair.generate(PROMPT, params)
        limit = max(written[:-1])  # the last one was cut off
        monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", limit)
        assert pair.generate(PROMPT, params).text == whole.text and limit > 1
        monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", limit - 1)
        [failed] = pair.generate_batch([PROMPT], params)
        assert failed.finish_reason == "error"
        assert f"a chunk of {limit} tokens of {name}, more than the {limit - 1}" in str(failed.error)
        assert whole.text.startswith(failed.text) and failed.text != whole.text
        if name == "one":  # as with any failure of an assistant, the base may write in its place
            stood_in = pair.generate(PROMPT, replace(params, on_assistant_error="base"))
            assert stood_in.finish_reason == "length" and any("too few cuts" in (s.fault or "") for s in stood_in.steps)
        monkeypatch.setattr("collm.cuts.LONGEST_CHUNK", 256)


def test_the_end_of_a_context_ends_a_text() -> None:
    llm = system()
    bounded = CollaborativeLM(llm.models, llm.formatters, llm.info, max_model_len=45, sharing=llm.sharing)
    for deferral in ("never", "always"):
        generation = bounded.generate(PROMPT, SamplingParams(max_tokens=200, deferral=deferral))  # type: ignore[arg-type]
        assert generation.finish_reason == "length" and generation.error is None
        assert 5 < generation.completion_tokens < 200


@pytest.mark.parametrize("contexts", [(256, 60), (60, 256)])
def test_who_writes_alone_is_bounded_by_its_own_context(contexts: tuple[int, int]) -> None:
    """Not by one that is not asked; and it ends there, instead of failing."""
    llm = system(contexts=contexts)
    for number, (name, context) in enumerate(zip(NAMES, contexts, strict=False)):
        generation = llm.generate(PROMPT, SamplingParams(max_tokens=200), alone=name)
        # The last token is written, not read.
        room = context + 1 - len(llm.formatters[number].prompt(PROMPT))
        assert generation.finish_reason == "length" and generation.completion_tokens == min(200, room)


def test_likelihoods_are_those_of_the_chunks(pair: CollaborativeLM) -> None:
    """The log-probability of a text under the marginal, against scores of its chunks; alone, of its own tokens."""
    sharing = pair.sharing
    assert sharing is not None
    base, codec = pair.formatters[0].tokenizer, sharing.codecs[1]
    text = "Paris is the capital of 12 + 30 = 42\n\nx"
    given = GivenText((tuple(base.encode("a")), tuple(codec.tokenizer.encode("a"))), tuple(base.encode(text)))
    [found] = chunk_likelihoods(pair.models, sharing, [given])
    chunks = sharing.cuts.chunks(text.encode())
    total = 0.0
    left = ChunkText(given.prompts, sharing.codecs, sharing.cuts)
    for chunk in chunks:
        scores = []
        for model, own in enumerate(sharing.codecs):
            view, ids = left.read(model), own.chunk_ids(chunk)
            score, before = 0.0, left.last_byte
            for n, token_id in enumerate((*ids, 0)):
                last = before if n == 0 else chunk[-1]
                query = Query(
                    model, View([*view.token_ids, *ids[:n]]), len(view) + n, given=[token_id], last_bytes=[last]
                )
                [[answer]] = pair.models[model].predict([query])
                assert isinstance(answer, Answer) and answer.given_log_prob is not None
                score += answer.given_log_prob if n < len(ids) else answer.log_close
                score -= answer.log_close if n == 0 else 0.0
                if n == 0 and model == 0:
                    gate = answer.log_gate
            scores.append(score)
        assert gate is not None
        total += math.log(sum(math.exp(g + s) for g, s in zip(gate, scores, strict=True)))
        left.chunks.append(chunk)
    assert found.log_prob == pytest.approx(total, abs=1e-3) and found.tokens == len(given.completion)
    for model in (0, 1):
        [alone] = chunk_likelihoods(pair.models, sharing, [given], alone=model)
        ids = sharing.codecs[model].encode(text)
        query = Query.of([*given.prompts[model], *ids[:-1]], len(ids), model=model, given=ids)
        [answers] = pair.models[model].predict([query])
        assert alone.log_prob == pytest.approx(sum(a.given_log_prob for a in answers), abs=1e-3)  # type: ignore[union-attr]


def test_a_text_that_is_longer_than_a_context_is_scored_in_windows(pair: CollaborativeLM) -> None:
    """Each chunk once, whatever lies before; what closes one window is what opens the next."""
    sharing = pair.sharing
    assert sharing is not None
    text = "Paris is the capital of 12 + 30 = 42\n\nreturn x, " * 4 + "the end"
    begin, contexts = [(1, 2, 3), (4,)], [40, 25]
    windows = list(chunk_windows(sharing, begin, text, contexts))
    pieces = [sharing.codecs[0].data(window.completion) for window in windows]
    assert b"".join(pieces) == text.encode() and len(windows) > 3
    done = b""
    for number, (window, piece) in enumerate(zip(windows, pieces, strict=True)):
        read = tokens_read(sharing, window.completion)
        assert all(len(p) + n <= c for p, n, c in zip(window.prompts, read, contexts, strict=True))
        assert window.last_byte == (done[-1] if done else START)
        for prompt, codec, first in zip(window.prompts, sharing.codecs, begin, strict=True):
            assert prompt == first if not number else done.endswith(codec.data(prompt)) and codec.data(prompt)
        done += piece
    # The end of the text is behind as much of it as a context holds.
    assert any(len(p) + n == c for p, n, c in zip(windows[-1].prompts, read, contexts, strict=True))
    [whole] = chunk_windows(sharing, begin, text, [None, None])
    assert whole.prompts == tuple(begin) and sharing.codecs[0].data(whole.completion) == text.encode()
    # Where but one model writes, a window's likelihood is that of its tokens, closing factors at both ends.
    alone = system(gate=(0.0, -200.0))
    [found] = chunk_likelihoods(alone.models, sharing, windows[1:2])
    [prompt, _], ids, last = windows[1].prompts, windows[1].completion, [windows[1].last_byte]
    lasts = last + [START] * (len(ids) - 1) + [pieces[1][-1]]
    view = View([*prompt, *ids])
    [answers] = alone.models[0].predict([Query(0, view, len(view), len(ids) + 1, given=[*ids, 0], last_bytes=lasts)])
    assert all(isinstance(answer, Answer) for answer in answers)
    total = sum(a.given_log_prob for a in answers[:-1])  # type: ignore[union-attr, misc]
    total += answers[-1].log_close - answers[0].log_close  # type: ignore[union-attr]
    assert answers[0].log_close < -0.01, "something may go on there"  # type: ignore[union-attr]
    assert found.log_prob == pytest.approx(total, abs=1e-4)
    with pytest.raises(CollmError, match="is longer than a context"):
        list(chunk_windows(sharing, begin, "return" + " " * 60 + "x", [6, 4]))
