"""Collaborative decoding with look-ahead: the same text as `collaborative`, token for token, in fewer passes.

At every position the plain algorithm asks the base, and where it defers the assistant. Nothing says that they must be
asked in the order of the positions: any model may draft tokens ahead, and whoever has the last word on a position
judges whole blocks of them in one pass. A position is settled when the base's answer and that of its author are known
for the very tokens before it; the first token that differs from its draft throws away what was drafted behind it.

- The base drafts through its deferrals as if the assistant agreed, and the assistant judges the block.
- Within a run of deferrals the assistant drafts, and the base checks the gates of the whole run.

Which of the two, and how far, is a `Pace`'s affair and changes nothing but the number of passes.

Sampling is lossless in the same sense: all random choices are a function of (seed, position), and models that draw
with the same noise draw the same token wherever their laws allow (`sampling.choose_token`). So the law is that of
plain decoding, whatever was drafted. The price: two laws at total variation distance d agree with probability at
least (1 - d) / (1 + d), where an acceptance test (Leviathan et al. 2023) would reach 1 - d.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from collm.decoding.collaborative import Flow, Queries, Replies, TokenIds, Writers, ends_text, required
from collm.decoding.pace import Pace
from collm.decoding.policies import Decision, Policy
from collm.decoding.sampling import choose_token
from collm.sampling_params import SamplingParams
from collm.types import BASE, Answer, Prediction, Query, Step

Asking = Generator[Queries, Replies | None, None]


def speculative(
    prompts: Sequence[TokenIds], params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]], pace: Pace
) -> Flow:
    """See `collaborative`, whose steps these are, but for `draft` and `discarded`."""
    text = _Text(prompts, params, policy, eos)
    while text.position < params.max_tokens:
        if text.position not in text.known[BASE]:
            yield from text.ask(BASE, min(text.end, params.max_tokens - 1))
        settled = text.settle()
        if isinstance(settled, int):
            yield from _gather(text, settled, pace.deferrals(settled))
            continue
        step = settled
        pace.observe(step.author, step.deferred and text.would_write(BASE, text.position) == step.token_id)
        text.write(step)
        yield step
        if ends_text(step.token_id, step.author, eos):
            return "stop"
        if step.deferred and not text.draft and text.position not in text.known[BASE]:
            yield from _run_on(text, step.author, pace.run(step.author))
    return "length"


def _gather(text: _Text, assistant: int, num_deferrals: int) -> Asking:
    """Let the base draft until `num_deferrals` to this assistant are pending, then ask it for all of them at once."""
    pending = [p for p in range(text.position, text.end + 1) if text.first_author(p) == assistant]
    while len(pending) < num_deferrals and (token_id := text.base_draft()) is not None:
        text.draft.append(token_id)
        yield from text.ask(BASE, text.end, start=text.end)
        if text.first_author(text.end) == assistant:
            pending.append(text.end)
    # An assistant that is asked only because an earlier one abstained is nobody's first.
    yield from text.ask(assistant, max(pending, default=text.position))


def _run_on(text: _Text, assistant: int, num_tokens: int) -> Asking:
    """Let the assistant write on by itself; the base will check whether it would have deferred."""
    for _ in range(num_tokens):
        if text.end >= text.params.max_tokens:
            return
        yield from text.ask(assistant, text.end, start=text.end)
        token_id = text.would_write(assistant, text.end)
        if token_id is None:
            return
        text.draft.append(token_id)
        if ends_text(token_id, assistant, text.eos):
            return


class _Text:
    """What is written, what is drafted behind it, and what the models have said about its positions."""

    def __init__(
        self, prompts: Sequence[TokenIds], params: SamplingParams, policy: Policy, eos: Sequence[frozenset[int]]
    ) -> None:
        self.params, self.eos = params, eos
        self.draft: list[int] = []
        self.known: list[dict[int, Answer]] = [{} for _ in prompts]
        """By model and position: answers after prefixes of written and drafted tokens."""
        self._prompts, self._policy = prompts, policy
        self._written: TokenIds = ()
        self._decisions: dict[int, Decision] = {}

    @property
    def position(self) -> int:
        """Of the next token to be settled."""
        return len(self._written)

    @property
    def end(self) -> int:
        """The first position without a token, written or drafted."""
        return len(self._written) + len(self.draft)

    def ask(self, model: int, last: int, *, start: int | None = None) -> Asking:
        """One pass of a model over the positions from `start` (the next to be settled) to `last`."""
        start = self.position if start is None else start
        token_ids = self._prompts[model] + self._written + tuple(self.draft[: last - self.position])
        replies = yield (Query(model, token_ids, num_last=last - start + 1),)
        assert replies is not None and len(replies) == 1
        self.known[model].update(enumerate(replies[0], start))

    def decision(self, position: int) -> Decision:
        """The models to ask for a token whose base has answered."""
        if position not in self._decisions:
            base = required(self.known[BASE][position])
            self._decisions[position] = self._policy.decide(base, self.params.seed, position)
        return self._decisions[position]

    def first_author(self, position: int) -> int:
        return self.decision(position).authors[0] if isinstance(self.known[BASE].get(position), Prediction) else BASE

    def would_write(self, model: int, position: int) -> int | None:
        """The model's own token, if it has answered there."""
        answer = self.known[model].get(position)
        return choose_token(answer, self.params, position) if isinstance(answer, Prediction) else None

    def base_draft(self) -> int | None:
        """What the base would write at `end`, if the text would go on behind it."""
        token_id = self.would_write(BASE, self.end)
        if token_id is None or self.end + 1 >= self.params.max_tokens:
            return None
        return None if ends_text(token_id, self.first_author(self.end), self.eos) else token_id

    def settle(self) -> int | Step:
        """The next token, or the assistant that is still to be asked about it."""
        decision = self.decision(self.position)
        writers = Writers(required(self.known[BASE][self.position]), decision.signal)
        for candidate in decision.authors:
            if candidate == BASE:
                break
            if self.position not in self.known[candidate]:
                return candidate
            if writers.settled_by(candidate, self.known[candidate][self.position], self.params):
                break
        step = writers.step(self.params, self.position)
        if not self.draft:
            return step
        stands = step.token_id == self.draft[0]
        lost = len(self.draft) - 1 if not stands or ends_text(step.token_id, step.author, self.eos) else 0
        return replace(step, draft="accepted" if stands else "recovered", discarded=lost)

    def write(self, step: Step) -> None:
        """Take a settled token over; answers about what it contradicts are forgotten."""
        position, stands = self.position, bool(self.draft) and self.draft[0] == step.token_id
        self._written = (*self._written, step.token_id)
        self.draft = self.draft[1:] if stands else []
        kept = range(position + 1, self.end + 1) if stands else ()
        self.known = [{p: told[p] for p in kept if p in told} for told in self.known]
        self._decisions = {p: self._decisions[p] for p in kept if p in self._decisions}
