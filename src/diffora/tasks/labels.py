"""Names of classes: where a file keeps them, and the numbers that they have in another list of names."""

import difflib
import json
import unicodedata
from collections.abc import Sequence

import pyarrow as pa


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The names that `datasets` keeps for the numbers of a column (``ClassLabel``); None where there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, RecursionError):  # what others have written there
        return None
    return names if names and isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def in_order(
    names: Sequence[str], known: Sequence[str], what: str, others: str, problems: list[str], or_numbers: bool = False
) -> list[int] | None:
    """The place in ``known`` of each of some classes; None, and a problem, if one of them is not there.

    Names are compared exactly, but for white space around them.

    Args:
        names: of the classes, in the order of their numbers.
        known: the classes that there are.
        what, others: how the two are introduced in the message, e.g. "its classes are" and "the task's are".
        or_numbers: whether the names may also be the places themselves, "0", "1" and so on, as of unnamed classes.
    """
    trimmed = [name.strip() for name in names]
    places = {name: i for i, name in enumerate(known)}
    if or_numbers and not set(trimmed) & set(known):
        places = {str(i): i for i in range(len(known))}
    unknown = [name for name in trimmed if name not in places]
    if unknown:
        near = known_classes(unknown[0], known)
        hint = f"; rename '{unknown[0]}' if {near} is meant" if near else ""
        problems.append(f"{what} {some(names)}; {others} {some(known)}{hint}.")
    elif len(set(trimmed)) < len(trimmed):
        problems.append(f"{what} {some(names)}: one of them stands there twice.")
    else:
        return [places[name] for name in trimmed]
    return None


def known_classes(name: str, known: Sequence[str]) -> str | None:
    """The class that a wrong spelling may stand for, in quotes."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "_").replace(" ", "_")

    by_plain = {plain(other): other for other in known}
    near = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=0.75)
    return f"'{by_plain[near[0]]}'" if near else None


def alike(names: Sequence[str]) -> list[str]:
    """Those of some names that are equal to another one but for case, white space around and Unicode's spellings."""
    plain = [unicodedata.normalize("NFC", name).strip().casefold() for name in names]
    return [name for name, form in zip(names, plain, strict=True) if plain.count(form) > 1]


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
