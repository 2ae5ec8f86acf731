"""LocalModel: whatever its caches hold, the answers are those of the twin that recomputes everything."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from collm.errors import CollmError
from collm.models.head import DeferralHead
from collm.models.kv_pool import SUPPORTED, supports
from collm.models.local import LocalModel
from collm.types import Answer, Fault, ForwardPass, Prediction, Query

TOLERANCE = 2e-4
"""Float32 sums in another order; the laws of the tiny models span tens of nats."""
WINDOW = 8

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


def close(found: Answer, expected: Answer) -> bool:
    assert isinstance(found, Prediction) and isinstance(expected, Prediction)
    assert found.log_probs.shape == expected.log_probs.shape
    if (found.log_gate is None) != (expected.log_gate is None):
        return False
    gates = torch.tensor(found.log_gate or ()), torch.tensor(expected.log_gate or ())
    return torch.allclose(found.log_probs, expected.log_probs, atol=TOLERANCE) and torch.allclose(*gates, atol=1e-4)


@pytest.mark.parametrize("kind", sorted(SUPPORTED))
def test_cached_equals_recomputed(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Random traffic: growing, rolled-back, forgotten, repeated and ragged sequences, several positions at once."""
    model, rng = tiny(kind), random.Random(0)
    head = DeferralHead(32, 2)
    torch.nn.init.normal_(head.weight, std=0.1)
    cached = LocalModel(model, tiny_tokenizer, head, num_slots=5)
    plain = LocalModel(model, tiny_tokenizer, head, cache=False)
    assert cached._cache is not None and plain._cache is None

    def some(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(320) for _ in range(count))

    sequences = [some(rng.randrange(1, 40)) for _ in range(7)]
    for _ in range(12):
        members = rng.sample(range(len(sequences)), rng.randrange(1, 8))
        queries = []
        for i in members:
            old = sequences[i]
            roll_back = rng.random() < 0.3
            sequences[i] = (old[: rng.randrange(len(old)) + 1] if roll_back else old) + some(rng.choice([0, 1, 1, 5]))
            queries.append(Query(0, sequences[i], min(rng.choice([1, 1, 3]), len(sequences[i]))))
        for found, expected in zip(cached.predict(queries), plain.predict(queries), strict=True):
            assert len(found) == len(expected)
            assert all(close(a, b) for a, b in zip(found, expected, strict=True))
    assert max(map(len, sequences)) > 2 * WINDOW


def test_agrees_with_transformers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama")
    ids = tuple(range(5, 25))
    [answers] = LocalModel(model, tiny_tokenizer).predict([Query(0, ids, 4)])
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -4:, : len(tiny_tokenizer)]
    for answer, expected in zip(answers, logits.log_softmax(dim=-1), strict=True):
        assert isinstance(answer, Prediction)
        assert torch.allclose(answer.log_probs, expected, atol=TOLERANCE)
        assert answer.top_token_id == int(expected.argmax()) and answer.log_gate is None
        assert abs(float(answer.log_probs.exp().sum()) - 1) < 1e-4  # padded rows are cut before normalising


def test_answers_do_not_depend_on_batch_mates(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=3)
    queries = [Query(0, tuple(range(3, 3 + n))) for n in (1, 30, 7, 2, 19)]  # more than there are slots
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
    counting, model = Counting(network), LocalModel(network, tiny_tokenizer)
    ids = tuple(range(3, 43))
    model.predict([Query(0, ids)])
    assert counting.tokens == 40
    model.predict([Query(0, (*ids, 7))])
    assert counting.tokens == 41
    model.predict([Query(0, (*ids, 7, 8, 9, 10))])  # it catches up on what it missed in one pass
    assert counting.tokens == 44
    model.predict([Query(0, (*ids, 11))])  # a rollback
    assert counting.tokens == 45


def test_an_interrupted_pass_leaves_no_wrong_cache(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = tiny("llama")
    model = LocalModel(network, tiny_tokenizer)
    first, second = tuple(range(3, 33)), (*range(3, 23), 50, 51, 52)
    model.predict([Query(0, first)])

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    # The first layer has already overwritten its keys when the second is interrupted.
    handle = network.get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.predict([Query(0, second)])
    handle.remove()
    [[found]] = model.predict([Query(0, first)])
    [[expected]] = LocalModel(network, tiny_tokenizer, cache=False).predict([Query(0, first)])
    assert close(found, expected)


def reasons(answers: list[list[Answer]]) -> list[list[str]]:
    """Why each prefix of each query got no answer; empty where it did."""
    return [[answer.reason if isinstance(answer, Fault) else "" for answer in each] for each in answers]


@pytest.mark.parametrize("cache", [True, False])
def test_a_text_that_is_too_long_fails_alone(cache: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama", max_position_embeddings=16), tiny_tokenizer, name="small", cache=cache)
    found = model.predict([Query(0, tuple(range(17)), 2), Query(0, tuple(range(16)))])
    message = "small: 17 tokens do not fit into its context of 16; shorten the prompt"
    assert reasons(found) == [[message, message], [""]]


@pytest.mark.parametrize("cache", [True, False])
def test_nan_fails_the_texts_concerned(cache: bool, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    network = tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        network.get_input_embeddings().weight[7] = torch.nan
    model = LocalModel(network, tiny_tokenizer, name="broken", cache=cache, num_slots=2)
    plain = LocalModel(network, tiny_tokenizer, cache=False)
    good, shared = tuple(range(10, 30)), tuple(range(30, 60))
    queries = [Query(0, good), Query(0, (*shared, 7, 8)), Query(0, (*shared, 7, 9)), Query(0, (*shared, 9))]
    for _ in range(2):
        found = model.predict(queries)
        assert [bool(reason) for [reason] in reasons(found)] == [False, True, True, False]
        told = "broken: the predictions after position 31 are not numbers (NaN, as all from position 30 on: token 7); "
        assert reasons(found)[1][0].startswith(told)
        assert all(close(found[i][0], plain.predict([queries[i]])[0][0]) for i in (0, 3))
    # The next texts in these slots are shorter than what stood there, and longer than one another: masks are in use.
    for stored in stored_tensors(model):
        assert not bool(stored.isnan().any())
    later = [Query(0, (4, 5)), Query(0, tuple(range(10, 20)))]
    for [a], [b] in zip(model.predict(later), plain.predict(later), strict=True):
        assert close(a, b)


def stored_tensors(model: LocalModel) -> list[torch.Tensor]:
    pairs = [] if model._cache is None else model._cache.pool._stored
    return [tensor for pair in pairs if pair is not None for tensor in pair]


def test_a_nan_gate_is_a_fault(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    head = DeferralHead(32, 1)
    torch.nn.init.constant_(head.bias, torch.nan)
    [[reason]] = reasons(LocalModel(tiny("llama"), tiny_tokenizer, head).predict([Query(0, (1, 2))]))
    assert "not numbers" in reason


def test_a_model_smaller_than_the_tokenizer_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CollmError, match="knows 300 tokens and the tokenizer"):
        LocalModel(tiny("llama", vocab_size=300), tiny_tokenizer)


def test_tokens_that_one_model_does_not_know_have_probability_zero(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama", vocab_size=320), tiny_tokenizer, name="small", vocab_size=325)
    [[answer]] = model.predict([Query(0, (1, 2))])
    assert isinstance(answer, Prediction)
    assert answer.log_probs.shape == (325,) and bool(answer.log_probs[320:].isneginf().all())
    found = model.predict([Query(0, (1, 321)), Query(0, (1, 2, 3)), Query(0, (*range(30), 321, 4), 2)])
    message = "small: token 321 lies beyond the 320 tokens that the model knows; give the tokenizer that belongs to it"
    assert reasons(found) == [[message], [""], [message, message]]


def test_unknown_architectures_are_recomputed_with_a_warning(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 330, "initializer_range": 0.3}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **settings)).eval()
    with pytest.warns(UserWarning, match="gpt2 model is not supported"):
        model = LocalModel(network, tiny_tokenizer)
    queries = [Query(0, tuple(range(3, 3 + n))) for n in (5, 9)]
    with torch.inference_mode():
        for query, [answer] in zip(queries, model.predict(queries), strict=True):
            logits = network(torch.tensor([query.token_ids])).logits[0, -1, : len(tiny_tokenizer)]
            assert isinstance(answer, Prediction)
            assert torch.allclose(answer.log_probs, logits.log_softmax(dim=-1), atol=TOLERANCE)


def test_rope_that_depends_on_the_length_is_not_cached() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert supports(tiny("llama"))
    assert not supports(tiny("llama", rope_parameters=rope))


def test_bfloat16_answers_are_float32_and_near(tiny_model: Callable[..., PreTrainedModel]) -> None:
    from conftest import make_tokenizer

    tokenizer, network = make_tokenizer(), tiny_model("llama", initializer_range=0.05)
    query = Query(0, tuple(range(3, 30)))
    [[exact]] = LocalModel(network, tokenizer).predict([query])
    [[rough]] = LocalModel(network.to(torch.bfloat16), tokenizer).predict([query])
    assert isinstance(exact, Prediction) and isinstance(rough, Prediction)
    assert rough.log_probs.dtype == torch.float32
    # bfloat16 keeps 8 bits: two layers of it move these log-probabilities by a few hundredths.
    assert torch.allclose(exact.log_probs, rough.log_probs, atol=0.1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_bfloat16_cached_is_near_recomputed(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Batched and cached, sums are rounded in another order: to 8 bits, in two layers."""
    network, rng = tiny(kind, initializer_range=0.05).to(torch.bfloat16), random.Random(0)
    cached, plain = LocalModel(network, tiny_tokenizer), LocalModel(network, tiny_tokenizer, cache=False)
    texts = [tuple(rng.randrange(320) for _ in range(n)) for n in (3, 20, 21, 60)]
    for _ in range(4):
        texts = [(*ids, *(rng.randrange(320) for _ in range(rng.choice([1, 1, 4])))) for ids in texts]
        queries = [Query(0, ids, 2) for ids in texts]
        for found, expected in zip(cached.predict(queries), plain.predict(queries), strict=True):
            for a, b in zip(found, expected, strict=True):
                assert isinstance(a, Prediction) and isinstance(b, Prediction)
                assert torch.allclose(a.log_probs, b.log_probs, atol=0.05)


def test_reserve_changes_the_number_of_slots(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(tiny("llama"), tiny_tokenizer, num_slots=2)
    queries = [Query(0, (n, 5, 6)) for n in range(4)]
    expected = model.predict(queries)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.reserve(4)
    assert all(close(a, b) for [a], [b] in zip(model.predict(queries), expected, strict=True))


def test_every_pass_is_told(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    told: list[ForwardPass] = []
    model = LocalModel(tiny("llama"), tiny_tokenizer, on_pass=told.append)
    model.predict([Query(0, tuple(range(20))), Query(0, (50, 51, 52))])
    model.predict([Query(0, (*range(20), 4)), Query(0, (50, 51, 52, 53, 54), 2)])
    assert [(done.rows, done.width, done.tokens, done.length) for done in told] == [(2, 20, 23, 20), (2, 2, 3, 21)]
    assert all(done.seconds > 0 for done in told)
    twin = LocalModel(model.model, tiny_tokenizer, cache=False, on_pass=told.append)
    twin.predict([Query(0, (1, 2, 3))])
    assert (told[-1].rows, told[-1].width, told[-1].tokens, told[-1].length) == (1, 3, 3, 3)
