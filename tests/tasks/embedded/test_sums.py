"""The generated word problems. A second implementation reads the story and checks work and answer."""

import random
import re

import pytest

from diffora.tasks.chat.answers import extract
from diffora.tasks.embedded.sums import MOST, VOCABULARY, problem, splits


def solved(question: str) -> list[int]:
    """How many things the person asked about has, after each sentence about these things."""
    told, asked = re.fullmatch(r"(.+) \. (how many .+ \?)", question).groups()
    what, who = re.fullmatch(r"how many (\w+) has (the \w+) \?", asked).groups()
    counts: list[int] = []
    for sentence in told.split(" . "):
        if found := re.fullmatch(rf"{who} has (\d+) {what}", sentence):
            assert not counts
            counts.append(int(found[1]))
        elif found := re.fullmatch(rf"(the \w+) gives (the \w+) (\d+) {what}", sentence):
            assert who in found.groups() and found[1] != found[2]
            counts.append(counts[-1] + (int(found[3]) if found[2] == who else -int(found[3])))
        elif found := re.fullmatch(rf"{who} (finds|buys|loses|sells) (\d+) {what}", sentence):
            counts.append(counts[-1] + (int(found[2]) if found[1] in ("finds", "buys") else -int(found[2])))
        else:
            other = re.fullmatch(r"(the \w+) has \d+ (\w+)", sentence)
            assert other and other[1] != who and other[2] != what
    return counts


@pytest.mark.parametrize("level", [1, 2, 3])
def test_work_and_answers_are_right(level):
    rng = random.Random(level)
    changes = set()
    for _ in range(400):
        question, answer = problem(rng, level)
        counts = solved(question)
        changes.add(len(counts) - 1)
        assert extract(answer, r"####\s*(\S+)") == str(counts[-1]) and all(0 <= count <= MOST for count in counts)
        sums = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", answer)
        assert [int(total) for *_, total in sums] == counts[1:] and int(sums[0][0]) == counts[0]
        for left, sign, right, total in sums:
            assert int(left) + (1 if sign == "+" else -1) * int(right) == int(total)
        assert {*question.split(), *answer.split()} <= set(VOCABULARY)
    assert changes == set(range(1, level + 1))


def test_no_question_is_asked_twice_and_the_seed_decides():
    sizes = {"train": 300, "validation": 100, "test": 100}
    made = splits(sizes, 2, 0)
    questions = [question for rows in made.values() for question, _ in rows]
    assert len(set(questions)) == len(questions) == 500
    assert splits(sizes, 2, 0) == made and splits(sizes, 2, 1) != made
