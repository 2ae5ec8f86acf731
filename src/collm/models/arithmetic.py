"""Arithmetic in running text: find the expression before an "=", evaluate it exactly, write the number out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

MAX_EXPRESSION = 120
"""Characters; longer ones are left alone, which also bounds the size of the exact fractions."""

_LEXEME = re.compile(r"\s+|\$\s+(?=[\d.])|\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?|\*\*|[-+*/×÷−–xX()^]")
_OPERATORS = {"+": "+", "-": "-", "−": "-", "–": "-", "*": "*", "×": "*", "x": "*", "X": "*", "/": "/", "÷": "/"}
_WRITTEN = re.compile(r"\s?(?:\\?\$)?(-?(?:\\?\$)?[\d,]*\.?\d*|-?\\)")
_BULLET = re.compile(r"\s*(?:[-+*•–]|\d+[.)])\s+")
_GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+")
_UNIT = re.compile(r"(?<=[\d%])\s*\\(?:text|textrm|mathrm|mbox)\{[^{}\d]*\}")
"""A unit behind a number, in LaTeX."""
_MIXED = re.compile(r"(?<=\d)\s*\\[dt]?frac(?![A-Za-z])")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_COMMAND = re.compile(r"\\(?:(?:(times|cdot|ast)|(div)|left|right)(?![A-Za-z])|[,;:! ]|([$%]))")


def _plain(latex: str) -> str:
    """Arithmetic in LaTeX in the signs that are read here; what else there is stays as it is and is not understood."""
    text = _UNIT.sub("", latex)
    text = _MIXED.sub("?", text)  # one and a half, or half of one
    while (simpler := _FRACTION.sub(r"((\1)/(\2))", text)) != text:
        text = simpler

    def sign(match: re.Match[str]) -> str:
        times, divided, mark = match.groups()
        return "*" if times else "/" if divided else mark or " "

    return _COMMAND.sub(sign, text)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """"number", "(", ")", or one of + - * /."""
    text: str
    spaced: bool
    """White space stands before it."""


class _Unparsable(ValueError):
    """Not an arithmetic expression; never leaves this module."""


class _Parser:
    """Recursive descent over exact fractions: sums of products of signed atoms."""

    def __init__(self, tokens: list[_Token], percent_as_unit: bool) -> None:
        self.tokens, self.at, self.operators, self.percent_as_unit = tokens, 0, 0, percent_as_unit

    def parse(self) -> Fraction:
        value = self.sum()
        if self.at != len(self.tokens):
            raise _Unparsable
        return value

    def peek(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    def take(self) -> _Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            self.operators += 1
            value = value + self.product() if self.take().kind == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while True:
            kind = self.peek()
            # "2(3 + 4)" multiplies, "step 2 (3 + 4)" does not.
            implicit = kind == "(" and not self.tokens[self.at].spaced
            if kind not in ("*", "/") and not implicit:
                return value
            self.operators += 1
            if not implicit:
                self.take()
            factor = self.signed()
            if kind == "/" and factor == 0:
                raise _Unparsable
            value = value / factor if kind == "/" else value * factor

    def signed(self) -> Fraction:
        if self.peek() == "-":
            self.take()
            if self.at < len(self.tokens) and self.tokens[self.at].spaced:
                raise _Unparsable  # "- 3" is a bullet or a dash, "-3" a number
            return -self.atom()
        return self.atom()

    def atom(self) -> Fraction:
        if self.peek() == "(":
            self.take()
            value = self.sum()
            if self.peek() != ")":
                raise _Unparsable
            self.take()
            return value
        if self.peek() != "number":
            raise _Unparsable
        text = self.take().text
        digits = text.strip("$%")
        if not _GROUPED.fullmatch(digits):
            raise _Unparsable
        value = Fraction(digits.replace(",", ""))
        return value / 100 if text.endswith("%") and not self.percent_as_unit else value


def _lex(text: str) -> tuple[list[_Token], int]:
    """The tokens of the longest run of lexemes that ends `text`, and where that run starts."""
    tokens: list[_Token] = []
    start, at, spaced = 0, 0, True
    while at < len(text):
        match = _LEXEME.match(text, at)
        if match is None:
            tokens, at, spaced = [], at + 1, False
            start = at
        else:
            lexeme, at = match.group(), match.end()
            if lexeme[-1].isspace():
                spaced = True
                continue
            other = lexeme if lexeme in "()" else "number" if lexeme[-1] in "0123456789%" else "?"
            kind = _OPERATORS.get(lexeme, other)
            tokens.append(_Token(kind, lexeme, spaced))
            spaced = False
    return tokens, start


@dataclass(frozen=True, slots=True)
class _Value:
    value: Fraction
    dollar: bool
    percent: bool
    commas: bool


def _evaluate(text: str) -> _Value | None:
    """The value of the longest arithmetic expression with an operator that ends `text` and is a whole by itself."""
    bullet = _BULLET.match(text)
    text = text[bullet.end() if bullet else 0 :].rstrip()
    cut = len(text) > MAX_EXPRESSION
    text = text[-MAX_EXPRESSION:]
    tokens, start = _lex(text)
    if cut and start == 0:
        return None
    if tokens and not tokens[0].spaced and re.search(r"[^\W\d_]$|\d:$", text[:start]):
        if tokens[0].kind != "*" or len(tokens) < 2 or not tokens[1].spaced:
            return None  # "A3 + 4", "10:30 + 5"
        tokens = tokens[1:]  # "box 3 + 4": the x belongs to the word
    while tokens:
        numbers = [token.text for token in tokens if token.kind == "number"]
        kinds = {token.kind for token in tokens}
        as_unit = all(number.endswith("%") for number in numbers) and not kinds & {"*", "/"}
        parser = _Parser(tokens, as_unit)
        try:
            value = parser.parse()
        except _Unparsable:
            # Only an opening parenthesis can be left out: what follows "6 apples + " or "x - " is not a whole.
            if tokens[0].kind != "(":
                return None
            tokens = tokens[1:]
            continue
        if parser.operators == 0:
            return None
        dollars = sum("$" in number for number in numbers)
        ratio = dollars > 1 and "/" in kinds  # $560 / $80 is 7, not $7
        return _Value(value, dollars > 0 and not ratio, as_unit, any("," in number for number in numbers))
    return None


def format_number(value: Fraction, decimals: int, *, commas: bool = False) -> str:
    """`value` rounded half-up (away from zero) to `decimals` places, without trailing zeros."""
    scaled = (abs(value) * 10**decimals * 2 + 1).__floor__() // 2
    whole, fraction = divmod(scaled, 10**decimals)
    text = f"{whole:,}" if commas else str(whole)
    if fraction:
        text += "." + f"{fraction:0{decimals}d}".rstrip("0")
    return f"-{text}" if value < 0 and scaled else text


@lru_cache(maxsize=65536)
def continuation(line: str, decimals: int = 4) -> str | None:
    """What a calculator writes next after `line`, or None where it has nothing to say.

    It speaks between an "=" that follows an expression and the end of that number: `"56 * 9 ="` -> `" 504"`,
    `"56 * 9 = 5"` -> `"04"`, `"56 * 9 = 504"` -> None. Spacing, `$`, `%` and thousands commas follow the expression,
    which may be LaTeX: `r"\\( 12 \times \\$35 ="` -> `r" \\$420"`.
    """
    before, sign, written = line.rpartition("=")
    if not sign or before[-1:] in tuple("<>!=:~") or not _WRITTEN.fullmatch(written):
        return None
    expression = before.rpartition("=")[2]
    is_latex = "\\" in expression
    found = _evaluate(_plain(expression) if is_latex else expression)
    if found is None:
        return None
    head = (" " if before.endswith(" ") else "") if not written else ""
    minus = "-" if found.value < 0 else ""
    plain = format_number(found.value, decimals).removeprefix("-")
    grouped = format_number(found.value, decimals, commas=True).removeprefix("-")
    minus = "" if plain == "0" else minus
    escape = "\\" if is_latex and re.search(r"\\[$%]", expression) else ""
    unit = escape + "%" if found.percent else ""
    # The expression's own style first; then what the text before may have begun instead.
    amounts = (grouped, plain) if found.commas else (plain, grouped)
    marks = (escape + "$", "") if found.dollar else ("", "\\$" if is_latex else "$")
    so_far = written.strip()
    for mark in marks:
        for amount in amounts:
            for number in (f"{minus}{mark}{amount}{unit}", f"{mark}{minus}{amount}{unit}"):
                if number.startswith(so_far):
                    return head + number[len(so_far) :] or None
    return None
