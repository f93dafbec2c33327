"""A generated language task: do two sentences say the same thing?

Columns are those of GLUE MRPC (``sentence1``, ``sentence2``, ``label``, ``idx``; label 1 = paraphrase). Nothing is
downloaded. The words alone do not reveal the answer: whether two sentences mean the same depends on who did what to
whom, not on which words occur.

A meaning is one clause or two joined by "and", "before" or "because". A clause is one of six kinds:

========  ==========================================  =======================================================
kind      one rendering                               another rendering of the same meaning
========  ==========================================  =======================================================
act       the tall baker thanked the young pilot      the pilot who was youthful was thanked by the tall baker
polar     the nurse did not trust the thief           the robber was distrusted by the nurse
state     the clever cook succeeded at noon           at midday the smart chef did not fail
give      the maid sold the lamp to the monk          the lamp was purchased from the maid by the monk
move      the boy walked from the barn to the river   the lad strolled to the stream from the barn
compare   the judge was older than the king           the king was younger than the judge
========  ==========================================  =======================================================

Renderings choose at random among synonyms, active or passive voice, antonym with "not", converse verbs, adjective or
relative clause, place and time in front or at the end, and "A before B" / "B after A" / "before B , A" and the like.

A positive pair renders one meaning twice. A negative pair renders a meaning and a *changed* meaning (see
:func:`changes`) made of the same concepts: roles swapped, adjectives exchanged or moved, two clauses' participants
exchanged, the negation moved to the other clause, the order of events or of cause and effect reversed, or the pole
of a state turned to its opposite ("did not fail" / "failed"). Both kinds of pair draw meanings and renderings alike.

The module also writes plain text without labels for pretraining (:func:`corpus`). It does not import torch.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# One row per concept; the words of a row are interchangeable.
PEOPLE = (
    ("doctor", "physician"), ("lawyer", "attorney"), ("teacher", "instructor"), ("pilot", "aviator"), ("cook", "chef"),
    ("writer", "author"), ("singer", "vocalist"), ("sailor", "mariner"), ("thief", "robber"), ("guard", "sentry"),
    ("boy", "lad"), ("driver", "chauffeur"), ("student", "pupil"), ("king", "monarch"), ("wizard", "sorcerer"),
    ("baker",), ("nurse",), ("farmer",), ("judge",), ("monk",), ("maid",), ("dentist",), ("plumber",), ("poet",),
)  # fmt: skip
TRAITS = (
    ("old", "elderly"), ("young", "youthful"), ("clever", "smart"), ("rich", "wealthy"), ("angry", "furious"),
    ("tired", "weary"), ("brave", "fearless"), ("famous", "renowned"), ("thin", "slim"), ("polite", "courteous"),
    ("tall",), ("lonely",), ("blond",), ("clumsy",),
)  # fmt: skip
THINGS = (
    ("coat", "jacket"), ("picture", "image"), ("boat", "ship"), ("rock", "stone"), ("carpet", "rug"), ("lamp",),
    ("violin",), ("ladder",), ("clock",), ("basket",),
)  # fmt: skip
PLACES = (
    ("shop", "store"), ("harbor", "port"), ("forest", "woods"), ("river", "stream"), ("road", "street"),
    ("hotel", "inn"), ("barn",), ("bridge",), ("castle",), ("library",), ("garden",), ("church",),
)  # fmt: skip
TIMES = (
    ("at noon", "at midday"),
    ("at dawn", "at daybreak"),
    ("recently", "lately"),
    ("yesterday",),
    ("on monday",),
    ("on friday",),
)
ACTS = (
    ("help", "assist"), ("call", "phone"), ("follow", "trail"), ("praise", "applaud"), ("hire", "employ"),
    ("warn", "alert"), ("rescue", "save"), ("chase", "pursue"), ("watch", "observe"), ("push", "shove"),
    ("surprise", "astonish"), ("annoy", "irritate"), ("thank",), ("visit",), ("greet",), ("attack",),
)  # fmt: skip
MOVES = (("walk", "stroll"), ("hurry", "rush"), ("travel", "journey"), ("march",), ("drift",))
# One row per concept: the words of one pole, then those of its opposite.
POLARS = (
    (("trust",), ("distrust",)), (("obey",), ("disobey", "defy")), (("like",), ("dislike",)),
    (("notice",), ("overlook", "ignore")), (("accept",), ("reject",)), (("include",), ("exclude",)),
)  # fmt: skip
STATES = (
    (("succeed",), ("fail",)), (("stay", "remain"), ("leave", "depart")), (("win", "prevail"), ("lose",)),
    (("agree", "consent"), ("refuse", "decline")), (("survive",), ("die", "perish")),
)  # fmt: skip
GIVES = ((("sell",), ("buy", "purchase")), (("lend",), ("borrow",)), (("give", "hand"), ("receive", "obtain")))
COMPARES = (
    (("older",), ("younger",)), (("taller",), ("shorter",)), (("richer", "wealthier"), ("poorer",)),
    (("faster", "quicker"), ("slower",)), (("stronger",), ("weaker",)), (("happier",), ("sadder",)),
)  # fmt: skip
VERBS = {"act": ACTS, "polar": POLARS, "state": STATES, "give": GIVES, "move": MOVES, "compare": COMPARES}
_IRREGULAR = {
    "hurry": "hurried", "defy": "defied", "leave": "left", "win": "won", "lose": "lost", "sell": "sold",
    "buy": "bought", "lend": "lent", "give": "gave",
}  # fmt: skip
_PARTICIPLE = {"give": "given"}
FUNCTION_WORDS = (
    "the", "who", "was", "than", "did", "not", "by", "near", "from", "to", "and", "before", "after", "because",
    "so", ",",
)  # fmt: skip


class Mix(NamedTuple):
    """Weights of the kinds of clauses, and the share of sentences with two clauses."""

    kinds: dict[str, int]
    two_clauses: float


TASK = Mix({"act": 10, "polar": 3, "state": 3, "give": 1, "move": 1, "compare": 1}, two_clauses=0.08)
TEXT = Mix({"act": 6, "polar": 2, "state": 2, "give": 2, "move": 2, "compare": 2}, two_clauses=0.3)


@dataclass(frozen=True)
class Person:
    """A noun and, for some, a trait; both are positions in lists of words."""

    noun: int
    trait: int | None = None


@dataclass(frozen=True)
class Clause:
    """One fact. `holds` is False for a negated verb, or for the second pole of a `polar` or `state` verb.

    `whom` is the patient, the receiver or the one compared with; `rest` is the thing given, or the places from and to.
    """

    kind: str
    verb: int
    who: Person
    whom: Person | None = None
    rest: tuple[int, ...] = ()
    holds: bool = True
    place: int | None = None
    time: int | None = None


@dataclass(frozen=True)
class Meaning:
    """One fact, or two joined by "and" (any order), "before" (first, then second) or "because" (first is the cause)."""

    first: Clause
    link: str | None = None
    second: Clause | None = None

    def canonical(self) -> tuple[object, ...]:
        """A value that is equal for two meanings if and only if they mean the same."""
        clauses = (self.first,) if self.second is None else (self.first, self.second)
        return (self.link, tuple(sorted(clauses, key=repr) if self.link == "and" else clauses))


# ---- drawing a meaning ---------------------------------------------------------------------------


def draw(rng: random.Random, cast: list[Person] | None = None, mix: Mix = TASK) -> Meaning:
    """A random meaning. If `cast` is given, its 4 different people are used."""
    two = rng.random() < mix.two_clauses
    if cast is None:
        cast = draw_cast(rng, trait=0.35 if two else 0.6)
    if not two:
        return Meaning(_draw_clause(rng, cast[:2], mix, adjuncts=True))
    first, second = (_draw_clause(rng, people, mix, adjuncts=False) for people in (cast[:2], cast[2:]))
    return Meaning(first, rng.choice(("and", "before", "because")), second)


def draw_cast(rng: random.Random, trait: float) -> list[Person]:
    """Four different people. Each has a trait with probability `trait`, and no two have the same."""
    nouns, traits = rng.sample(range(len(PEOPLE)), 4), rng.sample(range(len(TRAITS)), 4)
    return [Person(n, t if rng.random() < trait else None) for n, t in zip(nouns, traits, strict=True)]


def _draw_clause(rng: random.Random, people: list[Person], mix: Mix, adjuncts: bool) -> Clause:
    kind = rng.choices(list(mix.kinds), list(mix.kinds.values()))[0]
    whom = None if kind in ("state", "move") else people[1]
    rest: tuple[int, ...] = ()
    if kind == "give":
        rest = (rng.randrange(len(THINGS)),)
    elif kind == "move":
        rest = tuple(rng.sample(range(len(PLACES)), 2))
    holds = kind == "compare" or rng.random() < (0.5 if kind in ("polar", "state") else 0.7)
    place = rng.randrange(len(PLACES)) if adjuncts and kind not in ("move", "compare") and rng.random() < 0.4 else None
    time = rng.randrange(len(TIMES)) if adjuncts and kind != "compare" and rng.random() < 0.4 else None
    return Clause(kind, rng.randrange(len(VERBS[kind])), people[0], whom, rest, holds, place, time)


# ---- changing a meaning --------------------------------------------------------------------------


def changes(meaning: Meaning) -> dict[str, Meaning]:
    """All changes, by name, that give another meaning with the same concepts, except for one opposite word."""
    one, two = meaning.first, meaning.second
    found: dict[str, Meaning] = {}
    for name, clause in (("first", one), ("second", two)):
        if clause is not None:
            for change, new in _clause_changes(clause).items():
                found[f"{change}_{name}"] = (
                    replace(meaning, first=new) if name == "first" else replace(meaning, second=new)
                )
    if two is not None:
        if meaning.link != "and":
            found["order"] = Meaning(two, meaning.link, one)
        found["who"] = Meaning(replace(one, who=two.who), meaning.link, replace(two, who=one.who))
        if one.whom and two.whom:
            found["whom"] = Meaning(replace(one, whom=two.whom), meaning.link, replace(two, whom=one.whom))
        if one.holds != two.holds and "compare" not in (one.kind, two.kind):
            found["negation"] = Meaning(replace(one, holds=two.holds), meaning.link, replace(two, holds=one.holds))
        a, b = _swap_traits(one.who, two.who)
        found["traits"] = Meaning(replace(one, who=a), meaning.link, replace(two, who=b))
    return {name: new for name, new in found.items() if new.canonical() != meaning.canonical()}


def _clause_changes(clause: Clause) -> dict[str, Clause]:
    found = {}
    if clause.whom is not None:
        who, whom = clause.who, clause.whom
        found["roles"] = replace(clause, who=whom, whom=who)
        found["nouns"] = replace(clause, who=replace(who, noun=whom.noun), whom=replace(whom, noun=who.noun))
        a, b = _swap_traits(who, whom)
        found["traits"] = replace(clause, who=a, whom=b)
    if clause.kind == "move":
        found["places"] = replace(clause, rest=clause.rest[::-1])
    if clause.kind == "state":
        found["pole"] = replace(clause, holds=not clause.holds)
    return found


def _swap_traits(a: Person, b: Person) -> tuple[Person, Person]:
    return replace(a, trait=b.trait), replace(b, trait=a.trait)


# ---- writing a meaning ---------------------------------------------------------------------------


def render(meaning: Meaning, rng: random.Random) -> str:
    """A random sentence with this meaning."""
    if meaning.second is None:
        return _clause(meaning.first, rng)
    one, two = _clause(meaning.first, rng), _clause(meaning.second, rng)
    if meaning.link == "and":
        return rng.choice((f"{one} and {two}", f"{two} and {one}"))
    if meaning.link == "before":
        return rng.choice(
            (f"{one} before {two}", f"before {two} , {one}", f"{two} after {one}", f"after {one} , {two}")
        )
    return rng.choice((f"{two} because {one}", f"because {one} , {two}", f"{one} , so {two}"))


def _clause(clause: Clause, rng: random.Random) -> str:
    core = _CORES[clause.kind](clause, rng)
    if clause.place is not None:
        place = f"near the {rng.choice(PLACES[clause.place])}"
        core = rng.choice((f"{core} {place}", f"{place} {core}"))
    if clause.time is not None:
        time = rng.choice(TIMES[clause.time])
        core = rng.choice((f"{core} {time}", f"{time} {core}"))
    return core


def _person(person: Person | None, rng: random.Random) -> str:
    assert person is not None, "this kind of clause has a second person"
    noun = rng.choice(PEOPLE[person.noun])
    if person.trait is None:
        return f"the {noun}"
    trait = rng.choice(TRAITS[person.trait])
    return rng.choice((f"the {trait} {noun}", f"the {noun} who was {trait}"))


def past(verb: str) -> str:
    """The past tense of a verb."""
    return _IRREGULAR.get(verb) or (verb + "d" if verb.endswith("e") else verb + "ed")


def _participle(verb: str) -> str:
    return _PARTICIPLE.get(verb) or past(verb)


def _did(verb: str, holds: bool) -> str:
    return past(verb) if holds else f"did not {verb}"


def _was(verb: str, holds: bool) -> str:
    return f"was {_participle(verb)}" if holds else f"was not {_participle(verb)}"


def _pole(row: tuple[tuple[str, ...], tuple[str, ...]], holds: bool, rng: random.Random) -> tuple[str, bool]:
    """A verb of either pole, and whether the sentence then has no "not"."""
    pole = rng.randrange(2)
    return rng.choice(row[pole]), holds == (pole == 0)


def _act(c: Clause, rng: random.Random) -> str:
    verb, holds = (rng.choice(ACTS[c.verb]), c.holds) if c.kind == "act" else _pole(POLARS[c.verb], c.holds, rng)
    who, whom = _person(c.who, rng), _person(c.whom, rng)
    return rng.choice((f"{who} {_did(verb, holds)} {whom}", f"{whom} {_was(verb, holds)} by {who}"))


def _state(c: Clause, rng: random.Random) -> str:
    verb, holds = _pole(STATES[c.verb], c.holds, rng)
    return f"{_person(c.who, rng)} {_did(verb, holds)}"


def _give(c: Clause, rng: random.Random) -> str:
    giver, taker, thing = _person(c.who, rng), _person(c.whom, rng), f"the {rng.choice(THINGS[c.rest[0]])}"
    give, take = (rng.choice(words) for words in GIVES[c.verb])
    return rng.choice(
        (
            f"{giver} {_did(give, c.holds)} {thing} to {taker}",
            f"{thing} {_was(give, c.holds)} to {taker} by {giver}",
            f"{taker} {_did(take, c.holds)} {thing} from {giver}",
            f"{thing} {_was(take, c.holds)} from {giver} by {taker}",
        )
    )


def _move(c: Clause, rng: random.Random) -> str:
    start = f"{_person(c.who, rng)} {_did(rng.choice(MOVES[c.verb]), c.holds)}"
    source, goal = (f"{word} the {rng.choice(PLACES[p])}" for word, p in zip(("from", "to"), c.rest, strict=True))
    return rng.choice(
        (f"{start} {source} {goal}", f"{start} {goal} {source}", f"{source} {start} {goal}", f"{goal} {start} {source}")
    )


def _compare(c: Clause, rng: random.Random) -> str:
    who, whom = _person(c.who, rng), _person(c.whom, rng)
    more, less = (rng.choice(words) for words in COMPARES[c.verb])
    return rng.choice((f"{who} was {more} than {whom}", f"{whom} was {less} than {who}"))


_CORES = {"act": _act, "polar": _act, "state": _state, "give": _give, "move": _move, "compare": _compare}


# ---- the public part -----------------------------------------------------------------------------


def generate(rows: int, seed: int) -> dict[str, list[Any]]:
    """`rows` different pairs, half of them paraphrases (one more when `rows` is odd), in random order."""
    return _columns(_pairs(rows, random.Random(f"paraphrase-{seed}"), set()))


def splits(train_rows: int = 4000, validation_rows: int = 1000, seed: int = 0) -> dict[str, dict[str, list[Any]]]:
    """Training and validation pairs. No pair is in both, not even with its sentences exchanged."""
    taken: set[frozenset[str]] = set()
    train = _pairs(train_rows, random.Random(f"paraphrase-train-{seed}"), taken)
    validation = _pairs(validation_rows, random.Random(f"paraphrase-validation-{seed}"), taken)
    return {"train": _columns(train), "validation": _columns(validation)}


def corpus(stories: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Plain text without labels: short stories of one sentence (a fifth of them) or two.

    Three in four second sentences repeat the first one in other words. The others are about the same people.
    """
    rng = random.Random(f"corpus-{seed}")
    for _ in range(stories):
        cast = draw_cast(rng, trait=0.5)
        meaning = draw(rng, cast, TEXT)
        kind = rng.random()
        if kind < 0.2:
            yield (render(meaning, rng),)
        elif kind < 0.8:
            yield (render(meaning, rng), render(meaning, rng))
        else:
            yield (render(meaning, rng), render(draw(rng, rng.sample(cast, 4), TEXT), rng))


def _pairs(rows: int, rng: random.Random, taken: set[frozenset[str]]) -> list[tuple[str, str, int]]:
    """Pairs that are not in `taken`; they are added to `taken`."""
    pairs: list[tuple[str, str, int]] = []
    while len(pairs) < rows:
        label = 1 - len(pairs) % 2
        meaning = draw(rng)
        others = changes(meaning)
        other = meaning if label else others[rng.choice(list(others))]
        pair = [render(meaning, rng), render(other, rng)]
        key = frozenset(pair)
        if len(key) == 2 and key not in taken:
            taken.add(key)
            rng.shuffle(pair)
            pairs.append((pair[0], pair[1], label))
    rng.shuffle(pairs)
    return pairs


def _columns(pairs: list[tuple[str, str, int]]) -> dict[str, list[Any]]:
    first, second, labels = (list(column) for column in zip(*pairs, strict=True)) if pairs else ([], [], [])
    return {"sentence1": first, "sentence2": second, "label": labels, "idx": list(range(len(pairs)))}


def _vocabulary() -> tuple[str, ...]:
    words = set(FUNCTION_WORDS)
    for row in PEOPLE + TRAITS + THINGS + PLACES:
        words.update(row)
    words.update(word for row in TIMES for phrase in row for word in phrase.split())
    words.update(word for row in COMPARES for pole in row for word in pole)
    verbs = [v for row in ACTS + MOVES for v in row] + [
        v for row in POLARS + STATES + GIVES for pole in row for v in pole
    ]
    for verb in verbs:
        words.update((verb, past(verb), _participle(verb)))
    return tuple(sorted(words))


VOCABULARY = _vocabulary()
"""All words that a sentence can have, sorted. Words are separated by spaces."""
