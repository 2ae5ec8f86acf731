"""A transformers model in this process, with its KV caches kept from call to call."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.models import kv_pool, narrow
from collm.models.attention import Row
from collm.models.backbone import causal_lm, hidden_states
from collm.models.head import DeferralHead
from collm.models.laws import Laws
from collm.models.loading import eos_ids
from collm.models.prefix_cache import Job, PrefixCache, passes, waves
from collm.models.tokenizers import shared_vocab_size
from collm.types import Answer, Fault, ForwardPass, Prediction, Query


class LocalModel:
    """Answers queries by forward passes; the caches make them short and never change an answer.

    A query is compared with what the slots of the KV pool hold; only what is not there is computed, and what another
    slot holds of its beginning is copied. So an assistant that has not been asked for a while catches up on the tokens
    it missed in one pass. Float32 answers agree with those of the twin `cache=False`, which recomputes every query by
    itself, up to rounding.

    Architectures that the pool is not known to serve rightly are recomputed, with a warning (see `kv_pool.supports`).

    Args:
        vocab_size: of the vocabulary that all models share (the base's); as `tokenizer` says if not given. Further
            logits are padding and cut off; tokens that this model does not know have probability 0.
        head: the gate; with it the model is a base.
        cache: False gives the plain twin.
        num_slots: sequences whose caches are kept, and rows of a forward pass at most.
        max_cache_tokens: bounds the memory of the caches: slots times positions, `cache_bytes` at most that many times
            what one token takes. None: `num_slots` texts of any length.
        on_pass: called after every forward pass.
        activate: called before `model` is used, if it is several models by turns (`adapters.Variant.activate`).

    Raises:
        CollmError: the tokenizer has more ordinary tokens than the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        head: DeferralHead | None = None,
        *,
        name: str = "base",
        vocab_size: int | None = None,
        cache: bool = True,
        num_slots: int = 16,
        max_cache_tokens: int | None = None,
        on_pass: Callable[[ForwardPass], None] | None = None,
        activate: Callable[[], None] | None = None,
    ) -> None:
        if max_cache_tokens is not None and max_cache_tokens < 1:
            raise ValueError(f"max_cache_tokens must be at least 1, not {max_cache_tokens}")
        self.model = model
        self.head = head
        lm = causal_lm(model)
        self._lm = lm
        self._name = name
        self._eos_token_ids = eos_ids(lm, tokenizer)
        self._laws = Laws(lm, head, shared_vocab_size(tokenizer) if vocab_size is None else vocab_size)
        self._known_tokens = self._laws.known_tokens
        if self._known_tokens < tokenizer.vocab_size:
            raise CollmError(
                f"{name}: the model knows {self._known_tokens} tokens and the tokenizer {tokenizer.vocab_size}; "
                "give the tokenizer that belongs to the model"
            )
        self.context_length: int | None = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        if cache and not kv_pool.supports(lm):
            warnings.warn(
                f"{name}: keeping the KV cache of a {lm.config.model_type} model is not supported; "
                "every token is recomputed from the start, which is right but slow",
                stacklevel=2,
            )
            cache = False
        narrow.prepare(lm)
        self._cache = PrefixCache(kv_pool.KVPool(lm), num_slots, max_cache_tokens) if cache else None
        self.on_pass = on_pass
        self._activate = activate

    @property
    def name(self) -> str:
        return self._name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches take now."""
        return 0 if self._cache is None else self._cache.pool.num_bytes

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether texts of these full lengths (prompt and completion) can be held at once."""
        return self._cache is None or self._cache.fits(len(lengths), max(lengths, default=0))

    def reserve(self, num_slots: int) -> None:
        """Keep the caches of this many texts from now on; a smaller number than before frees their memory."""
        if self._cache is not None:
            if num_slots < self._cache.num_slots:
                self._cache.forget()
            self._cache.num_slots = num_slots

    def forget(self) -> None:
        """Empty the caches and free their memory; the next answers are computed from the start."""
        if self._cache is not None:
            self._cache.forget()

    @torch.inference_mode()
    def predict(self, queries: Sequence[Query]) -> list[list[Answer]]:
        """See `LanguageModel`.

        A query that cannot be answered gets faults, and the others their answers: one that is too long for the context
        or the memory, one with an unknown token, one whose predictions are not numbers.
        """
        faults = [self._too_long(query) for query in queries]
        served = self._served([query for query, fault in zip(queries, faults, strict=True) if fault is None])
        if self._activate is not None:
            self._activate()
        with narrow.narrow_products():
            return [
                next(served) if fault is None else [fault] * query.num_last
                for query, fault in zip(queries, faults, strict=True)
            ]

    def _served(self, queries: Sequence[Query]) -> Iterator[list[Answer]]:
        if self._cache is None:
            for query in queries:
                yield self._recomputed(query)
        else:
            for batch in self._cache.batches(queries):
                yield from self._cached(self._cache, batch)

    def _too_long(self, query: Query) -> Fault | None:
        length = len(query.token_ids)
        if self.context_length is not None and length > self.context_length:
            return Fault(
                f"{self._name}: {length} tokens do not fit into its context of {self.context_length}; "
                "shorten the prompt"
            )
        if not self.fits([length]):
            assert self._cache is not None
            return Fault(
                f"{self._name}: {length} tokens do not fit into max_cache_tokens={self._cache.max_tokens}; "
                f"raise it to at least {length}"
            )
        return None

    def _unknown(self, token_ids: tuple[int, ...]) -> Fault | None:
        if max(token_ids) < self._known_tokens:
            return None
        return Fault(
            f"{self._name}: token {max(token_ids)} lies beyond the {self._known_tokens} tokens that the model "
            "knows; give the tokenizer that belongs to it"
        )

    def _recomputed(self, query: Query) -> list[Answer]:
        """The plain way."""
        unknown = self._unknown(query.token_ids)
        if unknown is not None:
            return [unknown] * query.num_last
        began, length = perf_counter(), len(query.token_ids)
        ids = torch.tensor([query.token_ids], device=self._lm.device)
        found = self._laws.of(hidden_states(self._lm, ids, use_cache=False)[0, -query.num_last :])
        self._tell(ForwardPass(1, length, length, length, perf_counter() - began))
        return [self._answer(query, i, prediction) for i, prediction in enumerate(found)]

    def _cached(self, cache: PrefixCache, queries: Sequence[Query]) -> Iterator[list[Answer]]:
        """Compute only what the slots do not hold."""
        jobs = cache.jobs(queries)
        for job in jobs:
            # What is stored has been looked at before.
            unknown = self._unknown(job.query.token_ids[job.done :])
            if unknown is not None:
                job.answers = [unknown] * job.query.num_last
        try:
            for wave in waves(jobs):
                ready = [job for job in wave if not job.answers]
                for job in ready:
                    if job.new:
                        cache.share(job)
                for pieces in passes(ready):
                    self._pass(cache, pieces)
        finally:
            # NaN passes through attention masks: none may stay behind.
            for job in jobs:
                if job.broken:
                    cache.clear(job)
        return (job.answers for job in jobs)

    def _pass(self, cache: PrefixCache, pieces: Sequence[tuple[Job, int]]) -> None:
        """One forward pass for the tokens of each job from `done` to `end`."""
        began = perf_counter()
        pieces = sorted(pieces, key=lambda piece: (piece[1] - piece[0].done, piece[0].slot))
        rows = [Row(job.slot, job.done, end - job.done) for job, end in pieces]
        token_ids = [token for job, end in pieces for token in job.query.token_ids[job.done : end]]
        wanted: list[int] = []
        at = 0
        for (job, _), row in zip(pieces, rows, strict=True):
            wanted += range(at + max(0, job.reusable - row.start), at + row.width)
            at += row.width
        try:
            hidden = cache.pool.forward(rows, token_ids)
            found = iter(self._laws.of(hidden if len(wanted) == at else hidden[wanted]) if wanted else ())
        except BaseException:
            for job, _ in pieces:
                cache.clear(job)
            raise
        for job, end in pieces:
            for i in range(max(0, job.done - job.reusable), end - job.reusable):
                job.answers.append(self._answer(job.query, i, next(found)))
                job.broken |= isinstance(job.answers[-1], Fault)
            cache.hold(job, end)
            if job.broken:
                cache.disown(job)
        self._tell(ForwardPass(len(rows), rows[-1].width, at, max(row.end for row in rows), perf_counter() - began))

    def _tell(self, done: ForwardPass) -> None:
        if self.on_pass is not None:
            self.on_pass(done)

    def _answer(self, query: Query, i: int, prediction: Prediction | None) -> Answer:
        if prediction is not None:
            return prediction
        asked = len(query.token_ids) - query.num_last + i
        return Fault(
            f"{self._name}: the predictions after position {asked} are not numbers (NaN{self._since(query, asked)}); "
            "its weights are damaged or overflow in this dtype: try another dtype"
        )

    def _since(self, query: Query, asked: int) -> str:
        """Where it began. Looked for by bisection, for a NaN passes through masks to the positions before it, too; that
        takes a few passes, which only a fault pays."""

        def bad(position: int) -> bool:
            ids = torch.tensor([query.token_ids[: position + 1]], device=self._lm.device)
            return self._laws.of(hidden_states(self._lm, ids, use_cache=False)[0, -1:])[0] is None

        first = bisect_left(range(asked), True, key=bad)
        return "" if first == asked else f", as all from position {first} on: token {query.token_ids[first]}"
