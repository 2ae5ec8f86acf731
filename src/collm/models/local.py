"""A transformers model in this process, with its KV caches kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.cuts import Cuts
from collm.errors import CollmError
from collm.models import narrow
from collm.models.attention import Row
from collm.models.backbone import causal_lm, check_project, hidden_states
from collm.models.caching import Found, caches
from collm.models.crop_cache import CropCache
from collm.models.devices import input_device
from collm.models.head import DeferralHead
from collm.models.laws import Asked, Laws
from collm.models.loading import eos_ids
from collm.models.openings import Openings
from collm.models.paged.cache import PagedCache
from collm.models.paged.lost import is_lost
from collm.models.paged.machinery import Machinery
from collm.models.paged.stepping import Stepper
from collm.models.paged.writing import are_steps, foresee, write
from collm.models.prefix_cache import Job, PrefixCache, passes
from collm.models.tokenizers import shared_vocab_size
from collm.models.turns import Network
from collm.types import ForwardPass
from collm.values import Answer, Chosen, Fault, Foreseen, KeepOn, LanguageModel, Query, Replies, Reply, Tell
from collm.views import View


class LocalModel(LanguageModel):
    """Answers queries by forward passes; the caches make them short and never change an answer.

    Each text has a slot of the KV pool from its first query to its end (`release`), and what another slot holds of
    its prompt is copied. So an assistant that has not been asked for a while catches up on the tokens it missed in
    one pass. Float32 answers agree with those of the twin `cache=False`, which recomputes every query by itself, up
    to rounding.

    What is loaded is checked: the logits against the model's own, the pool against a plain pass. Architectures that the
    pool does not serve rightly keep transformers' own caches; what those cannot roll back either is
    recomputed, with a warning.

    Args:
        vocab_size: of the vocabulary that all models share (the base's); as `tokenizer` says if not given. Further
            logits are padding and cut off; tokens that this model does not know have probability 0.
        head: the gate; with it the model is a base.
        cache: False gives the plain twin.
        num_slots: sequences whose caches are kept, and rows of a forward pass at most.
        max_cache_tokens: bounds the memory of the caches: slots times positions, `cache_bytes` at most that many times
            what one token takes; a share below 1 is one of the memory that is free now. None: `num_slots` texts of any
            length.
        on_pass: called after every forward pass.
        activate: called before `model` is used, if it is several models by turns (`adapters.Variant.activate`).
        machinery: of blocks and graphs; None finds that of the device, if it is a GPU.
        compiled: let torch compile what graphs are made of, where that are transformers' modules: passes take about a
            quarter less time (docs/results.md), and `warm_up` minutes, which it tells.

    Raises:
        CollmError: the tokenizer has more ordinary tokens than the model, its logits cannot be computed rightly, or the
            device is lost.
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
        max_cache_tokens: int | float | None = None,
        on_pass: Callable[[ForwardPass], None] | None = None,
        activate: Callable[[], None] | None = None,
        machinery: Machinery | None = None,
        compiled: bool = False,
    ) -> None:
        # 1 is a token, and 1.0 might be meant as all of the memory.
        wrong = max_cache_tokens is not None and (
            max_cache_tokens <= 0
            or (isinstance(max_cache_tokens, float) and max_cache_tokens == 1)
            or (max_cache_tokens > 1 and max_cache_tokens % 1)
        )
        if wrong:
            raise ValueError(f"max_cache_tokens must be at least 1, or a share below 1, not {max_cache_tokens}")
        self.model = model
        self.head = head
        lm = causal_lm(model)
        self._lm = lm
        self._network = Network.of(lm)
        self._device = input_device(lm)
        self._name = name
        self._eos_token_ids = eos_ids(lm, tokenizer)
        self._laws = Laws(lm, head, shared_vocab_size(tokenizer) if vocab_size is None else vocab_size)
        self._known_tokens = self._laws.known_tokens
        if self._known_tokens < tokenizer.vocab_size:
            raise CollmError(
                f"{name}: the model knows {self._known_tokens} tokens and the tokenizer {tokenizer.vocab_size}; "
                "give the tokenizer that belongs to the model"
            )
        self._context_length: int | None = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        self._activate = activate
        self._stream: torch.cuda.Stream | None = None
        self._pass_curve: Sequence[tuple[int, float]] = ()
        self.on_pass = on_pass
        with self._network.lock, self._on_device():
            if activate is not None:
                activate()
            check_project(lm)
            found: Found = (None, None)
            if cache:
                with self._loss_told():
                    found = caches(
                        lm,
                        head,
                        self._laws.vocab_size,
                        name=name,
                        num_slots=num_slots,
                        max_tokens=max_cache_tokens,
                        machinery=machinery,
                        compiled=compiled,
                    )
            self._cache, self._stepper = found
            narrow.prepare(lm)

    @property
    def name(self) -> str:
        return self._name

    def share_chunks(self, cuts: Cuts, first_bytes: Sequence[int]) -> None:
        openings = Openings.of(cuts, first_bytes, self._laws.vocab_size)
        self._laws = replace(self._laws, openings=openings)
        if self._stepper is not None:
            self._stepper.share_chunks(openings)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def context_length(self) -> int | None:
        return self._context_length

    @property
    def device(self) -> str:
        return str(self._device) if self._stream is None else f"{self._device}, stream of {self._name}"

    @property
    def cache_bytes(self) -> int:
        """Memory that the caches take now."""
        if isinstance(self._cache, CropCache):
            return self._cache.num_bytes
        return 0 if self._cache is None else self._cache.pool.num_bytes

    @property
    def max_cache_tokens(self) -> int | None:
        return None if self._cache is None else self._cache.max_tokens

    def fits(self, lengths: Sequence[int]) -> bool:
        return self._cache is None or self._cache.fits(lengths)

    def reserve(self, num_slots: int) -> None:
        """Be ready to keep the caches of this many texts at a time. It never frees what is held."""
        if self._cache is not None:
            self._cache.num_slots = max(self._cache.num_slots, num_slots)

    def missing(self, query: Query) -> int:
        if self._cache is None:
            return max(1, query.num_last)  # it keeps nothing, so reading in pieces would get nowhere
        return max(query.length - self._cache.held(query.view), query.num_last)

    def reused(self, view: View) -> int:
        return self._cache.reused(view) if isinstance(self._cache, PrefixCache) else 0

    def release(self, view: View) -> None:
        if self._cache is not None:
            self._cache.release(view)

    def forget(self) -> None:
        """Empty the caches and free their memory; the next answers are computed from the start."""
        if self._cache is not None:
            with self._network.lock:
                if self._stepper is not None:
                    self._stepper.void()
                self._cache.forget()

    @torch.inference_mode()
    def predict(self, queries: Sequence[Query]) -> Replies:
        """See `LanguageModel`.

        A query that cannot be answered gets faults, and the others their answers: one that is too long for the context
        or the memory, one with an unknown token, one whose predictions are not numbers.
        """
        return self._predict(queries)

    @property
    def writes_on(self) -> bool:
        return self._stepper is not None

    @torch.inference_mode()
    def write_on(
        self, queries: Sequence[Query], keep_on: KeepOn | None, tell: Tell | None = None, chosen: Chosen | None = None
    ) -> Replies:
        return self._predict(queries, keep_on, tell, chosen)

    @torch.inference_mode()
    def foresee(self, coming: Sequence[Foreseen]) -> None:
        # Networks with several adapters are left as they are: the pass that runs needs its own.
        if self._stepper is None or not isinstance(self._cache, PagedCache) or self._activate is not None:
            return
        known = self._known_tokens
        if not all(0 <= each.token_id < known for each in coming):
            return
        # Whoever calls holds the lock of another network, so nobody may be waited for.
        if self._network.lock.acquire(blocking=False):
            try:
                with self._on_device():
                    foresee(self._stepper, self._cache, coming, self._longest(self._cache))
            except RuntimeError as error:  # not by `_loss_told`, whose calls this is too often for
                if is_lost(error):
                    raise self._lost(error) from error
                raise
            finally:
                self._network.lock.release()

    def _predict(
        self,
        queries: Sequence[Query],
        keep_on: KeepOn | None = None,
        tell: Tell | None = None,
        chosen: Chosen | None = None,
    ) -> Replies:
        try:
            with self._network.lock, self._on_device(), narrow.narrow_products():
                if self._activate is not None:
                    self._activate()
                try:
                    replies = self._usual(queries, keep_on, tell, chosen)
                finally:
                    if self._stepper is not None:
                        self._stepper.void()
                if replies is not None:
                    return replies
                faults = [self._too_long(query) for query in queries]
                served = self._served([query for query, fault in zip(queries, faults, strict=True) if fault is None])
                return [
                    next(served) if fault is None else [fault] * max(1, query.num_last)
                    for query, fault in zip(queries, faults, strict=True)
                ]
        except Exception as error:
            if is_lost(error):
                raise self._lost(error) from error
            raise

    def _lost(self, error: Exception) -> CollmError:
        reason = str(error).partition("\n")[0]
        return CollmError(f"{self._name}: {self._device} failed ({reason}); start the process anew")

    @contextmanager
    def _loss_told(self) -> Iterator[None]:
        """What `_predict` says of a lost device."""
        try:
            yield
        except Exception as error:
            if is_lost(error):
                raise self._lost(error) from error
            raise

    def _on_device(self) -> AbstractContextManager[object]:
        """Kernels are launched on the current device, whatever their tensors lie on."""
        if self._stream is not None:
            return torch.cuda.stream(self._stream)
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def warm_up(self) -> float:
        """Reserve the memory of the caches and capture all graphs, where there are any: seconds that it took.

        Otherwise both are done when they are first needed. What passes cost (`pass_curve`) is measured here, once.

        Raises:
            CollmError: the device is lost.
        """
        if self._stepper is None or not isinstance(self._cache, PagedCache) or self._pass_curve:
            return 0.0
        with self._network.lock, torch.inference_mode(), self._on_device(), self._loss_told():
            if self._activate is not None:
                self._activate()
            self._cache.open()
            seconds = self._stepper.warm_up()
            self._pass_curve = self._stepper.measured()
            return seconds

    @property
    def graphs(self) -> tuple[Stepper | None, PagedCache | None]:
        """What runs its passes as graphs, and what these work on, where there are any; for measurements."""
        return self._stepper, self._cache if isinstance(self._cache, PagedCache) else None

    @property
    def pass_curve(self) -> Sequence[tuple[int, float]]:
        return self._pass_curve

    def overlap(self) -> None:
        """Run the passes on a stream of their own from now on, beside those of the other networks of the device,
        instead of taking turns with them. Before an engine is made of this model."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # weights may still be on their way, on another stream
            self._stream = torch.cuda.Stream(self._device)

    def _longest(self, cache: PrefixCache) -> int | None:
        """Tokens that a text may have."""
        bounds = [bound for bound in (cache.max_tokens, self._context_length) if bound is not None]
        return min(bounds, default=None)

    def _usual(
        self, queries: Sequence[Query], keep_on: KeepOn | None, tell: Tell | None, chosen: Chosen | None
    ) -> Replies | None:
        """The answers of a usual pass (`PrefixCache.usual_jobs`), behind which texts may write on; None where it is
        none."""
        if not isinstance(self._cache, PrefixCache) or not queries:
            return None
        jobs = self._cache.usual_jobs(queries, self._longest(self._cache))
        if jobs is None:
            return None
        known = self._known_tokens
        for job in jobs:
            if max(job.query.view.token_ids[job.done : job.query.length]) >= known:
                return None
        if self._stepper is not None and isinstance(self._cache, PagedCache) and are_steps(jobs):
            asked = keep_on, tell, chosen
            write(self._stepper, self._cache, jobs, *asked, self._eos_token_ids, self._no_numbers, self.on_pass)
        else:
            self._pass(self._cache, [(job, job.query.length) for job in jobs], chosen)
        return [job.replies for job in jobs]

    def _served(self, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        if isinstance(self._cache, PrefixCache):
            for batch in self._cache.batches(queries):
                yield from self._cached(self._cache, batch)
            return
        # No text twice in a pass of texts together, and as many as fit; without caches, each by itself.
        together: list[Query] = []
        for query in queries:
            if together and (
                self._cache is None
                or any(each.view is query.view for each in together)
                or not self.fits([each.length for each in [*together, query]])
            ):
                yield from self._uncached(together)
                together = []
            together.append(query)
        if together:
            yield from self._uncached(together)

    def _too_long(self, query: Query) -> Fault | None:
        if self._context_length is not None and query.length > self._context_length:
            return Fault(
                f"{self._name}: {query.length} tokens do not fit into its context of {self._context_length}; "
                "shorten the prompt"
            )
        if not self.fits([query.length]):
            return Fault(
                f"{self._name}: {query.length} tokens do not fit into max_cache_tokens={self.max_cache_tokens}; "
                f"raise it to at least {query.length}"
            )
        return None

    def _unknown(self, token_ids: Sequence[int]) -> Fault | None:
        highest = max(token_ids, default=0)
        if highest < self._known_tokens:
            return None
        return Fault(
            f"{self._name}: token {highest} lies beyond the {self._known_tokens} tokens that the model "
            "knows; give the tokenizer that belongs to it"
        )

    def _uncached(self, queries: Sequence[Query]) -> list[list[Reply]]:
        """The plain way: all tokens from the start, or with transformers' own caches those that they do not hold."""
        began = perf_counter()
        # What is held has been looked at before.
        missing = [query.length if self._cache is None else self.missing(query) for query in queries]
        replies: list[list[Reply]] = []
        known: list[Query] = []
        for query, tokens in zip(queries, missing, strict=True):
            unknown = self._unknown(query.view.token_ids[query.length - tokens : query.length])
            replies.append([] if unknown is None else [unknown] * max(1, query.num_last))
            if unknown is None:
                known.append(query)
        if not known:
            return replies
        if self._cache is None:
            [query] = known
            ids = torch.tensor([query.view.token_ids[: query.length]], device=self._device)
            states = [hidden_states(self._lm, ids, use_cache=False)[0, query.length - query.num_last :]]
        else:
            assert isinstance(self._cache, CropCache)
            states = self._cache.read([(query.view, query.length, query.num_last) for query in known])
        answered = [(query, own) for query, own in zip(known, states, strict=True) if query.num_last]
        if answered:
            prefixes = [(query, 0, query.num_last) for query, _ in answered]
            hidden = torch.cat([own for _, own in answered])
            asked = Asked.of(prefixes)
            packed = torch.tensor(asked.numbers, dtype=torch.int64, device=hidden.device)
            found = iter(self._checked(self._laws.answers(hidden, asked, packed), prefixes))
            for query, reply in zip(queries, replies, strict=True):
                if not reply:
                    reply += [next(found) for _ in range(query.num_last)]
        if self.on_pass is not None:
            longest = max(query.length for query in known)
            self.on_pass(ForwardPass(len(known), max(missing), sum(missing), longest, perf_counter() - began))
        return replies

    def _cached(self, cache: PrefixCache, queries: Sequence[Query]) -> Iterator[list[Reply]]:
        """Compute only what the slots do not hold."""
        jobs = cache.jobs(queries)
        for wave in cache.waves(jobs):
            for job in wave:
                # What is stored has been looked at before.
                unknown = self._unknown(job.query.view.token_ids[job.done : job.query.length])
                if unknown is not None:
                    job.replies, job.done = [unknown] * max(1, job.query.num_last), job.query.length
            for pieces in passes(wave):
                self._pass(cache, pieces)
        return (job.replies for job in jobs)

    def _pass(self, cache: PrefixCache, pieces: Sequence[tuple[Job, int]], chosen: Chosen | None = None) -> None:
        """One forward pass for the tokens of each job from `done` to `end`; `chosen` as in `write_on`."""
        began = perf_counter()
        if len(pieces) > 1:
            pieces = sorted(pieces, key=lambda piece: (piece[1] - piece[0].done, piece[0].slot))
        rows: list[Row] = []
        token_ids: list[int] = []
        wanted: list[int] = []
        prefixes: list[tuple[Query, int, int]] = []
        for job, end in pieces:
            query, done = job.query, job.done
            rows.append(Row(job.slot, done, end - done))
            opening = query.length - query.num_last
            first = max(opening, done)
            if first < end:
                start = len(token_ids) + first - done
                wanted += range(start, start + end - first)
                prefixes.append((query, first - opening, end - opening))
            token_ids += query.view.token_ids[done:end]
        asked = Asked.of(prefixes)
        try:
            if self._stepper is not None and self._stepper.takes(len(token_ids), asked):
                told = self._stepper.step(rows, token_ids, wanted, asked)
                if chosen is not None:
                    tokens = iter(told.tokens[wanted].tolist())
                    chosen([(query, list(islice(tokens, j - i))) for query, i, j in prefixes])
                found = self._checked(told.answers(wanted), prefixes)
            else:
                found = self._eager(cache, rows, token_ids, wanted, prefixes, asked)
        except BaseException:
            for job, _ in pieces:
                cache.clear(job)
            raise
        replies = list(found)
        broken = Fault in map(type, replies)
        at = 0
        for job, end in pieces:
            number = end - max(job.first, job.done)
            cache.hold(job, end)
            if number > 0:
                new = replies[at : at + number]
                at += number
                job.replies += new
                job.broken |= broken and Fault in map(type, new)
            if job.broken:
                cache.clear(job)
        if self.on_pass is not None:
            longest = max([row.end for row in rows])
            self.on_pass(ForwardPass(len(rows), rows[-1].width, len(token_ids), longest, perf_counter() - began))

    def _eager(
        self,
        cache: PrefixCache,
        rows: Sequence[Row],
        token_ids: Sequence[int],
        wanted: Sequence[int],
        prefixes: Sequence[tuple[Query, int, int]],
        asked: Asked,
    ) -> Iterator[Reply]:
        """The answers behind the `wanted` tokens of a pass."""
        numbers = asked.numbers
        hidden, packed = cache.pool.forward(rows, token_ids, [*numbers, *wanted])
        packed, at = packed.split([len(numbers), len(wanted)])
        if len(wanted) < len(token_ids):
            hidden = hidden[at.to(hidden.device)]
        return self._checked(self._laws.answers(hidden, asked, packed), prefixes) if wanted else iter(())

    def _checked(self, answers: Iterable[Answer | None], prefixes: Sequence[tuple[Query, int, int]]) -> Iterator[Reply]:
        found = list(answers)
        if None not in found:
            return iter(found)
        positions = [query.length - query.num_last + n for query, i, j in prefixes for n in range(i, j)]
        return (
            self._no_numbers(position) if answer is None else answer
            for answer, position in zip(found, positions, strict=True)
        )

    def _no_numbers(self, position: int) -> Fault:
        return Fault(
            f"{self._name}: the predictions after position {position} are not numbers (NaN); its weights are damaged "
            "or overflow in this dtype: try another dtype"
        )
