"""Tags of words: which entities they mean, and how many of these are right.

An entity is a run of words. A tag such as ``B-PER`` has a prefix, which says where in the run the word is, and a type.

- B begins a run, I continues it, E is its last word, S is a run of one word, O is outside of all runs.
- L and U of BILOU mean E and S; M and W of BMEWO mean I and S.
- Tags without any prefix, such as PER, mean runs of equal tags (the scheme IO).

A run also begins at an I or E that continues nothing: after O, after E or S, after another type, or at the start of a
sentence. So every tag sequence has a meaning, as in CoNLL's own script and in seqeval's default mode. ``strict`` counts
well-formed runs only.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OUTSIDE = "O"
MEANING = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S", "M": "I", "W": "S"}
"""Prefixes by what they mean."""
NO_TYPE = "_"
"""The type of entities whose tags are bare prefixes: B, I and O."""
LOWER = re.compile(rf"([{''.join(MEANING).lower()}])-.+")
"""A tag whose prefix is in lower case."""
STRICT = ("IOB2", "IOBES")
"""Schemes that have well-formed runs."""
Score = dict[str, float]


@dataclass(frozen=True)
class Tagging:
    """What each tag of a task means.

    Attributes:
        names: the tags, by their number.
        prefix: [T] one of B, I, E, S, O for each tag.
        kind: [T] the number of its entity type in ``types``; -1 for O.
        types: names of the entity types, sorted.
    """

    names: tuple[str, ...]
    prefix: np.ndarray
    kind: np.ndarray
    types: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "Tagging":
        """Read the tags.

        Raises:
            ValueError: some tags have a prefix and others none, or the prefix is written in another way, as in b-per.
        """
        inside = [name for name in names if name != OUTSIDE]
        parts = {name: match for name in inside if (match := re.fullmatch(rf"([{''.join(MEANING)}])-(.+)", name))}
        if inside and all(name in MEANING for name in inside):
            found = {name: (MEANING[name], NO_TYPE) for name in inside}
        elif not parts:
            if tag := _in_lower_case(inside):
                raise ValueError(f"the tag '{tag}' has its prefix in lower case; write tags as O, B-PER, I-PER")
            strange = next((n for n in inside if re.fullmatch(r"[BIESLU][_:. ].+|.+[-_][BIESLU]", n)), None)
            if strange is not None:
                raise ValueError(f"the tag '{strange}' seems to have a prefix; write it as in B-PER")
            found = {name: ("I", name) for name in inside}
        elif plain := [name for name in inside if name not in parts]:
            raise ValueError(
                f"the tag '{plain[0]}' has no prefix, but '{next(iter(parts))}' has one; "
                "tags are O, and B-PER, I-PER and so on"
            )
        else:
            found = {name: (MEANING[match[1]], match[2]) for name, match in parts.items()}
        types = tuple(sorted({kind for _, kind in found.values()}))
        meaning = [found.get(name, (OUTSIDE, "")) for name in names]
        kinds = [types.index(kind) if prefix != OUTSIDE else -1 for prefix, kind in meaning]
        return cls(tuple(names), np.array([prefix for prefix, _ in meaning]), np.array(kinds, dtype=np.int64), types)

    @property
    def outside(self) -> int:
        """The number of the tag O; 0 if the task has no such tag."""
        return self.names.index(OUTSIDE) if OUTSIDE in self.names else 0

    def entities(self, tags: np.ndarray, first: np.ndarray, strict: str | None = None) -> np.ndarray:
        """The entities of some words in their order.

        Args:
            tags: [n] tag numbers.
            first: [n] whether the word is the first of its sentence.
            strict: a scheme of `STRICT`, to count its well-formed runs only; None counts every run.

        Returns:
            [m, 3] for each entity: its first word, the word after its last one, the number of its type.
        """
        prefix, kind = self.prefix[tags], self.kind[tags]
        inside, goes_on = prefix != OUTSIDE, np.isin(prefix, ("I", "E")) & ~first
        goes_on[1:] &= np.isin(prefix[:-1], ("B", "I")) & (kind[1:] == kind[:-1])
        goes_on[:1] = False
        begin = np.flatnonzero(inside & ~goes_on)
        end = np.flatnonzero(inside & ~np.append(goes_on[1:], False)) if len(tags) else begin
        found = np.stack([begin, end + 1, kind[begin]], axis=1)
        if strict == "IOB2":
            found = found[prefix[begin] == "B"]
        elif strict == "IOBES":
            single = (begin == end) & (prefix[begin] == "S")
            found = found[single | ((prefix[begin] == "B") & (prefix[end] == "E"))]
        return found

    def scheme(self, tags: np.ndarray, first: np.ndarray) -> tuple[str, int]:
        """The scheme that tags follow: IO, IOB1, IOB2 or IOBES, and how many entities do not follow it.

        IOB1 writes B only where a run follows another run of its type. If some runs begin with B and others with I in
        another way, the tags count as IOB2, and the second number is that of the others.
        """
        prefix, kind = self.prefix[tags], self.kind[tags]
        found = self.entities(tags, first)
        if not np.isin(prefix, ("B", "E", "S")).any():
            return "IO", 0
        if np.isin(self.prefix, ("E", "S")).any():
            return "IOBES", len(found) - len(self.entities(tags, first, "IOBES"))
        begin = found[:, 0]
        with_b = prefix[begin] == "B"
        before = np.maximum(begin - 1, 0)
        follows = ~first[begin] & (prefix[before] != OUTSIDE) & (kind[before] == kind[begin])
        if (with_b == follows).all():
            return "IOB1", 0
        return "IOB2", int((~with_b).sum())


def _in_lower_case(names: Sequence[str]) -> str | None:
    """The first tag with a prefix in lower case; None unless all tags but o have one.

    One of them must be b or i: a type alone may look like a tag, as e-mail does.
    """
    tags = [name for name in names if name != OUTSIDE.lower()]
    found = [match[1] for name in tags if (match := LOWER.fullmatch(name))]
    return tags[0] if len(found) == len(tags) and {"b", "i"} & set(found) else None


def counts(gold: np.ndarray, predicted: np.ndarray, n_types: int) -> np.ndarray:
    """[n_types, 3] for each type the numbers of entities that are right, predicted, and in the data.

    Args:
        gold, predicted: what `Tagging.entities` returns for the same words.
    """
    n = 1 + max((int(part.max()) for part in (gold, predicted) if len(part)), default=0)
    keys = [(part[:, 0] * n + part[:, 1]) * n_types + part[:, 2] for part in (gold, predicted)]
    right = predicted[np.isin(keys[1], keys[0]), 2]
    return np.stack([np.bincount(kinds, minlength=n_types) for kinds in (right, predicted[:, 2], gold[:, 2])], axis=1)


def scores(numbers: np.ndarray) -> Score:
    """Precision, recall and F1 of the sums of some `counts`; 0 where nothing is predicted or in the data.

    Args:
        numbers: [3] right, predicted, in the data.
    """
    right, predicted, real = map(int, numbers)
    precision = right / predicted if predicted else 0.0
    recall = right / real if real else 0.0
    f1 = 2 * precision * recall / (precision + recall) if right else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}
