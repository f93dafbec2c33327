"""Generated word problems: somebody has things, gets some and loses some; how many are left?

A problem is two to five short sentences and a question. Its answer shows the work and ends as answers of GSM8K do:

    the baker has 7 lamps . the king has 3 boats . the king gives the baker 5 lamps . the baker loses 2 lamps . how many
    lamps has the baker ?

    7 + 5 = 12 . 12 - 2 = 10 . #### 10

`level` 1 has one change, level 2 one or two, level 3 one to three. Some problems also say what somebody else has. All
numbers are between 0 and `MOST`, and each is one word. The people and things are those of
`diffora.tasks.embedded.paraphrase`.
"""

import random
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

from diffora.settings.checks import ROWS, Help, whole
from diffora.tasks.chat.forms import Turn
from diffora.tasks.chat.settings import LanguageSettings
from diffora.tasks.embedded import paraphrase
from diffora.tasks.embedded.distinct import distinct
from diffora.tasks.embedded.generated import GeneratedTask
from diffora.tasks.embedded.paraphrase import PEOPLE, THINGS

SEED = 0
STORIES = 1_000_003  # seed of the texts that show what is forgotten; the pretraining has other ones
MOST = 30
PERSONS = tuple(row[0] for row in PEOPLE)
OWNED = tuple(f"{row[0]}s" for row in THINGS)
GAINS = ("finds", "buys")
LOSSES = ("loses", "sells")
WORDS = ("has", "gives", "now", "how", "many", "think", "step", "question", "answer", ":", "?", ".", "+", "-", "=")
VOCABULARY = tuple(
    sorted({*paraphrase.VOCABULARY, *OWNED, *GAINS, *LOSSES, *WORDS, "####", *map(str, range(MOST + 1))})
)
"""All words that a problem can have, sorted. Words are separated by spaces."""


@dataclass
class Purse:
    """What one person has of one thing, told step by step.

    Attributes:
        who, what: the person with "the", and the thing.
        has: how many things the person has now.
        told: sentences so far.
        work: the sums so far, such as ``7 + 5 = 12``.
    """

    who: str
    what: str
    has: int
    told: list[str] = field(default_factory=list)
    work: list[str] = field(default_factory=list)

    def change(self, other: str, rng: random.Random) -> None:
        """Add or take away some things; the other person may give or receive them."""
        gains = rng.random() < 0.5 if 0 < self.has < MOST else self.has == 0
        n = rng.randint(1, min(9, MOST - self.has if gains else self.has))
        if rng.random() < 0.4:
            giver, taker = (other, self.who) if gains else (self.who, other)
            self.told.append(f"{giver} gives {taker} {n} {self.what}")
        else:
            self.told.append(f"{self.who} {rng.choice(GAINS if gains else LOSSES)} {n} {self.what}")
        before, self.has = self.has, self.has + (n if gains else -n)
        self.work.append(f"{before} {'+' if gains else '-'} {n} = {self.has}")


def begin(rng: random.Random) -> tuple[Purse, str]:
    """(a new purse with its first sentence, another person)."""
    who, other = (f"the {name}" for name in rng.sample(PERSONS, 2))
    purse = Purse(who, rng.choice(OWNED), rng.randint(1, 15))
    purse.told.append(f"{who} has {purse.has} {purse.what}")
    return purse, other


def problem(rng: random.Random, level: int) -> tuple[str, str]:
    """One problem: (question, answer)."""
    purse, other = begin(rng)
    if rng.random() < 0.3:
        thing = rng.choice([name for name in OWNED if name != purse.what])
        purse.told.append(f"{other} has {rng.randint(1, 15)} {thing}")
    for _ in range(rng.randint(1, level)):
        purse.change(other, rng)
    told = " . ".join(purse.told)
    work = " . ".join(purse.work)
    return f"{told} . how many {purse.what} has {purse.who} ?", f"{work} . #### {purse.has}"


def splits(sizes: dict[str, int], level: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Problems for each split, by its name. No two of them have the same question."""

    def one(rng: random.Random) -> tuple[str, tuple[str, str]]:
        asked, answer = problem(rng, level)
        return asked, (asked, answer)

    return distinct(sizes, lambda name: f"sums-{name}-{level}-{seed}", one)


@dataclass(frozen=True, kw_only=True)
class SumsSettings(LanguageSettings):
    """The settings of `SumsTask`."""

    train_rows: Annotated[int, whole(1, ROWS), Help("Training problems to generate.", "rows")]
    validation_rows: Annotated[int, whole(2, ROWS), Help("Validation problems to generate.", "rows")]
    test_rows: Annotated[int, whole(1, ROWS), Help("Test problems to generate, for `predict=true`.", "rows")]
    level: Annotated[int, whole(1, 3), Help("Most changes in a problem.", "changes")]


class SumsTask(GeneratedTask):
    """Generated word problems, scored by the model's answers.

    Without ``task.forgetting.path``, what the model forgets is measured on generated stories like those of its
    pretraining.
    """

    settings = SumsSettings

    def __init__(self, cfg: SumsSettings) -> None:
        super().__init__(cfg)
        self.test_splits = ("test",)

    def made(self) -> dict[str, list[list[Turn]]]:
        sizes = {name: getattr(self.cfg, f"{name}_rows") for name in ("train", "validation", "test")}
        return {
            name: [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in rows]
            for name, rows in splits(sizes, self.cfg.level, SEED).items()
        }

    def read_texts(self) -> list[str]:
        if self.cfg.forgetting.path is not None:
            return super().read_texts()
        stories = paraphrase.corpus(self.cfg.forgetting.rows, STORIES)
        return [" ".join(f"{sentence} ." for sentence in story) for story in islice(stories, self.cfg.forgetting.rows)]
