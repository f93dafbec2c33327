"""A generated chat task: the user says who did what to whom, then asks for it in another form or asks for a part of it.

The sentence is said once, in the active or the passive voice, with or without "not", traits and a time. One to three
requests follow, and each has one right answer:

=======  ====================================  ==========================================
request  of the user                           answer to "the tall baker thanked the king"
=======  ====================================  ==========================================
turn     say it in the passive                 the king was thanked by the tall baker
deny     say that it is not so                 the tall baker did not thank the king
who      who thanked the king ?                the tall baker
whom     whom did the tall baker thank ?       the king
=======  ====================================  ==========================================

The words and people are those of `diffora.tasks.embedded.paraphrase`. A denial negates the sentence as the user said
it. A request to turn it asks for the other voice.
"""

import random
from dataclasses import dataclass
from typing import Annotated

from diffora.settings.checks import ROWS, Help, whole
from diffora.tasks.chat.forms import Turn
from diffora.tasks.chat.settings import LanguageSettings
from diffora.tasks.embedded import paraphrase
from diffora.tasks.embedded.distinct import distinct
from diffora.tasks.embedded.generated import GeneratedTask
from diffora.tasks.embedded.paraphrase import ACTS, PEOPLE, TIMES, TRAITS, past

SEED = 0
REQUESTS = ("turn", "deny", "who", "whom")
WORDS = ("say", "it", "in", "the", "active", "passive", "that", "is", "not", "so", "who", "whom", "did", ".", "?")
VOCABULARY = tuple(sorted({*paraphrase.VOCABULARY, *WORDS}))
"""All words that a conversation can have, sorted. Words are separated by spaces."""


@dataclass(frozen=True)
class Fact:
    """Who did what to whom, and when (or ""), in words. ``holds`` is False for a sentence with "not"."""

    who: str
    verb: str
    whom: str
    time: str
    holds: bool

    def said(self, passive: bool, holds: bool) -> str:
        """One sentence."""
        no = "" if holds else "not "
        if passive:
            core = f"{self.whom} was {no}{past(self.verb)} by {self.who}"
        else:
            core = f"{self.who} {past(self.verb) if holds else f'did not {self.verb}'} {self.whom}"
        return f"{core} {self.time}".rstrip()

    def asked(self, whom: bool) -> str:
        """The question for one of the two people."""
        if whom:
            return f"whom did {self.who} {'' if self.holds else 'not '}{self.verb} ?"
        return f"who {past(self.verb) if self.holds else f'did not {self.verb}'} {self.whom} ?"


def draw(rng: random.Random) -> Fact:
    """A random fact about two different people."""
    people = []
    for noun in rng.sample(PEOPLE, 2):
        trait = f"{rng.choice(rng.choice(TRAITS))} " if rng.random() < 0.5 else ""
        people.append(f"the {trait}{rng.choice(noun)}")
    time = rng.choice(rng.choice(TIMES)) if rng.random() < 0.3 else ""
    return Fact(people[0], rng.choice(rng.choice(ACTS)), people[1], time, rng.random() < 0.7)


def converse(rng: random.Random) -> list[Turn]:
    """One conversation with one to three different requests."""
    fact, passive = draw(rng), rng.random() < 0.5
    told = fact.said(passive, fact.holds)
    turns: list[Turn] = []
    for request in rng.sample(REQUESTS, rng.choice((1, 2, 2, 3))):
        if request == "turn":
            asked = f"say it in the {'active' if passive else 'passive'} ."
            answer = fact.said(not passive, fact.holds)
        elif request == "deny":
            asked, answer = "say that it is not so .", fact.said(passive, not fact.holds)
        else:
            asked, answer = fact.asked(request == "whom"), fact.whom if request == "whom" else fact.who
        turns.append({"role": "user", "content": asked if turns else f"{told} . {asked}"})
        turns.append({"role": "assistant", "content": answer})
    return turns


def splits(train_rows: int, validation_rows: int, seed: int) -> dict[str, list[list[Turn]]]:
    """Training and validation conversations. No two of them begin with the same sentence."""

    def one(rng: random.Random) -> tuple[str, list[Turn]]:
        turns = converse(rng)
        return turns[0]["content"].split(" . ")[0], turns

    sizes = {"train": train_rows, "validation": validation_rows}
    return distinct(sizes, lambda name: f"dialogue-{name}-{seed}", one)


@dataclass(frozen=True, kw_only=True)
class DialogueSettings(LanguageSettings):
    """The settings of `DialogueTask`."""

    train_rows: Annotated[int, whole(1, ROWS), Help("Training conversations to generate.", "rows")]
    validation_rows: Annotated[int, whole(2, ROWS), Help("Validation conversations to generate.", "rows")]


class DialogueTask(GeneratedTask):
    """Generated conversations: ``task.train_rows`` for training and ``task.validation_rows`` for validation."""

    settings = DialogueSettings

    def made(self) -> dict[str, list[list[Turn]]]:
        return splits(self.cfg.train_rows, self.cfg.validation_rows, SEED)
