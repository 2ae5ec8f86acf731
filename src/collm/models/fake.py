"""A deterministic toy language model: the law of the next token is a hash of the prefix.

For tests of decoders, drivers and one's own code around them: no weights, no tokenizer, microseconds per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from collm.decoding.choosing import answer_of, requested
from collm.values import GREEDY, Answer, Draw, LanguageModel, Query, Replies, Reply

Law = tuple[torch.Tensor, tuple[float, ...] | None]
"""Log-probabilities `[V]`, and the gate's."""
ABSTAINS: Law = (torch.empty(0), None)
REMEMBERED = 512
"""Laws that are kept: decoders that are compared ask for the same ones again."""


class FakeModel(LanguageModel):
    """Laws are drawn from a symmetric Dirichlet, with the hash of (name, prefix) as the seed.

    Args:
        name: models of different names have different laws.
        vocab_size: V.
        num_assistants: if given, a gate over 1+K models comes with every prediction (so this is a base).
        agreement: share of prefixes on which the law is the one all fakes share; 1 makes fakes equal.
        abstention: share of prefixes on which the model abstains.
        concentration: of the Dirichlet; small values make peaked laws.
        eos_token_ids: tokens that end its texts.
        ignore_prompt: leading tokens that the laws do not depend on (models may see different prompts).
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        *,
        num_assistants: int | None = None,
        agreement: float = 0.0,
        abstention: float = 0.0,
        concentration: float = 1.0,
        eos_token_ids: frozenset[int] = frozenset(),
        ignore_prompt: int = 0,
    ) -> None:
        self.vocab_size, self.num_assistants = vocab_size, num_assistants
        self.agreement, self.abstention, self.concentration = agreement, abstention, concentration
        self.ignore_prompt = ignore_prompt
        self.calls = 0
        """Batches answered."""
        self._name, self._eos_token_ids = name, eos_token_ids
        self._laws: dict[tuple[int, ...], Law] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    def predict(self, queries: Sequence[Query]) -> Replies:
        self.calls += 1
        return [
            [
                self._reply(query, i, end)
                for i, end in enumerate(range(query.length - query.num_last + 1, query.length + 1))
            ]
            for query in queries
        ]

    def answer(self, token_ids: Sequence[int], draw: Draw = GREEDY, position: int = 0) -> Reply:
        """The answer after one prefix, whose next token is the one at `position` of the completion."""
        prefix = tuple(token_ids)[self.ignore_prompt :]
        found = self._laws.get(prefix)
        if found is None:
            if len(self._laws) >= REMEMBERED:
                self._laws.clear()
            found = self._laws[prefix] = self._law(prefix)
        return None if found is ABSTAINS else answer_of(found[0], draw, position, found[1])

    def _law(self, prefix: tuple[int, ...]) -> Law:
        """Log-probabilities and the gate's, or `ABSTAINS`."""
        if self._hash("abstains?", prefix).random() < self.abstention:
            return ABSTAINS
        shared = self._hash("agrees?", prefix).random() < self.agreement
        rng = _hash("shared", "law", prefix) if shared else self._hash("law", prefix)
        law = rng.dirichlet(np.full(self.vocab_size, self.concentration))
        log_probs = torch.tensor(law, dtype=torch.float32).clamp_min(1e-30).log().log_softmax(dim=0)
        log_gate = None
        if self.num_assistants is not None:
            gate = self._hash("gate", prefix).dirichlet(np.ones(1 + self.num_assistants))
            log_gate = tuple(float(value) for value in np.log(gate))
        return log_probs, log_gate

    def _reply(self, query: Query, i: int, end: int) -> Reply:
        reply = self.answer(query.view.token_ids[:end], query.draw, end - query.view.prompt_length + query.view.shift)
        return requested(reply, query, i) if isinstance(reply, Answer) else reply

    def _hash(self, purpose: str, prefix: tuple[int, ...]) -> np.random.Generator:
        return _hash(self._name, purpose, prefix)


def _hash(name: str, purpose: str, prefix: tuple[int, ...]) -> np.random.Generator:
    digest = hashlib.sha256(repr((name, purpose, tuple(map(int, prefix)))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))
