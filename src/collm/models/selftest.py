"""Checks, where a model is loaded, that what collm makes of it is right: its caches against a plain pass."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from collm.models.attention import Row
from collm.models.backbone import hidden_states
from collm.models.crop_cache import CropCache
from collm.models.devices import input_device
from collm.models.kv_pool import KVPool, may_support
from collm.views import Text

_TEST_TOKENS = 24


@torch.inference_mode()
def pool_serves(lm: PreTrainedModel) -> bool:
    """Whether the KV pool gives this model the same hidden states as a plain pass: in two pieces, after a rollback,
    and for two texts at a time."""
    if not may_support(lm):
        return False
    ids, cut = _test_ids(lm), _TEST_TOKENS // 2
    expected = hidden_states(lm, torch.tensor([ids], device=input_device(lm)), use_cache=False)[0]
    usual = lm.config._attn_implementation
    pool = KVPool(lm)
    pool.resize([], 2, _TEST_TOKENS)
    try:
        pool.forward([Row(0, 0, cut + 2)], ids[: cut + 2])
        found, _ = pool.forward([Row(1, 0, 5), Row(0, cut, _TEST_TOKENS - cut)], ids[:5] + ids[cut:])
        serves = _same(found, torch.cat([expected[:5], expected[cut:]]), lm)
    except Exception:
        serves = False
    if not serves:
        lm.config._attn_implementation = usual
    return serves


@torch.inference_mode()
def crop_serves(lm: PreTrainedModel) -> bool:
    """The same of transformers' own cache, rolled back by `crop`."""
    ids, cut = _test_ids(lm), _TEST_TOKENS // 2
    expected = hidden_states(lm, torch.tensor([ids], device=input_device(lm)), use_cache=False)[0]
    text, cache = Text([ids[: cut + 2]]), CropCache(lm, 1)
    view = text.views[0]
    try:
        cache.read(view, cut + 2, 1)
        for token_id in (0, 1, 2):
            text.append(token_id)
        cache.read(view, len(view), 1)
        text.rewind(1)
        text.rewind(0)
        for token_id in ids[cut + 2 :]:
            text.append(token_id)
        return _same(cache.read(view, len(view), 4), expected[-4:], lm)
    except Exception:
        return False


def _test_ids(lm: PreTrainedModel) -> list[int]:
    vocab = int(lm.config.get_text_config().vocab_size)
    return [(7 + 13 * i * i) % vocab for i in range(_TEST_TOKENS)]


def _same(found: torch.Tensor, expected: torch.Tensor, lm: PreTrainedModel) -> bool:
    found, expected = found.float(), expected.float()
    # Weights that are not numbers are told where they matter, text by text.
    scale = float(expected.nan_to_num().abs().max().clamp_min(1e-6))
    tolerance = (1e-3 if lm.dtype == torch.float32 else 0.1) * scale
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)
