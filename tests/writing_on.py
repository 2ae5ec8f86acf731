"""A model that writes on by itself as far as it likes, for tests of whoever lets it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from collm.decoding.policies import decide
from collm.models.fake import FakeModel
from collm.types import BASE
from collm.values import Answer, Chosen, Foreseen, KeepOn, LanguageModel, Query, Replies, Reply, Tell
from collm.views import View


class WritingOn(LanguageModel):
    """Passes one after the other over the tokens that a fake chose; sometimes it stops for no reason."""

    writes_on = True

    def __init__(self, model: FakeModel, seed: int = 0, stops: float = 0.2, lies: float = 0.0) -> None:
        self._model, self._rng, self._stops, self._lies = model, random.Random(seed), stops, lies
        self.calls: list[int] = []
        """Passes of each call."""
        self.foreseen: list[tuple[int, ...]] = []
        """Prefixes that it was told it would probably be asked for."""
        self.asked: set[tuple[int, ...]] = set()

    @property
    def name(self) -> str:
        return self._model.name

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._model.eos_token_ids

    def predict(self, queries: Sequence[Query]) -> Replies:
        self.calls.append(1)
        self.asked |= {tuple(query.view.token_ids[: query.length]) for query in queries}
        return self._model.predict(queries)

    def write_on(
        self, queries: Sequence[Query], keep_on: KeepOn | None, tell: Tell | None = None, chosen: Chosen | None = None
    ) -> Replies:
        found, told = self.predict(queries), [0] * len(queries)
        if chosen is not None:
            chosen([(query, [self._guess(reply) for reply in found[n]]) for n, query in enumerate(queries)])
        if keep_on is None:
            return found
        left = {
            n: [query.write_on.max_tokens, query.write_on.passing] for n, query in enumerate(queries) if query.write_on
        }
        going = [n for n in left if self._goes_on(queries[n], found[n], left[n])]
        while going and keep_on(len(going), len(queries) - len(going)):
            self.calls[-1] += 1
            if tell is not None and self._rng.random() < 0.8:
                tell([(n, found[n][told[n] :]) for n in range(len(queries)) if len(found[n]) > told[n]])
                told = list(map(len, found))
            for n in going:
                found[n] += self._model.predict([_behind(queries[n], found[n])])[0]
            going = [n for n in going if self._goes_on(queries[n], found[n], left[n])]
        return found

    def foresee(self, coming: Sequence[Foreseen]) -> None:
        for each in coming:
            assert len(each.view) >= each.length
            self.foreseen.append((*each.view.token_ids[: each.length], each.token_id))

    def _guess(self, reply: Reply) -> int:
        return reply.token_id if isinstance(reply, Answer) and self._rng.random() >= self._lies else 1

    def _goes_on(self, query: Query, found: Sequence[Reply], left: list[int]) -> bool:
        reply, leave = found[-1], query.write_on
        assert leave is not None
        if not isinstance(reply, Answer) or not left[0] or reply.token_id in self.eos_token_ids:
            return False
        position = query.length + len(found) - 1 - query.view.prompt_length
        if leave.until is not None and decide(leave.until, reply, query.draw, position).authors[0] != BASE:
            left[1] -= 1
        left[0] -= 1
        return left[1] >= 0 and self._rng.random() >= self._stops


def _behind(query: Query, found: Sequence[Reply]) -> Query:
    written = [reply.token_id for reply in found if isinstance(reply, Answer)]
    view = View(query.view.token_ids[: query.view.prompt_length])
    view.token_ids += [*query.view.token_ids[view.prompt_length : query.length], *written]
    return query._replace(view=view, length=len(view), write_on=None)
