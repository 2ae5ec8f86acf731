"""A transformers model in this process, with its KV caches kept from call to call."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from collm.errors import CollmError
from collm.gate import log_gate
from collm.models import kv_pool
from collm.models.backbone import causal_lm, hidden_states, project
from collm.models.head import DeferralHead
from collm.models.loading import eos_ids
from collm.models.slots import SlotTable
from collm.models.tokenizers import shared_vocab_size
from collm.types import Answer, Prediction, Query

PASS_TOKENS = 8192
"""Tokens, padding included, that one forward pass may hold."""


class LocalModel:
    """Answers queries by forward passes; the caches make them short and never change an answer.

    A query is compared with what the slots of the KV pool hold; only what is not there is computed. So an assistant
    that has not been asked for a while catches up on the tokens it missed in one pass. Float32 answers agree with
    those of the twin `cache=False`, which recomputes every query by itself, up to rounding.

    Architectures that the pool is not known to serve rightly are recomputed, with a warning (see `kv_pool.supports`).

    Args:
        vocab_size: of the vocabulary that all models share (the base's); as `tokenizer` says if not given. Further
            logits are padding and cut off; tokens that this model does not know have probability 0.
        head: the gate; with it the model is a base.
        cache: False gives the plain twin.
        num_slots: sequences whose caches are kept, and rows of a forward pass at most.

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
    ) -> None:
        self.model = model
        self.head = head
        lm = causal_lm(model)
        self._lm = lm
        self._name = name
        self._eos_token_ids = eos_ids(lm, tokenizer)
        self._vocab_size = shared_vocab_size(tokenizer) if vocab_size is None else vocab_size
        self._known_tokens: int = lm.get_output_embeddings().weight.shape[0]
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
        self._pool = kv_pool.KVPool(lm) if cache else None
        self._table = SlotTable(num_slots)

    @property
    def name(self) -> str:
        return self._name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    def reserve(self, num_slots: int) -> None:
        """Keep the caches of this many sequences from now on; a smaller number frees memory."""
        if num_slots == self._table.num_slots:
            return
        self._forget(num_slots)

    def _forget(self, num_slots: int) -> None:
        self._table = SlotTable(num_slots)
        if self._pool is not None:
            self._pool = kv_pool.KVPool(self._lm)

    @torch.inference_mode()
    def predict(self, queries: Sequence[Query]) -> list[list[Answer]]:
        """See `LanguageModel`.

        Raises:
            CollmError: a query longer than the model's context, or predictions that are not numbers.
        """
        for query in queries:
            self._check(query.token_ids)
        if self._pool is None:
            states = [self._recomputed(query) for query in queries]
        else:
            states = []
            for start in range(0, len(queries), self._table.num_slots):
                states += self._cached(self._pool, queries[start : start + self._table.num_slots])
        return self._answers(queries, torch.cat(states)) if states else []

    def _check(self, token_ids: tuple[int, ...]) -> None:
        if self.context_length is not None and len(token_ids) > self.context_length:
            raise CollmError(
                f"{self._name}: {len(token_ids)} tokens do not fit into its context of "
                f"{self.context_length}; shorten the prompt"
            )
        if max(token_ids) >= self._known_tokens:
            raise CollmError(
                f"{self._name}: token {max(token_ids)} lies beyond the {self._known_tokens} tokens that the model "
                "knows; give the tokenizer that belongs to it"
            )

    def _recomputed(self, query: Query) -> Tensor:
        """Hidden states `[num_last, H]`, the plain way."""
        ids = torch.tensor([query.token_ids], device=self._lm.device)
        return hidden_states(self._lm, ids, use_cache=False)[0, -query.num_last :]

    def _cached(self, pool: kv_pool.KVPool, queries: Sequence[Query]) -> list[Tensor]:
        """Hidden states `[num_last, H]` of each query, computing only what the pool does not hold."""
        table = self._table
        slots = table.assign([query.token_ids for query in queries])
        # The last positions are computed even where their keys are there: their hidden states are not.
        starts = [
            min(table.common_prefix(slot, query.token_ids), len(query.token_ids) - query.num_last)
            for slot, query in zip(slots, queries, strict=True)
        ]
        # Until the pass is over a slot holds no more than what is kept, whatever may interrupt it.
        for slot, query, start in zip(slots, queries, starts, strict=True):
            table.hold(slot, query.token_ids[:start])
        pool.reserve(len(table.held), max(len(query.token_ids) for query in queries))
        states: list[Tensor | None] = [None] * len(queries)
        for rows in _passes([len(query.token_ids) - start for query, start in zip(queries, starts, strict=True)]):
            rows = self._lined_up(pool, rows, slots)
            tokens = [queries[row].token_ids[starts[row] :] for row in rows]
            hidden = pool.forward([slots[row] for row in rows], tokens, [starts[row] for row in rows])
            for i, row in enumerate(rows):
                states[row] = hidden[i, len(tokens[i]) - queries[row].num_last : len(tokens[i])]
                table.hold(slots[row], queries[row].token_ids)
        return [state for state in states if state is not None]

    def _lined_up(self, pool: kv_pool.KVPool, rows: Sequence[int], slots: list[int]) -> list[int]:
        """`rows` in the order of their slots, moved to the front slots if that takes few moves.

        Rows in one block of slots are read in place; scattered ones would be copied in every layer and step.
        """
        taken = {slots[row]: row for row in rows}
        strays = [slot for slot in taken if slot >= len(rows)]
        if 0 < len(strays) <= max(1, len(rows) // 4) and max(taken) - min(taken) >= len(rows):
            others = {slot: row for row, slot in enumerate(slots)}
            free = [slot for slot in range(len(rows)) if slot not in taken]
            for stray, slot in zip(strays, free, strict=True):
                pool.swap(stray, slot, max(len(self._table.held[stray]), len(self._table.held[slot])))
                self._table.swap(stray, slot)
                if slot in others:  # another query of this call, which waits for its own pass
                    slots[others[slot]] = stray
                slots[taken[stray]] = slot
        return sorted(rows, key=slots.__getitem__)

    def _answers(self, queries: Sequence[Query], hidden: Tensor) -> list[list[Answer]]:
        log_probs = project(self._lm, hidden)[:, : self._vocab_size].float().log_softmax(dim=-1)
        if self._known_tokens < self._vocab_size:
            log_probs = F.pad(log_probs, (0, self._vocab_size - self._known_tokens), value=-torch.inf)
        gates = None if self.head is None else log_gate(self.head(hidden))
        broken = log_probs.isnan().any(dim=-1)
        if gates is not None:
            broken |= gates.isnan().any(dim=-1)
        top = log_probs.argmax(dim=-1).tolist()
        gate_rows = None if gates is None else gates.double().tolist()
        is_broken = broken.tolist() if bool(broken.any()) else None
        answers: list[list[Answer]] = []
        at = 0
        for query in queries:
            answers.append([])
            for i in range(query.num_last):
                if is_broken is not None and is_broken[at]:
                    # NaN passes through attention masks: none may stay in the caches.
                    self._forget(self._table.num_slots)
                    position = len(query.token_ids) - query.num_last + i
                    raise CollmError(
                        f"{self._name}: the predictions after position {position} are not numbers (NaN); "
                        "its weights are damaged or overflow in this dtype: try another dtype"
                    )
                gate = None if gate_rows is None else tuple(gate_rows[at])
                answers[-1].append(Prediction(log_probs[at], top[at], gate))
                at += 1
        return answers


def _passes(widths: Sequence[int]) -> Iterator[list[int]]:
    """Rows grouped into forward passes: similar widths together, for a long prefill would pad all the others."""
    group: list[int] = []
    for row in sorted(range(len(widths)), key=widths.__getitem__):
        narrowest = widths[group[0]] if group else 0
        if group and (widths[row] > 2 * narrowest + 8 or widths[row] * (len(group) + 1) > PASS_TOKENS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
