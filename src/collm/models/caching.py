"""Which caches serve a network: found where it is loaded, by trying."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterator

from transformers import PreTrainedModel

from collm.models.crop_cache import CropCache
from collm.models.devices import input_device, places
from collm.models.head import DeferralHead
from collm.models.kv_pool import KVPool
from collm.models.memory import bytes_per_token, spare_tokens, tell_room, tokens_in
from collm.models.paged.cache import PagedCache
from collm.models.paged.compiled import CompiledModules
from collm.models.paged.llama import LlamaBody
from collm.models.paged.machinery import Machinery, has_cuda, machinery_for, tell_eager
from collm.models.paged.pool import Body, PagedPool
from collm.models.paged.products import CannotFuse
from collm.models.paged.stepping import Stepper
from collm.models.paged.ways import Ways
from collm.models.prefix_cache import PrefixCache
from collm.models.selftest import crop_serves, paged_serves, pool_serves
from collm.models.slot_cache import SlotCache
from collm.models.turns import Network

_log = logging.getLogger(__name__)

Found = tuple[PrefixCache | CropCache | None, Stepper | None]
LONGEST = 32_768
"""Tokens of a text that blocks are prepared for where a network does not say how many it reads."""


def caches(
    lm: PreTrainedModel,
    head: DeferralHead | None,
    vocab_size: int,
    *,
    name: str,
    num_slots: int,
    max_tokens: int | float | None,
    machinery: Machinery | None,
    compiled: bool = False,
) -> Found:
    """The caches of a network, and what runs its passes as graphs, where that can be.

    Warns:
        UserWarning: none serves, so that all is recomputed; or its passes run without graphs on a GPU, and why.
    """
    pool = pool_serves(lm)
    if pool is not None:
        machinery = machinery or machinery_for(lm, name)
        if machinery is not None:
            found = _paged(lm, head, vocab_size, pool, machinery, name, num_slots, max_tokens, compiled)
            if found is not None:
                return found
        return SlotCache(KVPool(lm), num_slots, _bound(lm, max_tokens, name), spare_tokens(lm)), None
    cropped = crop_serves(lm)
    if cropped is not None:
        cropped.num_slots, cropped.max_tokens = num_slots, _bound(lm, max_tokens, name)
        if has_cuda(places(lm)):
            tell_eager(name, f"a {lm.config.model_type} model keeps its texts in transformers' own caches")
        return cropped, None
    warnings.warn(
        f"{name}: keeping the KV cache of a {lm.config.model_type} model is not supported; "
        "every token is recomputed from the start, which is right but slow",
        stacklevel=3,
    )
    return None, None


def _bound(lm: PreTrainedModel, max_tokens: int | float | None, name: str) -> int | None:
    """In tokens, which are told where a share of the memory is meant."""
    if max_tokens is None or max_tokens >= 1:
        return None if max_tokens is None else int(max_tokens)
    found = tokens_in(lm, max_tokens)
    tell_room(input_device(lm), name, found, found * bytes_per_token(lm))
    return found


def _paged(
    lm: PreTrainedModel,
    head: DeferralHead | None,
    vocab_size: int,
    pool: KVPool,
    machinery: Machinery,
    name: str,
    num_slots: int,
    max_tokens: int | float | None,
    compiled: bool,
) -> Found | None:
    def fresh(body: Body | None, ways: Ways) -> tuple[PagedPool, Stepper]:
        recorded = CompiledModules(lm, machinery.compiler) if compiled and body is None else None
        found = PagedPool(lm, pool.layers, pool.groups, machinery.ops, body, machinery.block, recorded)
        return found, Stepper(lm, head, vocab_size, found, machinery.capture, machinery.telling, ways, name)

    reason: str | None = None
    serves = Network.of(lm).serves
    for body in _bodies(lm, machinery):
        way = _way(lm, head, vocab_size, machinery, body), compiled
        reason, ways = None, serves.get(way)
        if ways is None:  # a trial takes a second or two
            ways = Ways(lm, machinery.capture.device, compiled and body is None)
            trial, stepper = fresh(body, ways)
            reason = paged_serves(lm, trial, stepper, vocab_size)
            trial.free()
        if reason is None:
            ways.on_trial, serves[way] = False, ways
            lasting, stepper = fresh(body, ways)
            longest = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or LONGEST
            return PagedCache(lasting, num_slots, max_tokens, longest, name), stepper
    warnings.warn(
        f"{name}: keys and values in blocks do not serve this {lm.config.model_type} model here ({reason}); passes "
        "run without graphs, which is right but slow",
        stacklevel=4,
    )
    return None


def _way(
    lm: PreTrainedModel, head: DeferralHead | None, vocab_size: int, machinery: Machinery, body: Body | None
) -> Hashable:
    """What the outcome of a trial depends on: what there is of the network, and what runs it."""
    parts = machinery.ops, machinery.telling, machinery.capture, machinery.dense, body
    modules = sum(1 for _ in lm.modules())
    return modules, lm.dtype, lm.device, head is None, vocab_size, machinery.block, tuple(type(part) for part in parts)


def _bodies(lm: PreTrainedModel, machinery: Machinery) -> Iterator[Body | None]:
    """Ways to run a network, the quickest first."""
    if machinery.dense is not None:
        try:
            yield LlamaBody(lm, machinery.dense)
        except CannotFuse as reason:
            _log.info("%s: by transformers' modules: %s", lm.config.model_type, reason)
    yield None
