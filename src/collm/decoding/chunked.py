"""Decoding for models with different tokenizers: a step is a chunk (`collm.cuts`).

At a cut the base is read and the policy names who writes; that model writes until its next token would open a chunk.
Drawn texts follow the law of chunks exactly. Or the assistant writes, and the base where that one is in doubt
(`nudging`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from collm.cuts import END
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunk_writing import (
    FAR,
    Full,
    Held,
    Written,
    ask_at_cut,
    draw_of,
    given_a_cut,
    may_open,
    settle,
    write_chunk,
)
from collm.decoding.collaborative import Ask, Flow, ModelFailed, Request, Writers, required
from collm.decoding.nudging import WRITER, Nudging, usable_writer
from collm.decoding.policies import Always, Policy, decide
from collm.sampling_params import SamplingParams
from collm.types import BASE, FinishReason, Step
from collm.values import Answer, Draw, Fault, Replies, Reply

MISSES = 0.125
"""Share of held chunks that may turn out to go on. Of two real models it is some hundredths."""


def chunked(text: ChunkText, params: SamplingParams, policy: Policy, end_id: int, *, ahead: bool = False) -> Flow:
    """Chunk by chunk: the base reads, the policy names who writes, that model writes until it would open another one.

    Args:
        params: `max_tokens` are the base's; stop strings are `stopping`'s affair.
        end_id: the base's token that stands for an end that another model has written.
        ahead: an assistant looks behind its chunk when it is asked next, and steps are held back until then (`Held`):
            the same text with fewer passes of assistants, where nobody reads along.
    """
    draws = [draw_of(params.draw, model) for model in range(len(text.views))]
    # Who always writes has looked anyway.
    state = _State({}, ahead and not isinstance(policy, Always))
    while True:
        ending: FinishReason | ModelFailed | None = None
        try:
            ending = yield from _chunk(text, params, policy, end_id, draws, state)
        except Full:
            ending = "length"
        except ModelFailed as failure:
            ending = failure
        held = state.held
        if held is not None and (ending is not None or text.length - held.mark.length >= FAR):
            try:
                [verdict] = yield from held.look(text, draws)
            except Full:
                return "length"
            steps = state.looked(text, verdict)
            if steps is None:
                continue
            yield from steps
        if ending is None:
            continue
        if isinstance(ending, ModelFailed):
            raise ending
        return ending


@dataclass(slots=True)
class _State:
    """`peeks`: what models are known to write next. `careful`: the number of a chunk that is written with a look.
    `looks`: how many chunks were held, of which `misses` would have gone on."""

    peeks: dict[int, Answer]
    ahead: bool
    held: Held | None = None
    careful: int = -1
    looks: int = 0
    misses: int = 0

    @property
    def waits(self) -> bool:
        """Whether chunks are held: not where many would have gone on, which costs more than it saves."""
        return self.ahead and self.misses <= 1 + self.looks * MISSES

    def looked(self, text: ChunkText, verdict: Reply) -> list[Step] | None:
        """The steps that were held, if the chunk did end there; None: all is taken back to where it began."""
        held, self.held = self.held, None
        assert held is not None
        self.looks += 1
        if held.closed_by(text, verdict):
            return held.steps
        self.misses += 1
        text.back(held.mark)
        self.peeks, self.careful = held.peeks, held.mark.chunks
        return None


def _chunk(
    text: ChunkText, params: SamplingParams, policy: Policy, end_id: int, draws: Sequence[Draw], state: _State
) -> Generator[Request | Step, Replies | None, FinishReason | None]:
    """One chunk, or the step back to one that was held; why the text ends, if it does."""
    room = params.max_tokens - text.length
    if room <= 0:
        return "length"
    mark, peeks = text.mark(), dict(state.peeks)
    base = peeks.get(BASE)
    if base is None:
        [reply] = yield from ask_at_cut(text, BASE, draws, params.top_log_probs)
        base = peeks[BASE] = required(reply)
    decision = decide(policy, given_a_cut(base), draws[BASE], len(text.chunks))
    writers = Writers(base, decision.signal)
    written: Written | None = None
    for candidate in decision.authors:
        if candidate == BASE:
            break
        answer: Reply = peeks.get(candidate)
        if state.held is not None:
            verdict: Reply
            if candidate == state.held.author:
                verdict, answer = yield from state.held.look_and_open(text, draws)
            else:
                [verdict] = yield from state.held.look(text, draws)
            steps = state.looked(text, verdict)
            if steps is None:
                return None
            yield from steps
        if answer is None:
            [answer] = yield from ask_at_cut(text, candidate, draws, 0)
        if isinstance(answer, Answer):
            peeks[candidate] = answer
            if not may_open(text, candidate, answer.token_id):
                answer = None  # a tool that would go on with somebody's token
        if not writers.settled_by(candidate, answer, params):
            continue
        assert isinstance(answer, Answer)
        look = not state.waits or len(text.chunks) == state.careful
        found = yield from write_chunk(text, candidate, answer, draws[candidate], room, look=look)
        if isinstance(found, Written):
            written = found
            break
        text.undo(candidate)
        writers.author, writers.answer = BASE, None
        writers.settled_by(candidate, found, params)
    if written is None:
        found = yield from write_chunk(text, BASE, base, draws[BASE], room, num_top=params.top_log_probs)
        if isinstance(found, Fault):
            raise ModelFailed(found.reason)
        written = found
    step, state.peeks = settle(
        text,
        written,
        writers.author,
        writers.answer or writers.base,
        writers.base,
        room,
        end_id,
        abstained=writers.abstained,
        fault=writers.fault,
        signal=writers.signal,
    )
    if written.unseen:
        state.held = Held(writers.author, mark, peeks, written.data[-1], [step])
    elif state.held is not None:
        state.held.steps.append(step)
    else:
        yield step
    return written.finish_reason


def nudged(text: ChunkText, params: SamplingParams, method: Nudging, end_id: int) -> Flow:
    """`nudging` with chunks for tokens: a word of the base is its chunks up to one that begins with white space.

    Whether the writer is in doubt is asked at cuts alone, of what it would open a chunk with.
    """
    try:
        return (yield from _nudged(text, params, method, end_id))
    except Full:
        return "length"


def _nudged(text: ChunkText, params: SamplingParams, method: Nudging, end_id: int) -> Flow:
    draws = [draw_of(params.draw, model) for model in range(len(text.views))]
    codec = text.codecs[BASE]
    peeks: dict[int, Answer] = {}
    in_word = False

    def opening(model: int) -> Ask:
        """What a model would open the next chunk with."""
        if (seen := peeks.get(model)) is not None:
            return [seen]
        return (yield from ask_at_cut(text, model, draws, params.top_log_probs if model == BASE else 0))

    while text.length < params.max_tokens:
        room = params.max_tokens - text.length
        base: Answer | None = None
        writer: Answer | None = None
        fault: str | None = None
        written: Written | None = None
        signal: float | None = None
        if in_word:  # does it go on?
            [reply] = yield from opening(BASE)
            base = required(reply)
            in_word = not (codec.pieces[base.token_id] or b"").decode(errors="ignore")[:1].isspace()
        if not in_word:
            [reply] = yield from opening(WRITER)
            writer, fault = usable_writer(reply, params)
            if writer is not None:
                at_cut = given_a_cut(writer)
                signal = -at_cut.top_log_prob
                in_word = text.codecs[WRITER].first_bytes[writer.token_id] == END or method.in_doubt(at_cut)
            if writer is not None and not in_word:
                found = yield from write_chunk(text, WRITER, writer, draws[WRITER], room)
                if isinstance(found, Written):
                    written = found
                else:
                    text.undo(WRITER)
                    writer, fault = usable_writer(found, params)
            in_word = written is None
        author, answer = WRITER, writer
        if written is None:
            if base is None:
                [reply] = yield from opening(BASE)
                base = required(reply)
            author, answer = BASE, base
            found = yield from write_chunk(text, BASE, base, draws[BASE], room, num_top=params.top_log_probs)
            if isinstance(found, Fault):
                raise ModelFailed(found.reason)
            written = found
        assert answer is not None
        step, peeks = settle(text, written, author, answer, base, room, end_id, fault=fault, signal=signal)
        yield step
        if written.finish_reason is not None:
            return written.finish_reason
    return "length"
