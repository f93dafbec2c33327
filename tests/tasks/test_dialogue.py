"""The generated conversations: what is answered is right, by a reader of its own."""

import random
import re

import pytest

from diffora.tasks import dialogue
from diffora.tasks.dialogue import VOCABULARY, converse, splits
from diffora.tasks.paraphrase import ACTS, past

VERBS = {word: verb for row in ACTS for verb in row for word in (verb, past(verb))}
ADVERBS = r"((?:at|on) \w+|recently|lately|yesterday)"


def read(sentence: str) -> tuple:
    """(who, verb, whom, time, whether it holds, voice) of a sentence."""
    text = re.sub(rf" {ADVERBS}$", "", sentence)
    time = sentence[len(text) :].strip()
    if match := re.fullmatch(r"(the .+) was (not )?(\w+) by (the .+)", text):
        whom, no, verb, who = match.groups()
        return who, VERBS[verb], whom, time, no is None, "passive"
    if match := re.fullmatch(r"(the .+?) did not (\w+) (the .+)", text):
        return match[1], VERBS[match[2]], match[3], time, False, "active"
    verb = next(word for word in text.split() if word in VERBS)
    who, whom = text.split(f" {verb} ")
    return who, VERBS[verb], whom, time, True, "active"


@pytest.mark.parametrize("seed", range(300))
def test_answers_are_right(seed):
    turns = converse(random.Random(seed))
    told, _, first = turns[0]["content"].partition(" . ")
    who, verb, whom, time, holds, voice = read(told)
    for asked, answer in zip([first, *(t["content"] for t in turns[2::2])], turns[1::2], strict=True):
        said = answer["content"]
        if asked.startswith("who "):
            assert said == who and asked.endswith(f"{whom} ?") and VERBS[asked.split()[1 if holds else 3]] == verb
        elif asked.startswith("whom "):
            assert said == whom and who in asked and ("not" in asked.split()) == (not holds)
        elif asked.startswith("say it in the "):
            assert asked.split()[-2] != voice
            assert read(said) == (who, verb, whom, time, holds, asked.split()[-2])
        else:
            assert asked == "say that it is not so ."
            assert read(said) == (who, verb, whom, time, not holds, voice)
    assert {word for turn in turns for word in turn["content"].split()} <= set(VOCABULARY)
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)


def test_no_sentence_is_told_twice_and_the_seed_decides():
    made = splits(200, 100, seed=0)
    told = [turns[0]["content"].split(" . ")[0] for rows in made.values() for turns in rows]
    assert len(told) == len(set(told)) == 300
    assert splits(200, 100, seed=0) == made
    assert splits(200, 100, seed=1) != made
    assert splits(200, 50, seed=0)["train"] == made["train"]


def test_every_request_occurs():
    asked = " ".join(turn["content"] for turns in splits(100, 0, 0)["train"] for turn in turns[::2])
    for words in ("say it in the active", "say it in the passive", "is not so", ". who ", "whom did", "did not"):
        assert words in asked
    assert dialogue.REQUESTS == ("turn", "deny", "who", "whom")
