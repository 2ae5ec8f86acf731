"""From hidden states to answers: laws, gates and chosen tokens, computed for a whole pass where the model lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from collm.decoding.choosing import Draws
from collm.gate import log_gate
from collm.models.backbone import project
from collm.models.head import DeferralHead
from collm.models.openings import Openings, chosen_at_cuts
from collm.values import Answer, Draw, Query

LAWS = 1 << 24
"""Log-probabilities that exist at a time, unless the laws themselves are asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked behind each of N prefixes of a pass; `draws`: how tokens are chosen."""

    draws: Draws
    given: list[int] | None = None
    """The tokens whose log-probabilities are wanted; -1 for none."""
    tops: Sequence[int] = ()
    """How many of the most probable tokens are wanted."""
    law: bool = False
    how: Sequence[tuple[Draw, int]] = ()
    """How each row is drawn, and its position in the completion."""
    cuts: list[int] | None = None
    """Where models share chunks: for each prefix the last byte (-1: it is none of theirs), and whether the choice has
    to open a chunk (1 or 0)."""

    @classmethod
    def drawn(cls, draws: Sequence[Draw], positions: Iterable[int]) -> Asked:
        """Nothing but tokens."""
        if all(draw.temperature == 0 for draw in draws):
            return MOST_PROBABLE
        how = list(zip(draws, positions, strict=True))
        return cls(Draws.of(how), how=how)

    @classmethod
    def of(cls, queries: Sequence[tuple[Query, int, int]]) -> Asked:
        """Of each query its prefixes from the i-th to before the j-th."""
        plain, drawn = True, False
        for query, _, _ in queries:
            plain = plain and query.given is None and not (query.num_top or query.law or query.last_bytes)
            drawn = drawn or query.draw.temperature > 0
        if plain and not drawn:
            return MOST_PROBABLE
        draws: list[tuple[Draw, int]] = []
        for query, i, j in queries:
            first = query.length - query.num_last + 1 - query.view.prompt_length + query.view.shift
            draws += [(query.draw, first + n) for n in range(i, j)]
        if plain:
            return cls(Draws.of(draws), how=draws)
        given: list[int] = []
        tops: list[int] = []
        cuts: list[int] = []
        law, any_given, any_cuts = False, False, False
        for query, i, j in queries:
            given += [-1] * (j - i) if query.given is None else query.given[i:j]
            any_given |= query.given is not None
            tops += [query.num_top] * (j - i)
            law = law or query.law
            lasts = query.last_bytes[i:j] if query.last_bytes else [-1] * (j - i)
            end = query.num_last - 1 if query.opens else -1
            cuts += [number for n, last in enumerate(lasts, i) for number in (last, int(n == end))]
            any_cuts |= bool(query.last_bytes)
        wanted = given if any_given else None
        return cls(Draws.of(draws), wanted, tops, law, draws, cuts if any_cuts else None)

    @property
    def num_top(self) -> int:
        return max(self.tops, default=0)

    @property
    def numbers(self) -> list[int]:
        """As it goes to the device."""
        return self.draws.words + (self.given or []) + (self.cuts or [])


MOST_PROBABLE = Asked(Draws.of(()))
"""Nothing but each prefix's most probable token."""


@dataclass(frozen=True, slots=True)
class Laws:
    """The output side of a model. `vocab_size` is that of all models; further logits are padding and cut off."""

    lm: PreTrainedModel
    head: DeferralHead | None
    vocab_size: int
    openings: Openings | None = None
    """Where models share chunks, of this one's tokens."""

    @property
    def known_tokens(self) -> int:
        """Tokens beyond have probability 0."""
        weight = getattr(self.lm.get_output_embeddings(), "weight", None)
        return int(self.lm.config.get_text_config().vocab_size if weight is None else weight.shape[0])

    def answers(self, hidden: Tensor, asked: Asked, packed: Tensor) -> list[Answer | None]:
        """One for each hidden state `[N, H]`; None where it is not a number. `packed`: `asked.numbers`, int64."""
        draws = asked.draws
        step = max(1, len(hidden) if draws.rows else LAWS // self.vocab_size)
        found: list[Answer | None] = []
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            log_probs = self._log_probs(hidden[rows])
            packed = packed.to(log_probs.device)  # of a network on several devices, the head may lie on another
            if asked.cuts is None:
                told = [*self._chosen(log_probs, packed[: len(draws.words)], draws)]
            else:
                assert self.openings is not None
                cuts = packed[-2 * len(hidden) :].view(-1, 2)[rows]
                told = [*chosen_at_cuts(log_probs, packed[: len(draws.words)], draws, cuts, self.openings)]
            if asked.given is not None:
                given = packed[len(draws.words) : len(draws.words) + len(hidden)]
                told.append(log_probs.gather(-1, given[rows].clamp(0, self.vocab_size - 1)[:, None]))
            if asked.num_top:
                values, token_ids = log_probs.topk(min(asked.num_top, self.vocab_size))
                told += [values, token_ids.float()]
            if self.head is not None:
                told.append(log_gate(self.head(hidden[rows])))
            # All goes to the host at once. Float32 holds token ids exactly (up to 2**24).
            rows_told = torch.cat([part.to(log_probs.device) for part in told], dim=1).tolist()
            found += self._read(rows_told, asked, start, log_probs if asked.law else None)
        return found

    def _chosen(self, log_probs: Tensor, packed: Tensor, draws: Draws) -> Iterator[Tensor]:
        """Columns: the top token and its log-probability, the entropy, the chosen token and its log-probability."""
        top_log_prob, top = log_probs.max(dim=-1, keepdim=True)
        yield top.float()
        yield top_log_prob
        yield torch.special.entr(log_probs.exp()).sum(dim=-1, keepdim=True)
        if draws.rows:
            chosen = draws.choose(log_probs, top[:, 0], packed)[:, None]
            yield chosen.float()
            yield log_probs.gather(-1, chosen)
        else:
            yield top.float()
            yield top_log_prob

    def _read(
        self, rows: Sequence[Sequence[float]], asked: Asked, start: int, laws: Tensor | None
    ) -> Iterator[Answer | None]:
        for n, row in enumerate(rows):
            values = iter(row)
            top, top_log_prob, entropy, chosen, log_prob = islice(values, 5)
            log_close = 0.0 if asked.cuts is None else next(values)
            given = None
            if asked.given is not None:
                given, wanted = next(values), asked.given[start + n]
                if wanted < 0:
                    given = None
                elif wanted >= self.vocab_size:
                    given = -math.inf
            best: tuple[tuple[int, float], ...] = ()
            if asked.num_top:
                width = min(asked.num_top, self.vocab_size)
                best_log_probs = list(islice(values, width))
                best = tuple(zip(map(int, islice(values, width)), best_log_probs, strict=True))
                best = best[: asked.tops[start + n]]
            gate = tuple(values) if self.head is not None else None
            # One NaN makes its whole row NaN, in the gate's softmax, too.
            if math.isnan(entropy) or math.isnan(top_log_prob) or (gate and math.isnan(gate[0])):
                yield None
            else:
                law = None if laws is None else laws[n]
                answer = Answer(int(chosen), log_prob, int(top), top_log_prob, entropy, gate, given, best, law)
                yield answer._replace(log_close=log_close) if log_close else answer

    def _log_probs(self, hidden: Tensor) -> Tensor:
        logits = project(self.lm, hidden)[:, : self.vocab_size]
        if logits.dtype == torch.float32 and logits.is_contiguous():
            # In place: for a batch, fresh memory of this size costs many times what is computed in it.
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)
        else:
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        unknown = self.vocab_size - log_probs.shape[1]
        return F.pad(log_probs, (0, unknown), value=-torch.inf) if unknown else log_probs
