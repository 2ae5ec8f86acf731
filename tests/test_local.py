"""LocalModel: whatever its caches hold, the answers are those of the twin that recomputes everything."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.head import DeferralHead
from collm.models.kv_pool import may_support
from collm.models.local import LocalModel
from collm.types import ForwardPass
from collm.values import GREEDY, Answer, Draw, Fault, Query, Reply
from collm.views import Text, View

TOLERANCE = 2e-4
"""Float32 sums in another order; the laws of the tiny models span tens of nats."""
WINDOW = 8

POOLED = (
    "arcee cohere cohere2 exaone4 gemma gemma2 gemma3_text glm glm4 granite granitemoe llama mistral mixtral olmo "
    "olmo2 olmo3 olmoe phi phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2"
).split()
"""Architectures that must not be recomputed; any other that agrees with a plain pass as it is loaded is served, too."""

SETTINGS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_implementation": "eager",
    },
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma": {"head_dim": 8},
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def tiny(kind: str, **overrides: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {
        "vocab_size": 330,  # ten padded rows beyond the tokenizer
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **SETTINGS.get(kind, {}),
        **overrides,
    }
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    return model.eval()


def law(reply: Reply) -> torch.Tensor:
    assert isinstance(reply, Answer) and reply.law is not None
    return reply.law


def close(found: Reply, expected: Reply) -> bool:
    """Answers to queries that asked for the law."""
    assert isinstance(found, Answer) and isinstance(expected, Answer)
    assert law(found).shape == law(expected).shape
    if (found.log_gate is None) != (expected.log_gate is None):
        return False
    gates = torch.tensor(found.log_gate or ()), torch.tensor(expected.log_gate or ())
    told = (torch.tensor([each.top_log_prob, each.entropy]) for each in (found, expected))
    return (
        torch.allclose(law(found), law(expected), atol=TOLERANCE)
        and torch.allclose(*gates, atol=1e-4)
        and torch.allclose(*told, atol=1e-3)
    )


def ask(ids: tuple[int, ...], num_last: int = 1) -> Query:
    return Query.of(ids, num_last, law=True)


def at_end(view: View, num_last: int = 1) -> Query:
    """About a text that goes on: only the handle tells what of it is known."""
    return Query(0, view, len(view), num_last, law=True)


def rewrite(text: Text, ids: tuple[int, ...]) -> None:
    """Make `ids` of a text, by taking back what differs and appending the rest."""
    old, start = text.views[0].token_ids, text.views[0].prompt_length
    kept = next((i for i, (a, b) in enumerate(zip(old, ids, strict=False)) if a != b), min(len(old), len(ids)))
    assert kept >= start
    text.rewind(kept - start)
    for token_id in ids[kept:]:
        text.append(token_id)


@pytest.mark.parametrize("kind", POOLED)
def test_cached_equals_recomputed(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Random traffic: growing, taken back, ended, repeated and ragged texts, several positions at once."""
    model, rng = tiny(kind), random.Random(0)
    head = DeferralHead(32, 2)
    torch.nn.init.normal_(head.weight, std=0.1)
    cached = LocalModel(model, tiny_tokenizer, head, num_slots=5)
    plain = LocalModel(model, tiny_tokenizer, head, cache=False)
    assert cached._cache is not None and plain._cache is None
    longest = 0
    for queries in traffic(cached, rng, law=True):
        longest = max(longest, *(query.length for query in queries))
        for found, expected in zip(cached.predict(queries), plain.predict(queries), strict=True):
            assert len(found) == len(expected)
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert longest > 2 * WINDOW


def traffic(model: LocalModel, rng: random.Random, *, rounds: int = 12, law: bool = False) -> Iterator[list[Query]]:
    """Queries about texts that grow, are taken back, end and begin anew with what others held."""

    def some(count: int) -> list[int]:
        return [rng.randrange(320) for _ in range(count)]

    def drawn() -> Draw:
        return Draw(rng.randrange(99), 0, rng.choice([0.0, 1.0]), rng.choice([1.0, 0.8]), rng.choice([0, 5]))

    texts = [Text([some(rng.randrange(1, 40))]) for _ in range(7)]
    for _ in range(rounds):
        members = rng.sample(range(len(texts)), rng.randrange(1, 8))
        queries = []
        for i in members:
            if rng.random() < 0.1:  # it ends; another one begins with some of it
                ended = texts[i].views[0]
                model.release(ended)
                texts[i] = Text([ended.token_ids[: rng.randrange(len(ended)) + 1]])
            if rng.random() < 0.3:
                texts[i].rewind(rng.randrange(texts[i].length + 1))
            for token_id in some(rng.choice([0, 1, 1, 5])):
                texts[i].append(token_id)
            view = texts[i].views[0]
            length = len(view) if rng.random() < 0.8 else rng.randrange(len(view)) + 1
            num_last, draw = min(rng.choice([1, 1, 3]), length), GREEDY if law else drawn()
            queries.append(Query(0, view, length, num_last, draw, law=law))
        yield queries


def test_agrees_with_transformers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    ids = tuple(range(5, 25))
    [answers] = LocalModel(model, tiny_tokenizer).predict([ask(ids, 4)])
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -4:, : len(tiny_tokenizer)]
    for answer, expected in zip(answers, logits.log_softmax(dim=-1), strict=True):
        assert isinstance(answer, Answer)
        assert torch.allclose(law(answer), expected, atol=TOLERANCE)
        assert answer.token_id == answer.top_token_id == int(expected.argmax()) and answer.log_gate is None
        assert answer.log_prob == answer.top_log_prob == pytest.approx(float(expected.max()), abs=TOLERANCE)
        assert answer.entropy == pytest.approx(-float((expected.exp() * expected).sum()), abs=1e-3)
        assert abs(float(law(answer).exp().sum()) - 1) < 1e-4  # padded rows are cut before normalising


def test_answers_do_not_depend_on_batch_mates(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=3)
    queries = [ask(tuple(range(3, 3 + n))) for n in (1, 30, 7, 2, 19)]  # more than there are slots
    together = model.predict(queries)
    for query, [answer] in zip(queries, together, strict=True):
        [[alone]] = LocalModel(model.model, tiny_tokenizer).predict([query])
        assert close(answer, alone)
    assert model.predict([]) == []


class Counting:
    """Counts the tokens that go through a model's embedding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, module: object, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        self.tokens += inputs[0].numel()


def test_only_missing_tokens_are_computed(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer)
    counting = Counting(network)  # from now on: loading has tried the pool out
    ids = tuple(range(3, 43))
    text = Text([ids])
    [view] = text.views
    counted = counting.tokens
    for tokens, computed in (((), 40), ((7,), 1), ((7, 8, 9, 10), 3), ((11,), 1)):
        # It catches up on what it missed in one pass; the last is a rollback.
        rewrite(text, (*ids, *tokens))
        assert model.missing(at_end(view)) == computed
        model.predict([at_end(view)])
        assert counting.tokens - counted == computed
        counted = counting.tokens


def test_an_interrupted_pass_leaves_no_wrong_cache(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer)
    first, second = tuple(range(3, 33)), (*range(3, 23), 50, 51, 52)
    text = Text([first[:10]])
    rewrite(text, first)
    model.predict([at_end(text.views[0])])
    rewrite(text, second)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    # The first layer has already overwritten its keys when the second is interrupted.
    handle = network.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.predict([at_end(text.views[0])])
    handle.remove()
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    for ids in (first, second):
        rewrite(text, ids)
        [[found]] = model.predict([at_end(text.views[0])])
        [[expected]] = plain.predict([ask(ids)])
        assert close(found, expected)


def reasons(answers: list[list[Reply]]) -> list[list[str]]:
    """Why each prefix of each query got no answer; empty where it did."""
    return [[answer.reason if isinstance(answer, Fault) else "" for answer in each] for each in answers]


@pytest.mark.parametrize("cache", [True, False])
def test_a_text_that_is_too_long_fails_alone(cache: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama", max_position_embeddings=16), tiny_tokenizer, name="small", cache=cache)
    found = model.predict([ask(tuple(range(17)), 2), ask(tuple(range(16)))])
    message = "small: 17 tokens do not fit into its context of 16; shorten the prompt"
    assert reasons(found) == [[message, message], [""]]


@pytest.mark.parametrize("cache", [True, False])
def test_nan_fails_the_texts_concerned(cache: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[7] = torch.nan
    model = LocalModel(network, tiny_tokenizer, name="broken", cache=cache, num_slots=2)
    assert (model._cache is not None) == cache
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    good, shared = tuple(range(10, 30)), tuple(range(30, 60))
    queries = [ask(good), ask((*shared, 7, 8)), ask((*shared, 7, 9)), ask((*shared, 9))]
    for _ in range(2):
        found = model.predict(queries)
        assert [bool(reason) for [reason] in reasons(found)] == [False, True, True, False]
        told = "broken: the predictions after position 31 are not numbers (NaN); its weights are damaged"
        assert reasons(found)[1][0].startswith(told)
        assert all(close(found[i][0], plain.predict([queries[i]])[0][0]) for i in (0, 3))
    # The next texts in these slots are shorter than what stood there, and longer than one another: masks are in use.
    for stored in stored_tensors(model):
        assert not bool(stored.isnan().any())
    later = [ask((4, 5)), ask(tuple(range(10, 20)))]
    for [a], [b] in zip(model.predict(later), plain.predict(later), strict=True):
        assert close(a, b)


def stored_tensors(model: LocalModel) -> list[torch.Tensor]:
    pairs = [] if model._cache is None else model._cache.pool._stored
    return [tensor for pair in pairs if pair is not None for tensor in pair]


def test_a_nan_gate_is_a_fault(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    head = DeferralHead(32, 1)
    torch.nn.init.constant_(head.bias, torch.nan)
    [[reason]] = reasons(LocalModel(tiny("llama"), tiny_tokenizer, head).predict([ask((1, 2))]))
    assert "not numbers" in reason


def test_a_model_smaller_than_the_tokenizer_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="knows 300 tokens and the tokenizer"):
        LocalModel(tiny("llama", vocab_size=300), tiny_tokenizer)


def test_tokens_that_one_model_does_not_know_have_probability_zero(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama", vocab_size=320), tiny_tokenizer, name="small", vocab_size=325)
    [[answer]] = model.predict([ask((1, 2))])
    assert law(answer).shape == (325,) and bool(law(answer)[320:].isneginf().all())
    found = model.predict([ask((1, 321)), ask((1, 2, 3)), ask((*range(30), 321, 4), 2)])
    message = "small: token 321 lies beyond the 320 tokens that the model knows; give the tokenizer that belongs to it"
    assert reasons(found) == [[message], [""], [message, message]]


def test_unknown_architectures_are_recomputed_with_a_warning(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 330, "initializer_range": 0.3}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).eval()
    with pytest.warns(UserWarning, match="mamba model is not supported"):
        model = LocalModel(network, tiny_tokenizer)
    queries = [ask(tuple(range(3, 3 + n))) for n in (5, 9)]
    with torch.inference_mode():
        for query, [answer] in zip(queries, model.predict(queries), strict=True):
            logits = network(torch.tensor([query.view.token_ids])).logits[0, -1, : len(tiny_tokenizer)]
            assert torch.allclose(law(answer), logits.log_softmax(dim=-1), atol=TOLERANCE)


def test_rope_that_depends_on_the_length_is_not_cached() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert may_support(tiny("llama"))
    assert not may_support(tiny("llama", rope_parameters=rope))


def test_bfloat16_answers_are_float32_and_near(tiny_model: Callable[..., PreTrainedModel]) -> None:
    from conftest import make_tokenizer

    tokenizer, network = make_tokenizer(), tiny_model("llama", initializer_range=0.05)
    query = ask(tuple(range(3, 30)))
    [[exact]] = LocalModel(network, tokenizer).predict([query])
    [[rough]] = LocalModel(network.to(torch.bfloat16), tokenizer).predict([query])
    assert law(rough).dtype == torch.float32
    # bfloat16 keeps 8 bits: two layers of it move these log-probabilities by a few hundredths.
    assert torch.allclose(law(exact), law(rough), atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_bfloat16_cached_is_near_recomputed(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Batched and cached, sums are rounded in another order: to 8 bits, in two layers."""
    network, rng = tiny(kind, initializer_range=0.05).to(torch.bfloat16), random.Random(0)
    cached, plain = LocalModel(network, tiny_tokenizer), LocalModel(network, tiny_tokenizer, cache=False)
    texts = [Text([[rng.randrange(320) for _ in range(n)]]) for n in (3, 20, 21, 60)]
    for _ in range(4):
        for text in texts:
            for _ in range(rng.choice([1, 1, 4])):
                text.append(rng.randrange(320))
        queries = [at_end(text.views[0], 2) for text in texts]
        for found, expected in zip(cached.predict(queries), plain.predict(queries), strict=True):
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(law(a), law(b), atol=0.05)


def test_reserve_changes_the_number_of_slots(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=2)
    queries = [ask((n, 5, 6)) for n in range(4)]
    expected = model.predict(queries)
    assert not model.fits([3] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.reserve(4)
    assert model.fits([3] * 4)
    assert all(close(a, b) for [a], [b] in zip(model.predict(queries), expected, strict=True))


def test_every_pass_is_told(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[ForwardPass] = []
    model = LocalModel(tiny("llama"), tiny_tokenizer, on_pass=told.append)
    texts = [Text([range(20)]), Text([(50, 51, 52)])]
    model.predict([at_end(text.views[0]) for text in texts])
    for text, more in zip(texts, ((4,), (53, 54)), strict=True):
        for token_id in more:
            text.append(token_id)
    model.predict([at_end(text.views[0], len(more)) for text, more in zip(texts, ((4,), (53, 54)), strict=True)])
    assert [(done.rows, done.width, done.tokens, done.length) for done in told] == [(2, 20, 23, 20), (2, 2, 3, 21)]
    assert all(done.seconds > 0 for done in told)
    twin = LocalModel(model.model, tiny_tokenizer, cache=False, on_pass=told.append)
    twin.predict([ask((1, 2, 3))])
    assert (told[-1].rows, told[-1].width, told[-1].tokens, told[-1].length) == (1, 3, 3, 3)


def test_what_is_asked_for_behind_a_prefix_is_answered(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Given tokens, the most probable ones, a draw; in one pass with queries that ask for something else."""
    network, ids = tiny("llama"), tuple(range(3, 33))
    for cache in (True, False):
        model = LocalModel(network, tiny_tokenizer, cache=cache)
        [expected, given, drawn, plain, read] = model.predict(
            [
                ask(ids, 3),
                Query(0, View(ids), 30, 3, given=(5, 319, 7), num_top=2),
                Query(0, View(ids), 30, 3, draw=Draw(seed=3, temperature=0.7)),
                Query(0, View(ids), 30, 3),
                Query(0, View(ids), 20, 0),
            ]
        )
        assert read == []
        for n, (right, *others) in enumerate(zip(expected, given, drawn, plain, strict=True)):
            probabilities = law(right)
            top = probabilities.topk(2)
            by_given, by_draw, without = (answer for answer in others if isinstance(answer, Answer))
            assert by_given.given_log_prob == pytest.approx(float(probabilities[(5, 319, 7)[n]]), abs=TOLERANCE)
            assert [token_id for token_id, _ in by_given.top] == top.indices.tolist()
            assert [each for _, each in by_given.top] == pytest.approx(top.values.tolist(), abs=TOLERANCE)
            assert by_draw.log_prob == pytest.approx(float(probabilities[by_draw.token_id]), abs=TOLERANCE)
            assert by_draw.top_token_id == without.token_id == without.top_token_id == int(probabilities.argmax())
            assert without.given_log_prob is None and by_draw.given_log_prob is None


class Dispatched(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("draw", [Draw(), Draw(3, 0, 0.8, 0.9, 5)], ids=["greedy", "sampled"])
def test_a_pass_costs_one_upload_and_one_download(
    kind: str, draw: Draw, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of texts of different lengths, with masks, draws and positions; on a GPU each of them waits."""
    model = LocalModel(tiny(kind), tiny_tokenizer)
    texts = [Text([range(3, 3 + n)]) for n in (5, 9, 9, 30)]

    def ask() -> None:
        model.predict([Query(0, text.views[0], len(text.views[0]), draw=draw) for text in texts])
        for text in texts:
            text.append(4)

    ask()
    downloads = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        usual = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, usual=usual: (downloads.append(1), usual(self))[1])
    with Dispatched() as seen:
        ask()
    # Numpy makes the noise on a CPU, and hands it over without a copy: that is no upload.
    assert seen.count["aten.lift_fresh.default"] - (draw.temperature > 0) == 1
    assert len(downloads) == 1 and not seen.count["aten._local_scalar_dense.default"]
