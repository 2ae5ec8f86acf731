"""Which tokens are deferred: names and numbers against function words, and what assistants changed them to.

Pure functions over traces, which may be a stream: what is kept is counts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from collm.report.trace import Trace
from collm.types import BASE, Step, Unit, unit_of

TokenClass = Literal["number", "capitalised word", "function word", "other word", "punctuation", "space", "special"]
CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)

FUNCTION_WORDS = frozenset(
    """
    a an the this that these those some any no every each either neither both all half such another other same own
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours
    ourselves they them their theirs themselves one ones who whom whose which what whoever whatever
    about above across after against along among around as at before behind below beneath beside besides between
    beyond but by despite down during except for from in inside into like near of off on onto out outside over past
    per round since than through throughout till to toward towards under until up upon via with within without
    and or nor so yet if unless because although though while whereas whether once when whenever where wherever why how
    am is are was were be been being have has had having do does did doing done will would shall should can could may
    might must ought let not there here then thus hence also too very just only even still again ever never always
    much many more most few less least several enough rather quite
    """.split()
)
"""English words that hold a sentence together: determiners, pronouns, prepositions, conjunctions, auxiliaries, and
adverbs of that kind. A closed list: what is not on it counts as a word with a content of its own."""

PART = "\ufffd"
"""Stands for a part of a letter: a token may hold some of the bytes of one."""
_WORD = re.compile(r"(?P<number>\d\w*(?:[.,:]\d+)*)|(?P<word>(?:[^\W\d_]|\ufffd)+(?:['’][^\W\d_]+)*)")
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(?:bos|eos|pad|unk|end_of_turn|start_of_turn)>|\[(?:CLS|SEP|PAD|UNK)\]")


def is_special(piece: str) -> bool:
    """Is this the text of a control token, such as the end of a turn?"""
    return _SPECIAL.fullmatch(piece.strip()) is not None


def token_classes(pieces: Sequence[str]) -> list[TokenClass]:
    """The class of each token of a text: that of the whole word it is a part of, which other tokens may have begun.

    A word is capitalised by its first letter; the first word of a sentence is, too, unless it is a function word.
    Everything that is neither word, number nor white space is punctuation, signs such as "=" included. A token without
    a text of its own, which begins a character, is of the class of the one that completes it.
    """
    shown = [" " * len(piece) if is_special(piece) else piece for piece in pieces]
    words = list(_WORD.finditer("".join(shown)))
    classes: list[TokenClass] = []
    begin = current = parts = 0
    for piece, text in zip(pieces, shown, strict=True):
        if not piece:
            parts += 1
            continue
        first = begin + len(text) - len(text.lstrip())
        while current < len(words) and words[current].end() <= first:
            current += 1
        if not text.strip():
            classes.append("special" if is_special(piece) else "space")
        elif current < len(words) and words[current].start() <= first:
            classes.append(_word_class(words[current]))
        else:
            classes.append("punctuation")
        begin += len(text)
        classes += parts * classes[-1:]
        parts = 0
    return [*classes, *parts * (classes[-1:] or ["space"])]


def _word_class(match: re.Match[str]) -> TokenClass:
    if match["number"]:
        return "number"
    word = match["word"]
    plain = word.lower().replace("’", "'")
    if plain.endswith("n't") or plain.partition("'")[0] in FUNCTION_WORDS:
        return "function word"
    return "capitalised word" if word[0].isupper() else "other word"


@dataclass(frozen=True)
class ClassCounts:
    """Tokens of one class: how many, how many of them an assistant wrote, and wrote otherwise than the base would."""

    tokens: int = 0
    deferred: int = 0
    changed: int = 0

    @property
    def deferred_share(self) -> float:
        return self.deferred / max(1, self.tokens)

    @property
    def changed_share(self) -> float:
        return self.changed / max(1, self.tokens)


@dataclass(frozen=True)
class DeferredToken:
    """A token that the base would have written where it deferred (`base_piece`; None: not known what).

    `deferred` times it deferred there; `own` times it wrote this token itself. `changed_to`: what assistants wrote in
    its place, `(author, piece)` with counts, most frequent first.
    """

    base_piece: str | None
    deferred: int
    own: int
    changed_to: tuple[tuple[tuple[int, str], int], ...]

    @property
    def changed(self) -> int:
        return sum(count for _, count in self.changed_to)


EDGES = tuple(range(-8, 9))
"""Log-odds between the bins of the gate's histogram; what lies beyond is in the outermost two."""


@dataclass(frozen=True)
class TokenFigures:
    """Counts over the tokens of many texts, or over their chunks.

    `classes`: every class, in a fixed order. `deferrals`: by how often they occur. `gates`: `[1+K, bins]`, for each
    author its tokens by the gate's log-odds of deferring at them (see `EDGES`); empty where no gate was computed.
    """

    models: tuple[str, ...]
    texts: int
    tokens: int
    classes: Mapping[TokenClass, ClassCounts]
    deferrals: tuple[DeferredToken, ...]
    gates: tuple[tuple[int, ...], ...]
    unit: Unit = "token"
    """What was counted."""


def token_figures(traces: Iterable[Trace]) -> TokenFigures:
    """Count what was written; each trace is looked at once and not kept."""
    models: tuple[str, ...] = ()
    texts = 0
    tokens: Counter[TokenClass] = Counter()
    deferred: Counter[TokenClass] = Counter()
    changed: Counter[TokenClass] = Counter()
    own: Counter[str] = Counter()
    given_up: Counter[str | None] = Counter()
    replaced: dict[str | None, Counter[tuple[int, str]]] = {}
    gates: Counter[tuple[int, int]] = Counter()
    unit: Unit = "token"
    for trace in traces:
        generation = trace.generation
        unit = unit_of(generation.steps) if unit == "token" else unit
        models = max(models, generation.model_names, key=len)
        texts += 1
        bases = trace.base_pieces or (None,) * len(generation.steps)
        classes = token_classes(generation.pieces)
        for step, piece, base, kind in zip(generation.steps, generation.pieces, bases, classes, strict=True):
            # As it is decoded by itself, as the base's is.
            piece = piece or PART
            tokens[kind] += 1
            if step.gate:
                gates[step.author, _bin(step)] += 1
            if not step.deferred:
                own[piece] += 1
                continue
            deferred[kind] += 1
            meant = base if step.changed or step.base_token_id is None else piece
            given_up[meant] += 1
            if step.changed:
                changed[kind] += 1
                replaced.setdefault(meant, Counter())[step.author, piece] += 1
    return TokenFigures(
        models=models,
        texts=texts,
        tokens=tokens.total(),
        classes={kind: ClassCounts(tokens[kind], deferred[kind], changed[kind]) for kind in CLASSES},
        deferrals=tuple(
            DeferredToken(
                piece, count, 0 if piece is None else own[piece], tuple(replaced.get(piece, Counter()).most_common())
            )
            for piece, count in given_up.most_common()
        ),
        gates=tuple(
            tuple(gates[author, place] for place in range(len(EDGES) + 1))
            for author in range(len(models) if gates else 0)
        ),
        unit=unit,
    )


def _bin(step: Step) -> int:
    """The gate's place in the histogram, `0` (below the first edge) to `len(EDGES)`."""
    defer, stay = sum(step.gate[1:]), step.gate[BASE]
    log_odds = math.inf if stay <= 0 else -math.inf if defer <= 0 else math.log(defer) - math.log(stay)
    # As a threshold is exceeded: of a gate that is even everywhere nothing lies above 0.5, and nothing is deferred.
    return sum(log_odds > edge for edge in EDGES)
