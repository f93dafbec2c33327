"""Drawing the rows of generated splits: no two of them are alike, and the same seed gives the same rows."""

import random
from collections.abc import Callable, Mapping
from typing import TypeVar

Row = TypeVar("Row")


def distinct(
    sizes: Mapping[str, int], seed_of: Callable[[str], str], draw: Callable[[random.Random], tuple[str, Row]]
) -> dict[str, list[Row]]:
    """Rows for each split, by its name. No two rows of all splits have the same key.

    Args:
        sizes: how many rows each split has.
        seed_of: the seed of a split, from its name.
        draw: draws (key, row).
    """
    taken: set[str] = set()
    found: dict[str, list[Row]] = {}
    for name, rows in sizes.items():
        rng = random.Random(seed_of(name))
        found[name] = []
        while len(found[name]) < rows:
            key, row = draw(rng)
            if key not in taken:
                taken.add(key)
                found[name].append(row)
    return found
