"""Which tokens are deferred: kinds of tokens, what they were changed to, the gate's histogram."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collm.report.tokens import CLASSES, EDGES, DeferredToken, token_classes, token_figures
from collm.report.trace import Trace
from collm.types import Generation, Step

KINDS = {"n": "number", "N": "capitalised word", "f": "function word", "w": "other word", ".": "punctuation"}
KINDS |= {" ": "space", "x": "special"}


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        ("The| capital| of| France| is| Paris|.", "fwfNfN."),
        ("Ab|i|dj|an|'|s| po|pulation", "NNNNNNww"),
        ("|1|,|234|.|5| km|2", "nnnnnwn"),
        ("5|6| *| |9| =|\n|####| 504|<|im_end|>", None),
        ("12|th| 3|rd", "nnnn"),
        ("don|'|t| can|’|t| it|'s", "ffffffff"),
        ("THE| Of", "ff"),
        ("S|\ufffd|\ufffd|o| \ufffd|lle", "NNNNww"),
        ("(|no|)|!?| −|$|5", ".f....n"),
        (" |\n\n|\t", "   "),
        ("wait|</s>", "wx"),
    ],
)
def test_a_token_is_of_the_kind_of_its_whole_word(tokens: str, kinds: str | None) -> None:
    pieces = [piece for piece in tokens.split("|") if piece]
    if kinds is None:  # control tokens hold a "|" themselves
        pieces, kinds = ["5", "6", " *", " ", "9", " =", "\n", "####", " 504", "<|im_end|>"], "nn. n. .nx"
    assert token_classes(pieces) == [KINDS[kind] for kind in kinds]


@pytest.mark.parametrize(
    ("pieces", "kinds"),
    [
        (("S", "", "ö", "o", "", "", " 𝛼", "."), "NNNNwww."),
        (("", "", "ㅸ", " ", "", "3"), "www nn"),
        (("a", "", "\ufffd"), "www"),
        (("b", ""), "ww"),
        (("",), " "),
    ],
)
def test_the_beginning_of_a_character_is_of_its_kind(pieces: tuple[str, ...], kinds: str) -> None:
    """As texts come from the decoder: a token that holds the first bytes of a character has no text. It was space."""
    assert token_classes(pieces) == [KINDS[kind] for kind in kinds]


def test_the_beginning_of_a_character_is_told_as_such() -> None:
    """The base's own choice is decoded by itself, as a sign for a part; it was compared with an empty text."""
    trace = written(("", 0, ""), ("ö", 0, "ö"), ("", 1, ""), ("ä", 1, "ö"), ("x", 1, "\ufffd"))
    [part, other] = token_figures([trace]).deferrals
    assert part == DeferredToken("\ufffd", 2, 1, (((1, "x"), 1),))
    assert other == DeferredToken("ö", 1, 1, (((1, "ä"), 1),))


@given(st.text(), st.lists(st.integers(0, 30)))
def test_how_a_text_is_cut_does_not_change_its_words(text: str, cuts: list[int]) -> None:
    """Every letter and digit is of the same kind however tokens are cut, as long as no control token comes about."""
    text = re.sub(r"[<>\[\]]", "", text)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    single = token_classes(list(text))
    for piece, start, kind in zip(pieces, places, token_classes(pieces), strict=False):
        first = next((i for i, letter in enumerate(piece) if not letter.isspace()), 0)
        assert kind == single[start + first]


def written(*tokens: tuple[str, int, str | None], gates: bool = True) -> Trace:
    """Tokens (piece, author, what the base would have written); its gate leaves 0.25 to each of two assistants."""
    names = {piece: i for i, piece in enumerate({p for piece, _, base in tokens for p in (piece, base)})}
    steps = tuple(
        Step(names[piece], author, -1.0, (0.5, 0.25, 0.25) if gates else (), None if base is None else names[base])
        for piece, author, base in tokens
    )
    pieces = tuple(piece for piece, _, _ in tokens)
    bases = tuple(base if step.changed else None for step, (_, _, base) in zip(steps, tokens, strict=True))
    generation = Generation("".join(pieces), steps, pieces, "stop", 1, ("base", "a", "b"))
    return Trace("t", generation, "p", bases)


TRACES = [
    written((" Paris", 1, " Lyon"), (" is", 0, " is"), (" 5", 2, " 6"), (" 6", 0, " 6")),
    written((" Rome", 2, " Lyon"), (" Lyon", 1, " Lyon"), (" 7", 2, " 6"), (" 5", 2, " 6"), (" x", 1, None)),
]


def test_figures_by_hand() -> None:
    figures = token_figures(iter(TRACES))
    assert (figures.models, figures.texts, figures.tokens) == (("base", "a", "b"), 2, 9)
    counts = {kind: (c.tokens, c.deferred, c.changed) for kind, c in figures.classes.items() if c.tokens}
    assert counts == {
        "capitalised word": (3, 3, 2),
        "function word": (1, 0, 0),
        "number": (4, 3, 3),
        "other word": (1, 1, 0),
    }
    assert figures.classes["capitalised word"].changed_share == pytest.approx(2 / 3)
    assert figures.classes["space"].deferred_share == 0.0 and tuple(figures.classes) == CLASSES
    assert figures.deferrals == (
        DeferredToken(" Lyon", 3, 0, (((1, " Paris"), 1), ((2, " Rome"), 1))),
        DeferredToken(" 6", 3, 1, (((2, " 5"), 2), ((2, " 7"), 1))),
        DeferredToken(None, 1, 0, ()),
    )
    assert [d.changed for d in figures.deferrals] == [2, 3, 0]


def test_the_histogram_counts_every_token_by_its_author() -> None:
    figures = token_figures(TRACES)
    at_even = EDGES.index(0)  # log-odds of exactly 0 lie in the bin that ends there
    assert [list(row)[at_even] for row in figures.gates] == [2, 3, 4]
    assert sum(map(sum, figures.gates)) == 9
    assert token_figures([written(("a", 1, "b"), gates=False)]).gates == ()


@pytest.mark.parametrize(
    ("gate", "place"), [((1.0, 0.0), 0), ((0.0, 1.0), -1), ((1 / (1 + math.e**2.5), 1 / (1 + math.e**-2.5)), 11)]
)
def test_sure_gates_are_in_the_outermost_bins(gate: tuple[float, float], place: int) -> None:
    trace = Trace("t", Generation("a", (Step(0, 0, 0.0, gate),), ("a",), "stop", 1, ("b", "a")), "p")
    [row, _] = token_figures([trace]).gates
    assert len(row) == len(EDGES) + 1 and row[place] == 1


def test_what_a_threshold_does_not_exceed_is_counted_below_it() -> None:
    """A gate that has learnt nothing is 0.5 at every token: all are the base's, and lie left of the line at 0.5."""
    steps = (Step(0, 0, -1.0, (0.5, 0.5)),)
    figures = token_figures([Trace("a", Generation("a", steps, ("a",), "stop", 1, ("base", "x")), "p")])
    assert figures.gates[0].index(1) == EDGES.index(0)  # the bin that ends there


def test_no_texts_are_no_error() -> None:
    figures = token_figures([])
    assert (figures.texts, figures.tokens, figures.deferrals, figures.gates) == (0, 0, (), ())


@given(st.lists(st.tuples(st.sampled_from(["a", "B", "7"]), st.integers(0, 2), st.sampled_from(["a", "B", "7"]))))
def test_counts_add_up(tokens: list[tuple[str, int, str]]) -> None:
    figures = token_figures([written(*tokens)])
    steps = written(*tokens).generation.steps
    assert sum(c.tokens for c in figures.classes.values()) == figures.tokens == len(steps)
    deferred = sum(step.deferred for step in steps)
    assert sum(c.deferred for c in figures.classes.values()) == sum(d.deferred for d in figures.deferrals) == deferred
    changed = sum(step.changed for step in steps)
    assert sum(c.changed for c in figures.classes.values()) == sum(d.changed for d in figures.deferrals) == changed
    by_author = Counter(step.author for step in steps)
    assert [sum(row) for row in figures.gates] == [by_author[author] for author in range(len(figures.gates))]
