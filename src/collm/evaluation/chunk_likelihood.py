"""How likely given texts are to models with different tokenizers: by the law of chunks (`collm.cuts`), or alone."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from collm.cuts import START, require_short
from collm.errors import CollmError
from collm.evaluation.likelihood import LAWS, GivenText, Likelihood, likelihoods
from collm.gate import log_posterior, token_nll
from collm.llm.sharing import Sharing
from collm.models.codec import ByteCodec
from collm.types import BASE
from collm.values import Answer, Fault, LanguageModel, Query, Reply
from collm.views import View


@dataclass(frozen=True, slots=True)
class _Scored:
    """One chunk under one model; `log_gate`: of the base."""

    log_score: float
    right: bool
    log_gate: tuple[float, ...] | None = None


def chunk_likelihoods(
    models: Sequence[LanguageModel], sharing: Sharing, texts: Sequence[GivenText], *, alone: int | None = None
) -> Iterator[Likelihood]:
    """As `likelihoods`: `texts` have completions in the base's tokens. That the text goes on with a new chunk, or ends,
    is part of what is scored; within a chunk nothing is known of who writes.

    `greedy`: every chunk is more probable than all others together, or is what every model would write. `credit` counts
    the base's tokens.

    Raises:
        CollmError: a tokenizer does not keep a text or makes too long a chunk of it, or a model cannot answer.
    """
    if alone is not None:
        own = [GivenText(text.prompts, tuple(_own(sharing, text, alone))) if alone != BASE else text for text in texts]
        yield from likelihoods(models, own, alone=alone, batch_size=1)
        return
    for text in texts:
        data = sharing.codecs[BASE].data(text.completion)
        offsets = sharing.cuts.offsets(data)
        each = [
            _of_model(model, z, text, _own(sharing, text, z), data, offsets, sharing.codecs[z])
            for z, model in enumerate(models)
        ]
        lengths = _places(sharing.codecs[BASE], text.completion, offsets)
        yield _joined(each, [b - a for a, b in pairwise(lengths)])


def tokens_read(sharing: Sharing, completion: Sequence[int]) -> list[int]:
    """Of each model, for a completion in the base's tokens: all of its own, for the last one may have to close a chunk.

    Raises:
        CollmError: a tokenizer does not keep the text.
    """
    text = GivenText(((0,),) * len(sharing.codecs), tuple(completion))
    return [len(_own(sharing, text, model)) for model in range(len(sharing.codecs))]


def chunk_windows(
    sharing: Sharing, beginnings: Sequence[Sequence[int]], text: str, contexts: Sequence[int | None]
) -> Iterator[GivenText]:
    """A whole text to be scored, in windows that fit into every model's context, each chunk predicted once.

    The first window stands behind `beginnings`, the others behind what each model can hold of the text before, at least
    one token.

    Raises:
        CollmError: a tokenizer does not keep the text, or a context cannot hold one of its chunks.
    """
    data = text.encode()
    offsets = sharing.cuts.offsets(data)
    own = [codec.encode(text) for codec in sharing.codecs]
    at = [_places(codec, ids, offsets) for codec, ids in zip(sharing.codecs, own, strict=True)]
    limits = [sys.maxsize if context is None else context for context in contexts]
    first = 0
    while first < len(offsets) - 1:
        before = [1] * len(own) if first else [len(beginning) for beginning in beginnings]
        room = [limit - taken for limit, taken in zip(limits, before, strict=True)]
        stop = min(bisect_right(places, places[first] + free) - 1 for places, free in zip(at, room, strict=True))
        if stop <= first:
            chunk = data[offsets[first] : offsets[first + 1]].decode(errors="replace")
            raise CollmError(f"the chunk {chunk!r} is longer than a context: score with a larger max_model_len")
        prompts = [
            tuple(ids[max(0, places[stop] - limit) : places[first]] if first else beginning)
            for ids, places, beginning, limit in zip(own, at, beginnings, limits, strict=True)
        ]
        last_byte = data[offsets[first] - 1] if first else START
        yield GivenText(tuple(prompts), tuple(own[BASE][at[BASE][first] : at[BASE][stop]]), last_byte)
        first = stop


def _own(sharing: Sharing, text: GivenText, model: int) -> Sequence[int]:
    """The completion in a model's own tokens."""
    base, codec = sharing.codecs[BASE], sharing.codecs[model]
    if not all(map(base.is_text, text.completion)):
        raise sharing.refuse("a text with special tokens in it means nothing to the other models")
    if codec.tokenizer is base.tokenizer:
        return text.completion
    try:
        return codec.encode(base.data(text.completion).decode())
    except UnicodeDecodeError as error:
        raise CollmError(f"a text to be scored ends within a character: {error}") from None


def _places(codec: ByteCodec, ids: Sequence[int], offsets: Sequence[int]) -> list[int]:
    place = {end: n for n, end in enumerate([0, *codec.lengths(ids)])}
    return [place[offset] for offset in offsets]


def _of_model(
    model: LanguageModel,
    number: int,
    text: GivenText,
    ids: Sequence[int],
    data: bytes,
    offsets: Sequence[int],
    codec: ByteCodec,
) -> list[_Scored | None]:
    """The chunks of a text; None where the model abstains."""
    at = _places(codec, ids, offsets)
    require_short(max(b - a for a, b in pairwise(at)), codec.name)
    # Within a chunk nothing is to open: any byte will do.
    last = [text.last_byte] + [START] * len(ids)
    for place, offset in zip(at[1:], offsets[1:], strict=True):
        last[place] = data[offset - 1]
    prompt = text.prompts[number]
    view = View([*prompt, *ids])
    replies: list[Reply] = []
    for start in range(0, len(last), LAWS):
        part = last[start : start + LAWS]
        given = [*ids, 0][start : start + len(part)]
        length = len(prompt) + start + len(part) - 1
        [found] = model.predict([Query(number, view, length, len(part), given=given, last_bytes=part)])
        replies += found
    model.release(view)
    for reply in replies:
        if isinstance(reply, Fault):
            raise CollmError(f"the likelihood cannot be computed: {reply.reason}")
    return [_chunk(replies, ids, a, b, last[b], codec) for a, b in zip(at[:-1], at[1:], strict=True)]


def _chunk(
    replies: Sequence[Reply], ids: Sequence[int], start: int, stop: int, last: int, codec: ByteCodec
) -> _Scored | None:
    answers = [reply if isinstance(reply, Answer) else None for reply in replies[start : stop + 1]]
    first, closing = answers[0], answers[-1]
    if first is None:
        return None
    total, right = -first.log_close, first.top_token_id == ids[start]
    for n, answer in enumerate(answers[:-1]):
        given = None if answer is None else answer.given_log_prob
        total += -torch.inf if given is None else given
        right = right and (not n or (answer is not None and answer.token_id == ids[start + n]))
    if closing is not None:
        assert codec.cuts is not None
        total += closing.log_close
        right = right and codec.cuts.opens(last, codec.first_bytes[closing.token_id])
    return _Scored(total, right, first.log_gate)


def _joined(each: Sequence[Sequence[_Scored | None]], lengths: Sequence[int]) -> Likelihood:
    total, greedy, credit = 0.0, True, torch.zeros(len(each), dtype=torch.float64)
    for chunk, length in zip(zip(*each, strict=True), lengths, strict=True):
        base = chunk[BASE]
        assert base is not None and base.log_gate is not None, "the marginal needs a base with a gate"
        weights = [w if own is not None else -torch.inf for w, own in zip(base.log_gate, chunk, strict=True)]
        gate = torch.tensor([weights], dtype=torch.float64).log_softmax(-1)
        scores = torch.tensor([[-torch.inf if own is None else own.log_score for own in chunk]], dtype=torch.float64)
        log_prob = -float(token_nll(gate, scores))
        total += log_prob
        greedy = greedy and (log_prob > -0.6931 or all(own is None or own.right for own in chunk))
        credit += length * log_posterior(gate, scores).exp()[0]
    return Likelihood(total, greedy, tuple(credit.tolist()))
