"""transformers' own caches: texts that share a pass, drafts that are taken back, switches of RoPE."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import make_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StableLmConfig,
    StableLmForCausalLM,
)

from collm.models.crop_cache import CropCache
from collm.models.local import LocalModel
from collm.types import ForwardPass
from collm.values import Answer, Fault, Query
from collm.views import Text

SWITCH = 24
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 256,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "original_max_position_embeddings": SWITCH,
        "factor": 6.4,
    },
}


def network(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    sizes = {"vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4}
    if kind == "longrope":
        return make_model("llama", **LONGROPE)
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(**sizes, n_layer=2)).eval()
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    return StableLmForCausalLM(StableLmConfig(**sizes, **shape)).eval()


def agrees(found: object, expected: object) -> bool:
    assert isinstance(found, Answer) and isinstance(expected, Answer)
    return found.top_token_id == expected.top_token_id and found.top_log_prob == pytest.approx(
        expected.top_log_prob, abs=1e-4
    )


@pytest.mark.parametrize("kind", ["stablelm", "bloom", "longrope"])
def test_what_is_kept_answers_as_what_is_recomputed(kind: str, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Texts of all lengths, together, with drafts and rollbacks, and beyond a switch of RoPE."""
    own, passes = network(kind), list[ForwardPass]()
    model = LocalModel(own, tiny_tokenizer, on_pass=passes.append)
    plain = LocalModel(own, tiny_tokenizer, cache=False)
    assert isinstance(model._cache, CropCache) and model._cache.together
    rng = random.Random(0)
    texts = [Text([[rng.randrange(300) for _ in range(length)]]) for length in (1, 3, 9, 17, 20)]
    for _ in range(14):
        asked = [Query(0, text.views[0], len(text.views[0])) for text in texts if rng.random() < 0.8]
        for found, expected in zip(model.predict(asked), plain.predict(asked), strict=True):
            assert agrees(found[0], expected[0])
        for text in texts:
            text.rewind(max(0, text.length - rng.randrange(3)) if rng.random() < 0.3 else text.length)
            for _ in range(rng.choice((1, 1, 1, 2))):
                text.append(rng.randrange(300))
    assert max(each.rows for each in passes) > 2
    for text in texts:
        model.release(text.views[0])


def test_decoding_texts_share_one_pass(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    issued: list[int] = []
    model = LocalModel(network("stablelm"), tiny_tokenizer)
    body: Any = model.model
    body.model.register_forward_pre_hook(
        lambda module, args, kwargs: issued.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    texts = [Text([[n + 1] * (4 + n)]) for n in range(6)]
    for _ in range(4):
        model.predict([Query(0, text.views[0], len(text.views[0])) for text in texts])
        for text in texts:
            text.append(7)
    assert issued == [1] * 6 + [6] * 3, "prompts of different lengths one by one, then all together"


def test_the_same_text_twice_is_no_shared_pass(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = LocalModel(network("stablelm"), tiny_tokenizer)
    view = Text([[5, 6, 7, 8]]).views[0]
    short, long = model.predict([Query(0, view, 3), Query(0, view, 4, 2)])
    assert agrees(short[0], long[0])


def test_memory_is_bounded(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """As a pool's: texts wait until there is room, ended ones make it, and what can never fit is refused."""
    own = network("stablelm")
    model = LocalModel(own, tiny_tokenizer, max_cache_tokens=40)
    plain = LocalModel(own, tiny_tokenizer, cache=False)
    assert model.max_cache_tokens == 40
    assert model.fits([20, 20]) and not model.fits([20, 21])
    texts = [Text([[n + 1] * 12]) for n in range(5)]
    asked = [Query(0, text.views[0], 12) for text in texts]
    for found, expected in zip(model.predict(asked), plain.predict(asked), strict=True):
        assert agrees(found[0], expected[0])
    one = LocalModel(own, tiny_tokenizer)
    one.predict(asked[:1])
    assert model.cache_bytes <= 40 / 12 * one.cache_bytes
    for text in texts:
        model.release(text.views[0])
    [[long], [short]] = model.predict([Query.of([7] * 41), Query.of([7] * 40)])
    assert isinstance(long, Fault) and "max_cache_tokens=40" in long.reason
    assert isinstance(short, Answer) and model.cache_bytes <= 40 / 12 * one.cache_bytes
    assert (LocalModel(own, tiny_tokenizer, max_cache_tokens=0.1).max_cache_tokens or 0) > 40
