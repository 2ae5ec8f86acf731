"""Decoding for models with different tokenizers: a step is a chunk (`collm.cuts`).

At a cut the base is read and the policy names who writes; that model writes until its next token would open a chunk.
Drawn texts follow the law of chunks exactly. Or the assistant writes, and the base where that one is in doubt
(`nudging`).
"""

from __future__ import annotations

from collm.cuts import END
from collm.decoding.chunk_text import ChunkText
from collm.decoding.chunk_writing import Full, Written, ask_at_cut, draw_of, given_a_cut, may_open, settle, write_chunk
from collm.decoding.collaborative import Ask, Flow, ModelFailed, Writers, required
from collm.decoding.nudging import WRITER, Nudging, usable_writer
from collm.decoding.policies import Policy, decide
from collm.sampling_params import SamplingParams
from collm.types import BASE
from collm.values import Answer, Fault, Reply


def chunked(text: ChunkText, params: SamplingParams, policy: Policy, end_id: int) -> Flow:
    """Chunk by chunk: the base reads, the policy names who writes, that model writes until it would open another one.

    Args:
        params: `max_tokens` are the base's; stop strings are `stopping`'s affair.
        end_id: the base's token that stands for an end that another model has written.
    """
    try:
        return (yield from _chunks(text, params, policy, end_id))
    except Full:
        return "length"


def _chunks(text: ChunkText, params: SamplingParams, policy: Policy, end_id: int) -> Flow:
    draws = [draw_of(params.draw, model) for model in range(len(text.views))]
    peeks: dict[int, Answer] = {}
    while text.length < params.max_tokens:
        base = peeks.get(BASE)
        if base is None:
            [reply] = yield from ask_at_cut(text, BASE, draws, params.top_log_probs)
            base = required(reply)
        decision = decide(policy, given_a_cut(base), draws[BASE], len(text.chunks))
        writers = Writers(base, decision.signal)
        room = params.max_tokens - text.length
        written: Written | None = None
        for candidate in decision.authors:
            if candidate == BASE:
                break
            answer: Reply = peeks.get(candidate)
            if answer is None:
                [answer] = yield from ask_at_cut(text, candidate, draws, 0)
            if isinstance(answer, Answer) and not may_open(text, candidate, answer.token_id):
                answer = None  # a tool that would go on with somebody's token
            if not writers.settled_by(candidate, answer, params):
                continue
            assert isinstance(answer, Answer)
            found = yield from write_chunk(text, candidate, answer, draws[candidate], room)
            if isinstance(found, Written):
                written = found
                break
            text.undo(candidate)
            writers.author, writers.answer = BASE, None
            writers.settled_by(candidate, found, params)
        if written is None:
            found = yield from write_chunk(text, BASE, base, draws[BASE], room)
            if isinstance(found, Fault):
                raise ModelFailed(found.reason)
            written = found
        answer = writers.answer or writers.base
        step, peeks = settle(
            text,
            written,
            writers.author,
            answer,
            writers.base,
            room,
            end_id,
            abstained=writers.abstained,
            fault=writers.fault,
            signal=writers.signal,
        )
        yield step
        if written.finish_reason is not None:
            return written.finish_reason
    return "length"


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
            found = yield from write_chunk(text, BASE, base, draws[BASE], room)
            if isinstance(found, Fault):
                raise ModelFailed(found.reason)
            written = found
        assert answer is not None
        step, peeks = settle(text, written, author, answer, base, room, end_id, fault=fault, signal=signal)
        yield step
        if written.finish_reason is not None:
            return written.finish_reason
    return "length"
