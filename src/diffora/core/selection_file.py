"""What is wrong with the content of a selection file. It may have been edited, or come from somebody else."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffora.core.dam import RELAXATIONS
from diffora.core.readout import READOUTS

REQUIRED = {"method", "types", "modules", "selected", "rho", "seed"}
TABLES = ("gamma_bar", "scores", "confidence")
"""Keys with one number for each module, or null."""


def selection_problems(content: Mapping[str, Any], known: Sequence[str]) -> list[str]:
    """One message for each mistake of the first kind that there is: wrong keys, types, sizes or values.

    Args:
        content: of the file, without its format.
        known: the keys that a file may have.
    """
    for kind in (_wrong_keys(content, known), _wrong_types(content), _wrong_sizes(content), _wrong_values(content)):
        if problems := list(kind):
            return problems
    return []


def _wrong_keys(content: Mapping[str, Any], known: Sequence[str]) -> Iterator[str]:
    for key in sorted(REQUIRED - content.keys()):
        yield f"key {key!r} is missing"
    for key in sorted(content.keys() - set(known)):
        yield f"unknown key {key!r}"


def _wrong_types(content: Mapping[str, Any]) -> Iterator[str]:
    for key, value in content.items():
        if problem := _misfit(key, value):
            yield problem


def _wrong_sizes(content: Mapping[str, Any]) -> Iterator[str]:
    n_layers, n_types = len(content["modules"]), len(content["types"])
    if len(content["selected"]) != n_layers:
        yield f"'selected' has {len(content['selected'])} layers, not {n_layers}"
    for key in ("modules", *TABLES):
        rows = content.get(key)
        if rows is not None and (len(rows) != n_layers or any(len(row) != n_types for row in rows)):
            yield f"{key!r} must have {n_layers} layers of {n_types}, as 'modules' and 'types' do"


def _wrong_values(content: Mapping[str, Any]) -> Iterator[str]:
    modules, selected, lowest = content["modules"], content["selected"], content.get("lowest_layer", 0)
    for name in _twice(content["types"]):
        yield f"'types' has {name!r} twice"
    for name in _twice([name for row in modules for name in row if name is not None]):
        yield f"'modules' has {name!r} twice"
    for layer, (row, names) in enumerate(zip(selected, modules, strict=True)):
        has = [kind for kind, name in zip(content["types"], names, strict=True) if name is not None]
        for name in row:
            if name not in has:
                yield f"layer {layer} selects {name!r}, which is none of {', '.join(has)}"
        for name in _twice(row):
            yield f"layer {layer} selects {name!r} twice"
    below = [layer for layer, row in enumerate(selected) if row and layer < lowest]
    if below or lowest >= max(len(modules), 1):
        where = f"layer {below[0]} selects modules" if below else f"there are {len(modules)} layers"
        yield f"'lowest_layer' is {lowest}, but {where}"
    for key in TABLES:
        rows = content.get(key)
        if rows is None:
            continue
        pairs = [pair for row, names in zip(rows, modules, strict=True) for pair in zip(row, names, strict=True)]
        if any(value is not None and name is None for value, name in pairs):
            yield f"{key!r} has a number where 'modules' has null"
        elif any(value is None and name is not None for value, name in pairs):
            yield f"{key!r} has null where 'modules' has a name"


def _twice(names: Sequence[str]) -> list[str]:
    """The names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def _misfit(key: str, value: Any) -> str | None:
    """What is wrong with the type of a value in a selection file; None if nothing is."""
    table = "a list of lists, one for each layer"
    wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
        "types": (_is_list_of(_is_text), "a list of module types"),
        "modules": (_is_list_of(_is_list_of(_or_none(_is_text))), f"{table}, of module names"),
        "selected": (_is_list_of(_is_list_of(_is_text)), f"{table}, of module types"),
        "rho": (_is_share, "a number in [0, 1]"),
        "seed": (lambda v: type(v) is int and 0 <= v < 2**63, "a whole number of at least 0"),
        "rank": (lambda v: v is None or (type(v) is int and 1 <= v <= 10**9), "a whole number of at least 1, or null"),
        "k": (lambda v: v is None or (type(v) is int and 0 <= v <= 10**9), "a whole number of at least 0, or null"),
        "lowest_layer": (lambda v: type(v) is int and 0 <= v <= 10**9, "a whole number of at least 0"),
        "gamma_bar": (_or_none(_is_list_of(_is_list_of(_or_none(is_number)))), f"{table}, of finite numbers"),
        "relaxation": (lambda v: v in (None, *RELAXATIONS), f"one of {', '.join(RELAXATIONS)}, or null"),
        "scores": (_or_none(_is_list_of(_is_list_of(_or_none(is_number)))), f"{table}, of finite numbers"),
        "readout": (lambda v: v in (None, *READOUTS), f"one of {', '.join(READOUTS)}, or null"),
        "rounds": (lambda v: v is None or (is_number(v) and v > 0), "a number above 0, or null"),
        "ensemble": (lambda v: type(v) is int and 1 <= v <= 10**9, "a whole number of at least 1"),
        "confidence": (_or_none(_is_list_of(_is_list_of(_or_none(_is_share)))), f"{table}, of numbers in [0, 1]"),
        "longer_names": (_is_list_of(_is_text), "a list of module names"),
        "split_hash": (lambda v: v is None or _is_text(v), "text, or null"),
        "config": (lambda v: isinstance(v, dict), "a group of settings"),
        "facts": (lambda v: isinstance(v, dict) and all(map(is_number, v.values())), "finite numbers by name"),
        "method": (_is_text, "text"),
        "selector": (_is_text, "text"),
    }
    fits, words = wanted[key]
    text = repr(value) if isinstance(value, int | float | str | None) else f"a {type(value).__name__}"
    return None if fits(value) else f"{key}={text[:100]} must be {words}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and not true or false."""
    return type(value) in (int, float) and abs(value) < math.inf


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 1


def _or_none(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or fits(value)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))
