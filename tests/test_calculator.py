"""The arithmetic behind the calculator, and the calculator as a language model."""

from __future__ import annotations

import re
import textwrap
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from collm.models.arithmetic import continuation, format_number
from collm.models.tools import Calculator
from collm.values import Answer, Query


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        ("56 * 9 =", " 504"),
        ("56 * 9 = ", "504"),
        ("56 * 9 = 5", "04"),
        ("56 * 9 = 504", None),  # complete
        ("56 * 9 = 505", None),  # somebody wrote something else
        ("56*9=", "504"),
        ("48/2 = ", "24"),
        ("10 / 3 = ", "3.3333"),
        ("2 / 3 = ", "0.6667"),
        ("5 - 8 =", " -3"),
        ("5 - 8 = -", "3"),
        ("-2 * -15 = ", "30"),
        ("-12 + 37 = ", "25"),
        ("1 / 8 = ", "0.125"),
        ("2 + 3 * 4 = ", "14"),
        ("(2 + 3) * 4 = ", "20"),
        ("2(3 + 4) = ", "14"),
        ("3 x 4 = ", "12"),
        ("3 × 4 ÷ 2 = ", "6"),
        ("2x4=", "8"),
        ("$5 * 3 =", " $15"),
        ("$5 * 3 = ", "$15"),
        ("$5 * 3 = $", "15"),
        ("5 * 3 = $", "15"),
        ("$ 5 * 3 = 1", "5"),
        ("$560 / $80 = ", "7"),
        ("$9 / 2 = ", "$4.5"),
        ("1,000 * 3 = ", "3,000"),
        ("1000 * 3 = ", "3000"),
        ("1000 * 3 = 3,", "000"),
        ("50 * 20% = ", "10"),
        ("100% - 20% = ", "80%"),
        ("100% - 20% = 80", "%"),
        (".5 * 4 = ", "2"),
        ("5 + 3 = 8 * 2 = ", "16"),  # a chain: the last link counts
        ("So the total is 56 * 9 = ", "504"),
        ("a box 3 + 4 = ", "7"),
        ("Total:3+4=", "7"),
        ("- 3 + 4 = ", "7"),  # a bullet
        ("2. 3 + 4 = ", "7"),
        ("-3 + 4 = ", "1"),
        ("He has (3 + 4 = ", "7"),
        ("0.1 + 0.2 = ", "0.3"),
        ("0.00001 - 0.00002 = ", "0"),
        ("9 / 0 = ", None),
        ("56 = ", None),
        ("56 * = ", None),
        ("3x = ", None),
        ("x - 3 + 4 = ", None),  # only a part of an expression can be read
        ("6 apples + 3 * 4 = ", None),
        ("1 1/2 * 4 = ", None),
        ("A3 + 4 = ", None),
        ("10:30 + 5 = ", None),
        ("2 ^ 3 + 1 = ", None),
        ("2 ** 3 = ", None),
        ("5 eggs x 3 + 2 = ", None),
        ("3 + 4 == ", None),
        ("3 + 4 >= ", None),
        ("1,00 + 3 = ", None),
        ("5 + 3 = 8 apples", None),
        ("3 + 4", None),
        ("#### 504", None),
        ("", None),
        ("1 + " * 100 + "1 =", None),  # longer than it looks back: not a part of it either
    ],
)
def test_continuation(line: str, rest: str | None) -> None:
    assert continuation(line) == rest


@pytest.mark.parametrize(
    ("line", "rest"),
    [
        (r"so \( 12 \times 35 =", " 420"),
        (r"\[ 5\cdot 20 = ", "100"),
        (r"\[ 60 \div 8 = 7", ".5"),
        (r"\( 60 \times \frac{3}{4} =", " 45"),
        (r"\(\frac{40}{4} = ", "10"),
        (r"\[ \dfrac{\frac{12}{2}}{3} + 1 =", " 3"),
        (r"\left(2 + 3\right) \times 4 =", " 20"),
        (r"\[ \frac{70 \text{ apples}}{7 \text{ weeks}} =", " 10"),
        (r"8 \text{ games/daughter} \times 2 \text{ daughters} = ", "16"),
        (r"\text{Increase in year 2} = 24 \times 0.50 =", " 12"),
        (r"\$5 \times 3 =", r" \$15"),
        (r"\$5 \times 3 = \$", "15"),
        (r"\$5 \times 3 = \$1", "5"),
        (r"\$5 \times 3 = ", r"\$15"),
        (r"5 \times 3 = \$", "15"),
        (r"\$5 \times 3 = 1", "5"),
        ("\\$5 \\times 3 = \\", "$15"),  # the tokens of a dollar may part
        (r"20\% + 5\% =", r" 25\%"),
        ("12 \\times 3 = 36 \\", None),
        (r"12 \times x =", None),
        (r"20 \timesx 3 =", None),
        (r"\sqrt{16} =", None),
        (r"1\frac{1}{2} + 1 =", None),  # one and a half, or half of one
        (r"\text{2 more than} 3 =", None),
        (r"3 \text{ times 4} =", None),
        (r"2^{3} \times 4 =", None),
        (r"\frac{D}{3} \times 2 =", None),
        (r"\frac{4}{0} =", None),
    ],
)
def test_arithmetic_in_latex(line: str, rest: str | None) -> None:
    """As models write it that have learnt mathematics."""
    assert continuation(line) == rest


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (Fraction(1, 2), 0, "1"),
        (Fraction(-1, 2), 0, "-1"),
        (Fraction(1, 20000), 4, "0.0001"),
        (Fraction(1, 20001), 4, "0"),
        (Fraction(-1, 20001), 4, "0"),
        (Fraction(99999, 100000), 4, "1"),
        (Fraction(1234567), 4, "1234567"),
    ],
)
def test_rounding_is_half_up(value: Fraction, decimals: int, text: str) -> None:
    assert format_number(value, decimals) == text


@given(st.integers(-9999, 9999), st.sampled_from("+-*/"), st.integers(-9999, 9999), st.booleans())
def test_agrees_with_exact_arithmetic_digit_by_digit(a: int, operator: str, b: int, spaced: bool) -> None:
    if operator == "/" and b == 0:
        return
    exact = {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "/": lambda: Fraction(a, b)}[operator]()
    space = " " if spaced else ""
    line = f"{a}{space}{operator}{space}{b}{space}="
    written = ""
    while (rest := continuation(line + written)) is not None:
        written += rest[0]
    assert abs(Fraction(written) - exact) <= Fraction(1, 20000)
    assert written.startswith(" ") == spaced


def byte_level(*merged: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose only merges spell the given words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in merged:
        word = word.replace(" ", "Ġ")
        for i in range(1, len(word)):
            if (pair := (word[:i], word[i])) not in merges:
                merges.append(pair)
                vocab.setdefault(word[: i + 1], len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def written_by(calculator: Calculator, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """What the calculator writes on its own after `prompt`."""
    start = tuple(tokenizer.encode(prompt))
    token_ids = start
    while True:
        [[answer]] = calculator.predict([Query.of(token_ids, model=1, law=True)])
        if answer is None:
            return str(tokenizer.decode(token_ids[len(start) :]))
        assert isinstance(answer, Answer) and answer.law is not None
        assert answer.law.argmax() == answer.token_id == answer.top_token_id and answer.law.exp().sum() == 1
        assert (answer.log_prob, answer.top_log_prob, answer.entropy) == (0, 0, 0)
        token_ids = (*token_ids, answer.token_id)


def test_single_digit_tokens_leave_the_space_to_the_base() -> None:
    tokenizer = byte_level()
    calculator = Calculator(tokenizer)
    assert written_by(calculator, tokenizer, "56 * 9 =") == ""
    assert written_by(calculator, tokenizer, "56 * 9 = ") == "504"
    assert written_by(calculator, tokenizer, "56 × 9 = ") == "504"  # the operator is spread over two tokens


def test_longer_tokens_are_written_as_the_tokenizer_would() -> None:
    tokenizer = byte_level(" 504")
    assert written_by(Calculator(tokenizer), tokenizer, "56 * 9 =") == " 504"
    assert written_by(Calculator(tokenizer), tokenizer, "56 * 9 = 5") == "04"


def test_only_the_current_line_counts_and_a_turn_marker_ends_it() -> None:
    tokenizer = byte_level()
    calculator = Calculator(tokenizer)
    assert written_by(calculator, tokenizer, "1 + 1 =\n5 * 2 = ") == "10"
    assert written_by(calculator, tokenizer, "1 + 1 =\n") == ""
    assert written_by(calculator, tokenizer, "1 + <s>5 * 2 = ") == "10"
    assert written_by(calculator, tokenizer, "5 * 2 = <s>") == ""


def test_several_prefixes_at_once_are_answered_one_by_one() -> None:
    tokenizer = byte_level()
    token_ids = tuple(tokenizer.encode("So 5 * 2 = 10 and\n6/4 = 1.5."))
    calculator = Calculator(tokenizer)
    [answers] = calculator.predict([Query.of(token_ids, len(token_ids), model=1, law=True)])
    for i, answer in enumerate(answers):
        [[alone]] = Calculator(tokenizer).predict([Query.of(token_ids[: i + 1], model=1, law=True)])
        assert (answer is None) == (alone is None)
        if isinstance(answer, Answer) and isinstance(alone, Answer):
            assert answer.law is not None and alone.law is not None and torch.equal(answer.law, alone.law)
            assert answer._replace(law=None) == alone._replace(law=None)
    spoken = "".join(str(tokenizer.decode([a.token_id])) for a in answers if isinstance(a, Answer))
    assert spoken == "101.5"


def test_the_example_of_a_tool_writes_the_time(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the tokens of a tokenizer that splits digits and spaces."""
    page = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.search(r"```python\n(.*?class Clock.*?)```", page, re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(textwrap.dedent("  " + found.group(1).lstrip()), names)
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%H:%M", "14:07"))
    clock = names["Clock"](tiny_tokenizer, "clock")

    def says(text: str) -> str | None:
        [[reply]] = clock.predict([Query.of(tiny_tokenizer.encode(text, add_special_tokens=False))])
        return None if reply is None else tiny_tokenizer.decode([reply.token_id])

    assert says("Hello.\nThe time") is None
    assert says("The time is") is None, "a space is the base's"
    told = "The time is "
    while (token := says(told)) is not None:
        told += token
    assert told == "The time is 14:07"
    assert says("The time is 15") is None
