"""Checks, where a model is loaded, that what collm makes of it is right: its caches against a plain pass."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from collm.models.attention import Row
from collm.models.backbone import hidden_states, project
from collm.models.crop_cache import CropCache
from collm.models.devices import input_device
from collm.models.kv_pool import KVPool, may_support
from collm.models.laws import Asked
from collm.models.paged.lost import is_lost
from collm.models.paged.plan import CHUNK
from collm.models.paged.pool import PagedPool
from collm.models.paged.stepping import Stepper
from collm.models.prefix_cache import Pool
from collm.views import Text

_TEST_TOKENS = 24


@torch.inference_mode()
def pool_serves(lm: PreTrainedModel) -> KVPool | None:
    """The KV pool if it gives this model the same hidden states as a plain pass: in two pieces, after a rollback, and
    for two texts at a time."""
    if not may_support(lm):
        return None
    usual = lm.config._attn_implementation
    pool = KVPool(lm)
    pool.resize([], 2, _TEST_TOKENS)
    try:
        serves = _same(_in_pieces(lm, pool), _expected(lm), lm)
    except Exception:
        serves = False
    if not serves:
        lm.config._attn_implementation = usual
    return pool if serves else None


@torch.inference_mode()
def paged_serves(lm: PreTrainedModel, pool: PagedPool, stepper: Stepper, vocab_size: int) -> str | None:
    """None if blocks and graphs give this model what a plain pass does; else why they do not serve."""
    longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    # Long enough for several chunks of keys and for the tiles of a pass that reads, where the model reads so much.
    tokens = min(CHUNK + _TEST_TOKENS, longest or CHUNK + _TEST_TOKENS)
    ids, last = _test_ids(lm, tokens), _TEST_TOKENS // 2
    try:
        if not pool.layers or any(layer.heads != pool.layers[0].heads for layer in pool.layers):
            return "its layers store different things"
        pool.reserve(2, 2 * (tokens // pool.block + 1), tokens)
        stepper.compile()
        expected = _expected(lm, tokens)
        # At once, too: passes that read have kernels of their own, which may need what a GPU does not have.
        whole = pool.forward([Row(0, 0, tokens)], ids)[0]
        at_once = torch.cat([whole[:5], whole[tokens // 2 :]])
        if not all(_same(found, expected, lm) for found in (at_once, _in_pieces(lm, pool, tokens))):
            return "other hidden states than a plain pass"
        told = stepper.step([Row(0, tokens - last, last)], ids[-last:], [], Asked.of([]))
        laws = torch.log_softmax(project(lm, expected[-last:])[:, :vocab_size].float(), dim=-1).cpu()
        answers = list(told.answers(range(last)))
        if any(answer is None for answer in answers):
            return None if bool(laws.isnan().any()) else "predictions that are not numbers"
        found = torch.tensor([answer.top_log_prob for answer in answers if answer is not None])
        tolerance = 1e-2 if lm.dtype == torch.float32 else 0.3
        return None if torch.allclose(found, laws.max(-1).values, rtol=0.0, atol=tolerance) else "other predictions"
    except Exception as error:
        if is_lost(error):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _expected(lm: PreTrainedModel, tokens: int = _TEST_TOKENS) -> torch.Tensor:
    """Hidden states of a plain pass: those of a text's first five tokens, then from its middle on."""
    ids = torch.tensor([_test_ids(lm, tokens)], device=input_device(lm))
    hidden = hidden_states(lm, ids, use_cache=False)[0]
    return torch.cat([hidden[:5], hidden[tokens // 2 :]])


def _in_pieces(lm: PreTrainedModel, pool: Pool, tokens: int = _TEST_TOKENS) -> torch.Tensor:
    """The same, over a pool with two slots."""
    ids, cut = _test_ids(lm, tokens), tokens // 2
    pool.forward([Row(0, 0, cut + 2)], ids[: cut + 2])
    return pool.forward([Row(1, 0, 5), Row(0, cut, tokens - cut)], ids[:5] + ids[cut:])[0]


@torch.inference_mode()
def crop_serves(lm: PreTrainedModel) -> CropCache | None:
    """transformers' own caches if they do the same, rolled back by `crop`; together, if they do that, too."""
    ids, cut = _test_ids(lm), _TEST_TOKENS // 2
    expected = hidden_states(lm, torch.tensor([ids], device=input_device(lm)), use_cache=False)[0]
    text, cache = Text([ids[: cut + 2]]), CropCache(lm, 2)
    view = text.views[0]
    try:
        cache.read([(view, cut + 2, 1)])
        for token_id in (0, 1, 2):
            text.append(token_id)
        cache.read([(view, len(view), 1)])
        text.rewind(1)
        text.rewind(0)
        for token_id in ids[cut + 2 :]:
            text.append(token_id)
        [found] = cache.read([(view, len(view), 4)])
        if not _same(found, expected[-4:], lm):
            return None
    except Exception:
        return None
    cache.together = _crop_serves_together(lm, ids, expected)
    cache.forget()
    return cache


def _crop_serves_together(lm: PreTrainedModel, ids: list[int], expected: torch.Tensor) -> bool:
    cache, views = CropCache(lm, 3), [Text([ids]).views[0] for _ in range(3)]
    cache.together = True
    lengths = (_TEST_TOKENS - 2, 5, 0)
    try:
        for view, length in zip(views[:2], lengths, strict=False):
            cache.read([(view, length, 1)])
        for _ in range(2):  # the second time what the first one handed back is read
            lengths = (lengths[0] + 1, lengths[1] + 1, lengths[2] + 1)
            found = cache.read([(view, length, 1) for view, length in zip(views, lengths, strict=True)])
            if not _same(torch.cat(found), expected[[length - 1 for length in lengths]], lm):
                return False
    except Exception:
        return False
    return True


def _test_ids(lm: PreTrainedModel, tokens: int = _TEST_TOKENS) -> list[int]:
    vocab = int(lm.config.get_text_config().vocab_size)
    return [(7 + 13 * i * i) % vocab for i in range(tokens)]


def _same(found: torch.Tensor, expected: torch.Tensor, lm: PreTrainedModel) -> bool:
    found, expected = found.float(), expected.float()
    # Weights that are not numbers are told where they matter, text by text.
    scale = float(expected.nan_to_num().abs().max().clamp_min(1e-6))
    tolerance = (1e-3 if lm.dtype == torch.float32 else 0.1) * scale
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance, equal_nan=True)
