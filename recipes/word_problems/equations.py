"""Worked sums as the word problems write them: `12 + 7 = 19`, one or more lines, and `#### 19`; seeded, endless.

Numbers and operators come in about the proportions of the training problems: mostly whole numbers of one to four
digits, some decimals, products of small numbers, divisions that mostly come out even, results of more than four
decimals rounded to four. A fixed fiftieth of all sums, chosen by a hash of their left-hand side, is held out (never
one of the tables up to 9 x 9: those are learnt by heart, not worked out).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from typing import TypeVar

T = TypeVar("T")

OPERATORS = {"+": 0.29, "-": 0.28, "*": 0.22, "/": 0.21}
HELD_OUT = 50
"""One sum in so many is never trained on."""

_DIGITS = {1: 0.27, 2: 0.45, 3: 0.16, 4: 0.09, 5: 0.03}
_PLACES = {1: 0.4, 2: 0.4, 3: 0.05, 4: 0.15}
_FACTORS = {(1, 1): 0.34, (1, 2): 0.16, (2, 1): 0.16, (2, 2): 0.12, (1, 3): 0.07, (3, 1): 0.06, (2, 3): 0.02}
_FACTORS |= {(3, 2): 0.02, (1, 4): 0.02, (4, 1): 0.03}
_QUOTIENTS = {(1, 1): 0.5, (2, 1): 0.2, (1, 2): 0.12, (2, 2): 0.07, (3, 1): 0.06, (4, 1): 0.02, (3, 2): 0.03}
"""Digits of quotient and divisor."""


def _pick(rng: random.Random, weights: dict[T, float]) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]


def _whole(rng: random.Random, digits: int) -> Decimal:
    number = rng.randrange(10 ** (digits - 1) if digits > 1 else 1, 10**digits)
    # Round numbers are commoner in problems than by chance.
    if digits > 2 and rng.random() < 0.25:
        number -= number % 10 ** rng.randrange(1, digits)
    return Decimal(number)


def _decimal(rng: random.Random) -> Decimal:
    places = _pick(rng, _PLACES)
    whole = 0 if places > 2 or rng.random() < 0.45 else rng.randrange(1, 100)
    return Decimal(whole) + Decimal(rng.randrange(1, 10**places)) / 10**places


def written(number: Decimal) -> str:
    """At most four decimals, none of them a trailing zero: as the problems write numbers."""
    text = format(number.quantize(Decimal("0.0001"), ROUND_HALF_UP), "f").rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def result(left: Decimal, operator: str, right: Decimal) -> Decimal:
    """As written, so that what follows works with the number that the reader sees."""
    exact = {"+": left + right, "-": left - right, "*": left * right, "/": left / right if right else Decimal(0)}
    return Decimal(written(exact[operator]))


def _operands(rng: random.Random, operator: str, given: Decimal | None) -> tuple[Decimal, Decimal]:
    """Two numbers that make a plausible sum; one of them is `given`, if anything is."""
    decimal = rng.random() < 0.1

    def number(digits: int) -> Decimal:
        return _decimal(rng) if decimal and rng.random() < 0.75 else _whole(rng, digits)

    if given is not None:
        other = number(_pick(rng, _DIGITS if operator in "+-" else {1: 0.8, 2: 0.2}))
        if operator == "+" and rng.random() < 0.3:
            return other, given
        if operator == "-" and other > given:
            return other, given
        if operator == "/" and given == given.to_integral_value() and rng.random() < 0.7:
            divisors = [d for d in range(2, 13) if given % d == 0]
            other = Decimal(rng.choice(divisors or [1]))
        return given, other
    if operator == "*":
        left, right = (number(digits) for digits in _pick(rng, _FACTORS))
        return left, right
    if operator == "/":
        quotient, divisor = (number(digits) for digits in _pick(rng, _QUOTIENTS))
        kind = rng.random()
        if kind < 0.12:  # it does not come out even
            return _whole(rng, rng.choice((1, 2, 2, 3))), _whole(rng, rng.choice((1, 1, 1, 2)))
        return result(quotient, "*", divisor), divisor
    left, right = (number(_pick(rng, _DIGITS)) for _ in range(2))
    if operator == "-" and left < right and rng.random() < 0.98:
        left, right = right, left
    return left, right


def held_out(left: str, operator: str, right: str) -> bool:
    """Is this sum kept for testing?"""
    table = len(right) == 1 and (len(left) == 1 or (operator == "/" and int(left.replace(".", "")) <= 81))
    return not table and zlib.crc32(f"{left} {operator} {right}".encode()) % HELD_OUT == 0


def equation(rng: random.Random, given: Decimal | None = None, *, test: bool = False) -> tuple[str, Decimal]:
    """The left-hand side `12 + 7` of a sum that is to be trained on (or, for `test`, that is held out), its result."""
    while True:
        operator = _pick(rng, OPERATORS)
        left, right = _operands(rng, operator, given)
        sides = written(left), written(right)
        if (operator == "/" and not right) or held_out(sides[0], operator, sides[1]) != test:
            continue
        outcome = result(left, operator, right)
        if abs(outcome) < 10**6 and (outcome or operator != "/"):
            return f"{sides[0]} {operator} {sides[1]}", outcome


def solution(rng: random.Random) -> Iterator[tuple[str, str]]:
    """One worked problem as (before the result, result and line end) for each line; the last line is `#### RESULT`."""
    value: Decimal | None = None
    for _ in range(rng.choices((1, 2, 3), (0.6, 0.32, 0.08))[0]):
        left, value = equation(rng, value if rng.random() < 0.8 else None)
        yield f"{left} =", f" {written(value)}\n"
    assert value is not None
    yield "####", f" {written(value)}"


def test_sums(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """`count` held-out sums as (`12 + 7 =`, ` 19`), all different."""
    rng = random.Random(f"test {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        left, value = equation(rng, test=True)
        found[f"{left} ="] = f" {written(value)}"
    return list(found.items())
