"""Class names: reading them from a file's schema, and matching them with another list of names."""

import difflib
import json
import unicodedata
from collections.abc import Sequence

import pyarrow as pa

from diffora.tasks.messages import some


def class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """The class names that `datasets` stores for a column of numbers (``ClassLabel``), or of lists of numbers.

    Returns:
        None if it stores none.
    """
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)  # of a list
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):  # other programs write anything there
        return None
    return names if names and isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def in_order(
    names: Sequence[str], known: Sequence[str], what: str, others: str, problems: list[str], or_numbers: bool = False
) -> list[int] | None:
    """The position in ``known`` of each class name.

    Names must be equal, except for white space around them.

    Args:
        names: class names, in the order of their numbers.
        known: all valid class names.
        what, others: words that introduce the two lists in messages, e.g. "its classes are" and "the task's are".
        or_numbers: whether the names may also be the positions "0", "1" and so on, as for unnamed classes.

    Returns:
        None, and a message in ``problems``, if a name is not in ``known`` or is there twice.
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
        problems.append(f"{what} {some(names)}: one of these names is there twice.")
    else:
        return [places[name] for name in trimmed]
    return None


def known_classes(name: str, known: Sequence[str]) -> str | None:
    """The class that a wrong spelling may mean, in quotes; None if no name is similar."""

    def plain(text: str) -> str:
        return text.lower().replace("-", "_").replace(" ", "_")

    by_plain = {plain(other): other for other in known}
    near = difflib.get_close_matches(plain(name), by_plain, n=1, cutoff=0.75)
    return f"'{by_plain[near[0]]}'" if near else None


def alike(names: Sequence[str]) -> list[str]:
    """Those names that look like another name: they differ in case, outer white space or invisible characters."""

    def seen(name: str) -> str:
        visible = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")
        return unicodedata.normalize("NFC", visible).strip().casefold()

    plain = [seen(name) for name in names]
    return [name for name, form in zip(names, plain, strict=True) if plain.count(form) > 1]
