"""Checks of single settings, and the words that messages and the configuration reference use for them.

A field of a settings class is ``Annotated[type, check, Help(text, unit)]``. Leave out the check if the type says
everything: ``bool``, ``Literal[...]``, a settings class, or a union of these.
"""

import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

MOST = 10**9
"""The largest number that a setting may be, unless its own check says otherwise. NaN and infinity are refused too."""
LEAST = 1e-12
"""The smallest positive number that a setting may be: in float32, less than this would have no effect."""
LENGTH = 2**20
"""The largest length of an input in tokens; no backbone takes more."""
ROWS = 10**7
"""The largest number of rows of generated data."""


class Help(NamedTuple):
    """What a setting means, for the configuration reference; ``unit`` is what its number counts or measures."""

    text: str
    unit: str = ""


class Check(NamedTuple):
    """A test of a value, and the words that complete the sentence "it must be …"."""

    fits: Callable[[Any], bool]
    words: str


def whole(least: int, most: int = MOST) -> Check:
    """A whole number between two bounds, both included."""
    return Check(lambda v: is_int(v) and least <= v <= most, f"a whole number of at least {least}, at most {most:,}")


def number(test: Callable[[float], bool], words: str) -> Check:
    """A finite number that passes a test."""
    return Check(lambda v: (is_int(v) or isinstance(v, float)) and abs(v) <= MOST and test(v), words)


def is_int(value: Any) -> bool:
    """Whether a value is a whole number; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def one_of(*values: Any) -> Check:
    """One of these values, of the same type."""
    words = ", ".join("null" if v is None else str(v).lower() for v in values)
    return Check(
        lambda v: any(v == value and type(v) is type(value) for value in values),
        words if len(values) == 1 else f"one of {words}",
    )


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip() or len(value) > 4000 or "\0" in value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # UTF-8 cannot encode these


def is_path(value: Any) -> bool:
    """Whether a value can be the name of a file or folder."""
    if not _is_text(value) or any(len(part.encode()) > 255 for part in re.split(r"[/\\]", value)):
        return False
    try:
        Path(value).expanduser()
    except RuntimeError:  # ~name of an unknown user
        return False
    return True


POSITIVE = number(lambda v: v >= LEAST, f"a number above 0, at most {MOST:,}, at least {LEAST:g}")
NOT_NEGATIVE = number(lambda v: v >= 0, f"a number of at least 0, at most {MOST:,}")
NUMBER = number(lambda v: True, f"a number, at most {MOST:,} in size")
FRACTION = number(lambda v: 0 < v < 1, "a number between 0 and 1")
RATE = number(lambda v: 0 <= v < 1, "a number in [0, 1): it is a rate")
SHARE_OF_MODULES = number(
    lambda v: 0 <= v <= 1, "a number in [0, 1]: it is the share of each layer's modules to select"
)
RANK = whole(1)
SEED = whole(0, 2**32 - 1)
FLAG = Check(lambda v: isinstance(v, bool), "true or false")
TEXT = Check(_is_text, "text")
CHARACTERS = Check(lambda v: isinstance(v, str) and bool(v) and _is_text(f"a{v}"), "at least one character")
PATH = Check(is_path, "the name of a file or folder, in UTF-8")
NULL = Check(lambda v: v is None, "null")
NAMED = Check(
    lambda v: _is_text(v) or (isinstance(v, Mapping) and _is_text(v.get("_target_"))),
    "a name, or {_target_: module.Class, <its arguments>}",
)
"""A class or function and its arguments."""
TEXTS = Check(lambda v: isinstance(v, list) and all(map(_is_text, v)), "a list of texts")
GROUP = Check(lambda v: isinstance(v, Mapping), "a group of settings")

PLAIN: dict[Any, Check] = {
    int: whole(-MOST), float: NUMBER, bool: FLAG, str: TEXT, dict: GROUP, list: TEXTS, types.NoneType: NULL,
    Any: Check(lambda v: True, "anything"),
}  # fmt: skip
"""The checks of types that are given without one. A boolean is not a number. A whole number fits a float."""


# --- values of certain settings ---


def distinct(words: str) -> Check:
    """A list of texts that is not empty, each once."""
    return Check(lambda v: TEXTS.fits(v) and bool(v) and len(set(v)) == len(v), words)


COUNT = whole(1)
BACKBONE = Check(is_path, "a hub id or a folder")
CANDIDATES = distinct("a list of the linear modules of a layer, each once")
LAYERS = distinct("a list of names of layers, one for each block")
EVALUATIONS = Check(
    lambda v: COUNT.fits(v) or (isinstance(v, float) and FRACTION.fits(v)),
    "a whole number of steps such as 500, or a fraction of an epoch below 1 such as 0.5",
)
STEPS_OR_SHARE = Check(
    EVALUATIONS.fits, "a whole number of steps such as 500, or a share of all steps below 1 such as 0.1"
)
CLASS_WEIGHTS = Check(
    lambda v: (
        v == "balanced"
        or (isinstance(v, list) and bool(v) and all(map(POSITIVE.fits, v)))
        or (isinstance(v, Mapping) and bool(v) and all(isinstance(n, str) and POSITIVE.fits(w) for n, w in v.items()))
    ),
    "balanced, or numbers above 0: a list in the order of the classes, or {class: number}",
)
CALLBACKS = Check(
    lambda v: isinstance(v, list) and all(isinstance(each, Mapping) and NAMED.fits(each) for each in v),
    "a list of {_target_: module.Class, <its arguments>}",
)


# --- reading a hint ---


def checks_of(hint: Any) -> Iterator[Check]:
    """The checks of a type hint, one for each member of a union; a value must fit one of them."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        own = [item for item in hint.__metadata__ if isinstance(item, Check)]
        yield from own or checks_of(typing.get_args(hint)[0])
    elif origin in (types.UnionType, typing.Union):
        for member in typing.get_args(hint):
            yield from checks_of(member)
    elif origin is Literal:
        yield one_of(*typing.get_args(hint))
    else:
        yield PLAIN[origin or hint]


def words_of(hint: Any) -> str:
    """What a field may be, in words: "a whole number of at least 1, or null"."""
    words = [check.words for check in checks_of(hint)]
    return (", or " if any("," in word for word in words) else " or ").join(words)


def help_of(hint: Any) -> Help:
    """The help text of a field; empty if it has none."""
    given = getattr(hint, "__metadata__", ()) if typing.get_origin(hint) is Annotated else ()
    return next((item for item in given if isinstance(item, Help)), Help(""))


def strange_value(key: str, value: Any) -> str | None:
    """A message if a value without a check contains something impossible, at any depth; otherwise None.

    These are numbers that are not finite or too large, unprintable texts, and names that are not text.
    """
    if isinstance(value, Mapping):
        if strange := [name for name in value if not isinstance(name, str)]:
            return f"{key}: the name of a setting must be text, not the number {strange[0]}"
        return next(filter(None, (strange_value(f"{key}.{name}", item) for name, item in value.items())), None)
    if isinstance(value, list):
        return next(filter(None, (strange_value(f"{key}[{i}]", item) for i, item in enumerate(value))), None)
    if is_int(value) or isinstance(value, float):
        return None if NUMBER.fits(value) else f"{key}={show(value)} must be {NUMBER.words}"
    if isinstance(value, str):
        return None if not value or _is_text(value) or len(value) > 4000 else f"{key}={show(value)} must be text"
    return None if value is None or isinstance(value, bool) else f"{key}={show(value)} must be text or a number"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist, with the nearest one that does."""
    near = get_close_matches(key, {*known} - {key}, n=1, cutoff=0.6)
    return f"unknown key {key}" + (f": did you mean {near[0]}?" if near else "")


def show(value: Any) -> str:
    """A value as a message quotes it: on one line, at most 100 characters."""
    try:
        text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    except ValueError:  # Python refuses to write whole numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:97]}…"
