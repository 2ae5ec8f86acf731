"""Collaborative decoding with look-ahead: the same text as `collaborative`, token for token, in fewer passes.

At every position the plain algorithm asks the base, and where it defers the assistant. Nothing says that they must be
asked in the order of the positions: any model may draft tokens ahead, and whoever has the last word on a position
judges whole blocks of them in one pass. A position is settled when the base's answer and that of its author are known
for the very tokens before it; the first token that differs from its draft throws away what was drafted behind it.

- The base drafts through its deferrals as if the assistant agreed, and the assistant judges the block.
- Within a run of deferrals the assistant drafts, and the base checks the gates of the whole run.

Which of the two, and how far, is a `Pace`'s affair and changes nothing but the number of passes.

Sampling is lossless in the same sense: all random choices are a function of (seed, sample, position), and models that
draw with the same noise draw the same token wherever their laws allow (`choosing.draw`). So the law is that of plain
decoding, whatever was drafted. The price: two laws at total variation distance d agree with probability at least
(1 - d) / (1 + d), where an acceptance test (Leviathan et al. 2023) would reach 1 - d.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial

from collm.decoding.collaborative import Flow, More, Request, Writers, ends_text, required
from collm.decoding.pace import Leave, Pace
from collm.decoding.policies import Decision, Policy, decide
from collm.sampling_params import SamplingParams
from collm.types import BASE, Step
from collm.values import Answer, Extend, Foreseen, Query, Replies, Reply
from collm.views import Text

Asking = Generator[Request, Replies | None, None]


def speculative(text: Text, params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]], pace: Pace) -> Flow:
    """See `collaborative`, whose steps these are, but for `draft` and `discarded`."""
    draft = _Draft(text, params, policy, eos)
    by_base = draft.known[BASE]
    while draft.position < params.max_tokens:
        if draft.position not in by_base:
            if draft.length:
                yield from draft.ask(BASE, min(draft.end, params.max_tokens - 1))
            else:
                yield from draft.ask_on(BASE, pace.leave)
        step = draft.settle(pace)
        if step is None:
            yield from _gather(draft, draft.wanted, pace)
            continue
        yield step
        if draft.ended:
            return "stop"
        author = step.author
        if author != BASE and not draft.length and draft.position not in by_base:
            yield from _run_on(draft, author, pace.run(author))
    return "length"


def _gather(draft: _Draft, assistant: int, pace: Pace) -> Asking:
    """Let the base draft on through its deferrals to this assistant, then ask it about all of them at once."""
    end = draft.end
    pending = [p for p in range(draft.position, end + 1) if draft.first_author(p) == assistant]
    while (token_id := draft.base_draft(end)) is not None:
        end += 1
        known = end in draft.known[BASE]
        if not known and pace.asks(assistant, len(pending)):
            break
        draft.append(token_id)
        if not known:
            yield from draft.ask_on(BASE, pace.leave, len(pending))
        if draft.first_author(end) == assistant:
            pending.append(end)
    # An assistant that is asked only because an earlier one abstained is nobody's first.
    yield from draft.ask(assistant, max(pending, default=draft.position), pace)


def _run_on(draft: _Draft, assistant: int, num_tokens: int) -> Asking:
    """Let the assistant write on by itself; the base will check whether it would have deferred."""
    for n in range(num_tokens):
        if draft.end >= draft.params.max_tokens:
            return
        if draft.end not in draft.known[assistant]:
            yield from draft.ask_on(assistant, partial(Leave, num_tokens - n))
        token_id = draft.would_write(assistant, draft.end)
        if token_id is None:
            return
        draft.append(token_id)
        if ends_text(token_id, assistant, draft.eos):
            return


class _Draft:
    """What is drafted behind the tokens that are settled, and what the models have said about its positions."""

    def __init__(self, text: Text, params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]]) -> None:
        self.params, self.eos = params, eos
        self.known: list[dict[int, Reply]] = [{} for _ in text.views]
        """By model and position: replies after prefixes of written and drafted tokens."""
        self.position = text.length
        """Of the next token to be settled. What is known of earlier ones is never read again."""
        self.ended = False
        """The last token that was settled ends the text."""
        self.wanted = BASE
        """The assistant that is to be asked about the next one."""
        self._text, self._policy, self._how = text, policy, params.draw
        self._tokens: list[int] = []
        self._decided: dict[int, tuple[Answer, Decision]] = {}
        """Where the base has answered, and whom it would ask."""
        self._extends = (-1, 0)
        """The model whose `Extend` runs, and where its next answer belongs."""
        self._until = 0
        """Where its leave ends, if it has one."""

    @property
    def length(self) -> int:
        return len(self._tokens)

    @property
    def end(self) -> int:
        """The first position without a token, written or drafted."""
        return self._text.length

    def append(self, token_id: int) -> None:
        self._tokens.append(token_id)
        self._text.append(token_id)

    def ask(self, model: int, last: int, pace: Pace | None = None) -> Asking:
        """One pass of a model over the positions from the next one to be settled to `last`; of an assistant by whose
        tokens, at this `pace`, the base may begin with what it is asked next."""
        view = self._text.views[model]
        num_last = last - self.position + 1
        # Passes of the base that tell more are not begun before they are asked for.
        then = None if pace is None or self.params.top_log_probs else partial(self._goes_on, pace, model, last)
        replies = yield (
            Query(
                model,
                view,
                view.prompt_length + last,
                num_last,
                self._how,
                None,
                self.params.top_log_probs,
                then=then,
            ),
        )
        assert replies is not None and len(replies) == 1
        self._extends = (-1, 0)
        self._learn(model, self.position, replies[0])

    def _goes_on(self, pace: Pace, model: int, last: int, tokens: Sequence[int]) -> Foreseen | None:
        """What the base is asked next if an assistant has chosen these from the next position to the `last` one: behind
        the first token that is not the drafted one, or behind the draft."""
        decided, first = self._decided, self.position
        for position, drafted in enumerate((*self._tokens, None), first):
            found = decided.get(position)
            if found is None:
                return None
            base, decision = found
            author = decision.authors[0]
            if author == BASE:
                token_id = base.token_id
            elif author == model and position <= last:
                token_id = tokens[position - first]
            else:
                return None
            if token_id != drafted:
                break
        if ends_text(token_id, author, self.eos) or position + 1 >= self.params.max_tokens:
            return None
        if author != BASE and pace.run(author):
            return None
        view = self._text.views[BASE]
        return Foreseen(view, view.prompt_length + position, token_id, self._how)

    def ask_on(self, model: int, how_far: Callable[[int], Leave], pending: int = 0) -> Asking:
        """The model's answer at the end of what is drafted, and perhaps some behind it; it goes on by itself if it
        wrote the token before.

        Args:
            how_far: it may write on, with so many deferrals `pending`.
        """
        end = self._text.length
        if self._extends == (model, end) and end != self._until:
            request: Request = More(lambda: how_far(pending).passing)
        else:
            left, leave = self.params.max_tokens - end, how_far(pending)
            limit, self._until = left, -1
            if leave.tokens is not None:
                limit = min(left, leave.tokens)
                self._until = end + limit
            request = Extend(
                model,
                self._text.views[model],
                limit,
                self._how,
                self._policy if model == BASE else None,
                self.params.top_log_probs,
                leave.passing,
            )
        replies = yield request
        assert replies is not None
        [found] = replies
        self._extends = (model, end + len(found))
        self._learn(model, end, found)

    def _learn(self, model: int, first: int, replies: Sequence[Reply]) -> None:
        """A model has answered from this position on."""
        self.known[model].update(enumerate(replies, first))
        if model == BASE:
            for position, reply in enumerate(replies, first):
                if isinstance(reply, Answer):
                    self._decided[position] = reply, decide(self._policy, reply, self._how, position)

    def first_author(self, position: int) -> int:
        found = self._decided.get(position)
        return BASE if found is None else found[1].authors[0]

    def would_write(self, model: int, position: int) -> int | None:
        """The model's own token, if it has answered there."""
        reply = self.known[model].get(position)
        return reply.token_id if isinstance(reply, Answer) else None

    def base_draft(self, end: int) -> int | None:
        """What the base would write at `end`, if the text would go on behind it."""
        found = self._decided.get(end)
        if found is None or end + 1 >= self.params.max_tokens:
            return None
        base, decision = found
        return None if ends_text(base.token_id, decision.authors[0], self.eos) else base.token_id

    def settle(self, pace: Pace) -> Step | None:
        """Settle the next token, of which `pace` is told; None if an assistant is still to be asked about it."""
        position, drafted = self.position, self._tokens
        if position not in self._decided:
            required(self.known[BASE][position])
        base, decision = self._decided[position]
        writers = Writers(base, decision.signal)
        for candidate in decision.authors:
            if candidate == BASE:
                break
            known = self.known[candidate]
            if position not in known:
                self.wanted = candidate
                return None
            if writers.settled_by(candidate, known[position], self.params):
                break
        author, token_id = writers.author, (writers.answer or base).token_id
        pace.observe(author, author != BASE and base.token_id == token_id)
        ended = self.ended = ends_text(token_id, author, self.eos)
        self.position += 1
        if not drafted:
            self._write(token_id, position)
            return writers.step()
        behind = len(drafted) - 1
        if drafted[0] == token_id:
            del drafted[0]
            return writers.step("accepted", behind if ended else 0)
        drafted.clear()
        self._text.rewind(position)
        self._write(token_id, position, contradicts=True)
        return writers.step("recovered", behind)

    def _write(self, token_id: int, position: int, contradicts: bool = False) -> None:
        """Write a token that was not drafted; replies about what it contradicts are forgotten."""
        self._text.append(token_id)
        for model, known in enumerate(self.known):
            # What a model has said by itself behind its own token holds if that is the one.
            if contradicts or self.would_write(model, position) != token_id:
                known.clear()
                if model == BASE:
                    self._decided.clear()
