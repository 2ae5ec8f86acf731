"""What flows of chunks are made of (`collm.cuts`): a model is read at a cut, one writes a chunk, which becomes a step.

A writer writes in its own tokens until its next one would open a chunk. So it has to look one token ahead, except
behind bytes where nothing else may come; what it saw is kept, and is its next token if it writes on.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

from collm.cuts import END, require_short
from collm.decoding.chunk_text import ChunkText, Mark
from collm.decoding.collaborative import Ask, ModelFailed, Request, gate_of
from collm.errors import CollmError
from collm.types import BASE, FinishReason, Step
from collm.values import Answer, Draw, Fault, Query, Replies, Reply

FAR = 32
"""Tokens that were written since a chunk, from which on its author looks behind it in a pass of its own: what is held
back may have to be written again, and may hold a stop string."""


class Full(Exception):
    """A view has reached the end of its model's context."""


@dataclass(frozen=True, slots=True)
class Written:
    """A chunk; empty if the text ends in its place.

    `peek`: what its author would write next, if it looked. `cut_off`: there was no room for the rest. `unseen`: it did
    not look, and might have gone on.
    """

    data: bytes
    log_prob: float
    peek: Answer | None = None
    cut_off: bool = False
    unseen: bool = False

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ends with it, if it does."""
        return "stop" if not self.data else "length" if self.cut_off else None


def draw_of(draw: Draw, model: int) -> Draw:
    """How one of the models chooses: each has random numbers of its own, for what one saw of them in looking ahead must
    not tell what another will do. The base's are those that it has alone."""
    return draw if model == BASE else replace(draw, seed=draw.seed ^ (model << 48))


def given_a_cut(answer: Answer) -> Answer:
    """The base's answer at a cut, where something has to open: its doubt is about that alone."""
    return answer._replace(top_log_prob=answer.top_log_prob - answer.log_close) if answer.log_close else answer


def may_open(text: ChunkText, model: int, token_id: int) -> bool:
    return text.cuts.opens(text.last_byte, text.codecs[model].first_bytes[token_id])


def ask_at_cut(text: ChunkText, model: int, draws: Sequence[Draw], num_top: int) -> Ask:
    """What a model would open a chunk with."""
    try:
        text.read(model)
    except CollmError as error:
        return [Fault(str(error))]
    return (yield from _query(text, model, draws[model], text.last_byte, opens=True, num_top=num_top))


def _query(text: ChunkText, model: int, draw: Draw, last_byte: int, *, opens: bool, num_top: int = 0) -> Ask:
    view, limit = text.views[model], text.limits[model]
    if limit is not None and len(view) > limit:
        raise Full
    query = Query(model, view, len(view), draw=draw, num_top=num_top, last_bytes=(last_byte,), opens=opens)
    replies = yield (query,)
    assert replies is not None
    return [reply for [reply] in replies]


def write_chunk(
    text: ChunkText, author: int, answer: Answer, draw: Draw, room: int, *, look: bool = True, num_top: int = 0
) -> Generator[Request, Replies | None, Written | Fault]:
    """One chunk, from the author's first token on; a fault if the author fails within it.

    Args:
        room: tokens of the base that may still be written.
        look: False leaves the look ahead out where a chunk is likely to close (`Written.unseen`).
        num_top: most probable tokens that are told with what is seen ahead, as `ask_at_cut` would tell them.
    """
    codec, free = text.codecs[author], text.cuts.free
    text.begin(author)
    data, log_prob, count, token_id = b"", answer.log_prob - answer.log_close, 1, answer.token_id
    if codec.first_bytes[token_id] == END:
        return Written(b"", log_prob)
    while True:
        text.write(author, token_id)
        piece = codec.pieces[token_id]
        assert piece, "only text is chosen"
        data += piece
        if free[data[-1]]:
            return Written(data, log_prob)
        if count >= room and (author == BASE or _fills(text, data, room)):
            return Written(data, log_prob, cut_off=True)
        if not look and data[-1:].isalnum() and codec.canonical(data) == text.written(author):
            return Written(data, log_prob, unseen=True)
        [reply] = yield from _query(text, author, draw, data[-1], opens=False, num_top=num_top)
        if isinstance(reply, Fault):
            return reply
        if reply is None:  # a tool that says no more
            return Written(data, log_prob)
        if text.cuts.opens(data[-1], codec.first_bytes[reply.token_id]):
            return Written(data, log_prob + reply.log_close, reply)
        token_id, log_prob, count = reply.token_id, log_prob + reply.log_prob, count + 1
        try:
            require_short(count, codec.name)
        except CollmError as error:
            return Fault(str(error))


def _fills(text: ChunkText, data: bytes, room: int) -> bool:
    """Has the beginning of an assistant's chunk so many of the base's tokens? Within a character that cannot be told:
    single bytes would be counted, and of the text but as many bytes be left."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            return False
    try:
        return len(text.codecs[BASE].chunk_ids(data)) >= room
    except CollmError:
        return False  # it has none: that is said of the whole chunk


def settle(
    text: ChunkText,
    written: Written,
    author: int,
    answer: Answer,
    base: Answer | None,
    room: int,
    end_id: int,
    *,
    abstained: bool = False,
    fault: str | None = None,
    signal: float | None = None,
) -> tuple[Step, dict[int, Answer]]:
    """The step of a chunk, and what its author saw ahead, by its number, if that still holds.

    Args:
        answer: the author's at the cut; `base`: the base's, if it was asked.
        room: of the base's tokens; what goes beyond is cut off.
        end_id: the base's token that stands for an end that another model has written.
    """
    codec, data = text.codecs[BASE], written.data
    holds = True
    if not data:
        token_ids: tuple[int, ...] = (answer.token_id if author == BASE else end_id,)
    else:
        try:
            token_ids = text.written(BASE) if author == BASE else codec.chunk_ids(data)
        except CollmError as error:
            raise ModelFailed(str(error)) from error
        holds = text.close(author, data)
        if len(token_ids) > room:
            token_ids = token_ids[:room]
            data = b"".join(codec.pieces[token_id] or b"" for token_id in token_ids)
    text.length += len(token_ids)
    step = Step(
        token_ids[0],
        author,
        written.log_prob,
        () if base is None else gate_of(base.log_gate),
        None if base is None else base.top_token_id,
        abstained,
        fault,
        signal=signal,
        # An assistant's are no tokens of the base.
        top=answer.top if author == BASE else (),
        token_ids=token_ids,
        data=data,
        token_lengths=tuple(len(codec.pieces[token_id] or b"") for token_id in token_ids),
    )
    return step, {author: written.peek} if holds and written.peek is not None else {}


@dataclass(slots=True)
class Held:
    """A chunk whose author has not looked behind it, and what was written since: not told to anybody yet.

    The author looks behind it in the pass that it needs anyway when it is asked next. Where it would have gone on with
    the chunk, all is taken back to `mark`, and written again with a look.

    Args:
        mark: in front of the chunk; `peeks`: what was known there of the models' next tokens.
        last_byte: of the chunk, which ends its author's view.
    """

    author: int
    mark: Mark
    peeks: dict[int, Answer]
    last_byte: int
    steps: list[Step]

    def closed_by(self, text: ChunkText, verdict: Reply) -> bool:
        """Did the chunk end there? Then its step is whole."""
        if not isinstance(verdict, Answer):
            return False
        if not text.cuts.opens(self.last_byte, text.codecs[self.author].first_bytes[verdict.token_id]):
            return False
        first = self.steps[0]
        self.steps[0] = first._replace(log_prob=first.log_prob + verdict.log_close)
        return True

    def look(self, text: ChunkText, draws: Sequence[Draw]) -> Ask:
        """What the author would have written behind the chunk, in a pass of its own."""
        return (yield from _query(text, self.author, draws[self.author], self.last_byte, opens=False))

    def look_and_open(self, text: ChunkText, draws: Sequence[Draw]) -> Ask:
        """The same, and what it would open the next chunk with: in one pass, unless that would be a long one."""
        model, view = self.author, text.views[self.author]
        begin, limit = len(view), text.limits[self.author]
        if len(text.chunks) == self.mark.chunks + 1:  # nothing was written since
            [verdict] = yield from self.look(text, draws)
            return [verdict, verdict]
        try:
            rows = len(text.read(model)) - begin + 1
        except CollmError:
            rows = FAR
        if rows >= FAR or (limit is not None and len(view) > limit):
            text.unread(model, self.mark.chunks + 1, begin)
            [verdict] = yield from self.look(text, draws)
            return [verdict, None]
        lasts = (self.last_byte, *[-1] * (rows - 2), text.last_byte)
        query = Query(model, view, len(view), rows, draws[model], last_bytes=lasts, opens=True)
        replies = yield (query,)
        assert replies is not None
        return [replies[0][0], replies[0][-1]]
