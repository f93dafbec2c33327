"""Answers in texts: found by a pattern, and compared as numbers or as text."""

from fractions import Fraction
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffora.tasks.chat.answers import extract, normal, pattern_problem, same_answer

CONF = Path(__file__).resolve().parents[3] / "conf"
MATHS = yaml.safe_load((CONF / "task" / "gsm8k.yaml").read_text())["generation"]["answer"]


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("so 2 + 2 = 4.\nThe answer is: 4", MATHS, "4"),
        ("The final answer is 1,000.\n\nQuestion: The", MATHS, "1,000."),
        ("#### 3\nno, wait\n#### 42\n", MATHS, "42"),  # the last one counts
        ("it is four", MATHS, None),
        ("####   ", MATHS, None),
        ("The answer is 5 apples. The answer is: 6", MATHS, "6"),  # also on one line
        ("The answer is 5.\n#### 6\nThe answer is:", MATHS, "6"),
        ("a 7 b 8", r"\d", "8"),  # without a group, the whole match
        ("x=1;y=", r"x=(\d)|y=(?:\d)", "1"),
        (" the king \n", None, "the king"),
        ("  ", None, None),
        ("A\nB", r"(?s)A(.*)", "B"),
    ],
)
def test_the_last_match_is_the_answer(text, pattern, answer):
    assert extract(text, pattern) == answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"), ("1,234,567.50", "1234567.5"), ("42.", "42"), ("$57,500", "57500.00"), ("-$5", "-5"),
        ("0.5", "1/2"), ("20/35", "4/7"), ("50%", "50"), ("**7**", "7"), ("+3", "3"), (".5", "0.5"), ("007", "7"),
        ("\N{MINUS SIGN}2", "-2"), ("a  b.", "a b"), ("(C)", "(C)!"),
    ],
)  # fmt: skip
def test_equal_answers_in_other_forms(one, other):
    assert same_answer(one, other) and same_answer(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12,34", "1234"), ("1", "10"), ("-5", "5"), ("3 apples", "3"), ("1/0", "0"), ("1e3", "1000"), ("a", "A"),
        ("inf", "nan"), ("5", None), (None, None), ("1,0000", "10000"), ("!", "?"), ("$", "%"),
    ],
)  # fmt: skip
def test_answers_that_differ(one, other):
    assert not same_answer(one, other) and not same_answer(other, one)


@given(st.integers(-(10**12), 10**12), st.integers(0, 3))
def test_grouped_digits_are_a_number(n, decimals):
    text = f"{n:,}" + ("." + "0" * decimals if decimals else "")
    assert normal(text) == Fraction(n) and same_answer(text, str(n))


@given(st.text(max_size=40))
def test_any_text_can_be_compared(text):
    assert same_answer(text, text) and isinstance(normal(text), str | Fraction)


def test_a_number_of_thousands_of_digits_is_compared_as_text():
    assert normal("1" * 5000) == "1" * 5000


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("(", "is not a regular expression of Python"), ("", "is empty"), ("(a)|(b)", "has 2 groups: at most one")],
)
def test_an_impossible_pattern_is_named(pattern, words):
    assert words in pattern_problem(pattern)
    assert pattern_problem(MATHS) is None and pattern_problem("x") is None
