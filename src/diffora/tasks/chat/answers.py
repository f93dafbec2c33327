"""The answer in a text: where it is, and whether two answers are the same."""

import re
from fractions import Fraction

AFTER = " \t\r\n.!?,;:$%€£*"
"""Characters after an answer that do not belong to it: a full stop, a per-cent sign, Markdown's stars."""
CURRENCY = re.compile(r"^([+-]?)[$€£]\s*")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")
GROUPED = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
LONGEST = 100
"""Digits of a number that is compared by value; longer ones are compared as text."""


def pattern_problem(pattern: str) -> str | None:
    """What is wrong with a pattern for `extract`; None if nothing is."""
    try:
        groups = re.compile(pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression of Python: {error}"
    if not pattern:
        return "is empty: it would find an empty answer in every text; null takes the whole text"
    if groups > 1:
        return f"has {groups} groups: at most one, around the answer; write (?:…) for the others"
    return None


def extract(text: str, pattern: str | None) -> str | None:
    """The answer in a text: the last match of a pattern, or its group if it has one; None without a match.

    Args:
        text: a generated text or a reference.
        pattern: a regular expression; None: the whole text is the answer.
    """
    if pattern is None:
        return text.strip() or None
    found = [match[1 if match.re.groups else 0] for match in re.finditer(pattern, text)]
    return (found[-1] or "").strip() or None if found else None


def normal(answer: str) -> Fraction | str:
    """The number that an answer is, or its text.

    ``1,000``, ``$1000`` and ``1000.0`` are one number, and so are ``0.5`` and ``1/2``; a per-cent sign is left out and
    changes nothing. Other answers are compared as text, without `AFTER` and with single spaces. Case counts.
    """
    bare = answer.strip().strip("*").rstrip(AFTER) or answer  # an answer may be nothing but such signs
    text = " ".join(bare.split()).replace("\N{MINUS SIGN}", "-")
    text = CURRENCY.sub(r"\1", text)
    plain = [_number(part.strip()) for part in text.split("/", 1)]
    if len(plain) == 2 and plain[0] is not None and plain[1]:
        return plain[0] / plain[1]
    return text if len(plain) == 2 or plain[0] is None else plain[0]


def same_answer(given: str | None, expected: str | None) -> bool:
    """Whether two answers are the same, as `normal` compares them. None is no answer, so it equals nothing."""
    return given is not None and expected is not None and normal(given) == normal(expected)


def _number(text: str) -> Fraction | None:
    """The number that a text is; None if it is none."""
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    return Fraction(text) if NUMBER.fullmatch(text) and len(text) <= LONGEST else None
