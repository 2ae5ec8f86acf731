"""A transformers model in this process, with its KV caches kept from call to call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.cuts import Cuts
from collm.errors import CollmError
from collm.models import narrow
from collm.models.backbone import causal_lm, check_project
from collm.models.bounds import Bounds
from collm.models.caching import Found, caches
from collm.models.crop_cache import CropCache
from collm.models.devices import input_device
from collm.models.head import DeferralHead
from collm.models.laws import Laws
from collm.models.loading import eos_ids
from collm.models.on_device import OnDevice
from collm.models.openings import Openings
from collm.models.paged.cache import PagedCache
from collm.models.paged.machinery import Machinery
from collm.models.paged.stepping import Stepper
from collm.models.paged.writing import foresee
from collm.models.plain_answering import PlainAnswering
from collm.models.prefix_cache import PrefixCache
from collm.models.slot_answering import SlotAnswering
from collm.models.tokenizers import shared_vocab_size
from collm.models.turns import Network
from collm.types import ForwardPass
from collm.values import Chosen, Foreseen, KeepOn, LanguageModel, Query, Replies, Tell
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
        self._network = Network.of(lm)
        self._on = OnDevice(input_device(lm), name)
        self._name = name
        self._eos_token_ids = eos_ids(lm, tokenizer)
        laws = Laws(lm, head, shared_vocab_size(tokenizer) if vocab_size is None else vocab_size)
        known_tokens = laws.known_tokens
        if known_tokens < tokenizer.vocab_size:
            raise CollmError(
                f"{name}: the model knows {known_tokens} tokens and the tokenizer {tokenizer.vocab_size}; "
                "give the tokenizer that belongs to the model"
            )
        self._activate = activate
        self._pass_curve: Sequence[tuple[int, float]] = ()
        with self._network.lock, self._on.current():
            if activate is not None:
                activate()
            check_project(lm)
            found: Found = (None, None)
            if cache:
                with self._on.loss_told():
                    found = caches(
                        lm,
                        head,
                        laws.vocab_size,
                        name=name,
                        num_slots=num_slots,
                        max_tokens=max_cache_tokens,
                        machinery=machinery,
                        compiled=compiled,
                    )
            narrow.prepare(lm)
        self._cache, self._stepper = found
        context_length: int | None = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
        self._bounds = bounds = Bounds(name, known_tokens, context_length, self._cache)
        self._answering: SlotAnswering | PlainAnswering
        if isinstance(self._cache, PrefixCache):
            self._answering = SlotAnswering(laws, bounds, self._cache, self._stepper, self._eos_token_ids, on_pass)
        else:
            self._answering = PlainAnswering(laws, bounds, self._cache, on_pass)

    @property
    def name(self) -> str:
        return self._name

    def share_chunks(self, cuts: Cuts, first_bytes: Sequence[int]) -> None:
        self._answering.share_chunks(Openings.of(cuts, first_bytes, self._answering.laws.vocab_size))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def context_length(self) -> int | None:
        return self._bounds.context_length

    @property
    def device(self) -> str:
        return str(self._on)

    @property
    def on_pass(self) -> Callable[[ForwardPass], None] | None:
        """Called after every forward pass."""
        return self._answering.on_pass

    @on_pass.setter
    def on_pass(self, called: Callable[[ForwardPass], None] | None) -> None:
        self._answering.on_pass = called

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

    def predict(self, queries: Sequence[Query]) -> Replies:
        """See `LanguageModel`.

        A query that cannot be answered gets faults, and the others their answers: one that is too long for the context
        or the memory, one with an unknown token, one whose predictions are not numbers.
        """
        return self._run(partial(self._answering.answers, queries))

    @property
    def writes_on(self) -> bool:
        return self._stepper is not None

    def write_on(
        self, queries: Sequence[Query], keep_on: KeepOn | None, tell: Tell | None = None, chosen: Chosen | None = None
    ) -> Replies:
        answering = self._answering
        if isinstance(answering, PlainAnswering):
            return self.predict(queries)
        return self._run(partial(answering.answers, queries, keep_on, tell, chosen))

    @torch.inference_mode()
    def _run(self, answers: Callable[[], Replies]) -> Replies:
        """What is answered while this model has its network and its device."""
        try:
            with self._network.lock, self._on.current(), narrow.narrow_products():
                if self._activate is not None:
                    self._activate()
                return answers()
        except Exception as error:
            self._on.raise_if_lost(error)
            raise

    @torch.inference_mode()
    def foresee(self, coming: Sequence[Foreseen]) -> None:
        # Networks with several adapters are left as they are: the pass that runs needs its own.
        if self._stepper is None or not isinstance(self._cache, PagedCache) or self._activate is not None:
            return
        token_ids = [each.token_id for each in coming]
        if min(token_ids, default=-1) < 0 or max(token_ids) >= self._bounds.known_tokens:
            return
        # Whoever calls holds the lock of another network, so nobody may be waited for.
        if self._network.lock.acquire(blocking=False):
            try:
                with self._on.current():
                    foresee(self._stepper, self._cache, coming, self._bounds.longest)
            except Exception as error:
                self._on.raise_if_lost(error)
                raise
            finally:
                self._network.lock.release()

    def warm_up(self) -> float:
        """Reserve the memory of the caches and capture all graphs, where there are any: seconds that it took.

        Otherwise both are done when they are first needed. What passes cost (`pass_curve`) is measured here, once.

        Raises:
            CollmError: the device is lost.
        """
        if self._stepper is None or not isinstance(self._cache, PagedCache) or self._pass_curve:
            return 0.0
        with self._network.lock, torch.inference_mode(), self._on.current(), self._on.loss_told():
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
        self._on.overlap()
