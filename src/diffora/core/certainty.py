"""How sure a selection is: from the confidence of each module to words. No torch: a report starts without it."""

from collections.abc import Iterable, Sequence

DECIDED = 0.95
"""A module is decided if a repeat would do the same with it at least this often: select it, or not select it."""


def is_decided(confidence: float) -> bool:
    """Whether a module is decided (`DECIDED`).

    >>> [is_decided(value) for value in (0.0, 0.05, 0.5, 0.94, 0.95)]
    [True, True, False, False, True]
    """
    return max(confidence, 1 - confidence) >= DECIDED


def certainty(confidence: Iterable[Sequence[float | None]], ensemble: int) -> str:
    """How many modules are decided, in words, for the screen and the report.

    Args:
        confidence: L x N, None where a layer has no such module.
        ensemble: number of members.

    >>> certainty([[0.99, 0.5], [None, 0.01]], 5)
    '2 of 3 modules decided by an ensemble of 5 (a repeat would do the same in at least 95 %), 1 undecided'
    """
    flags = [is_decided(value) for row in confidence for value in row if value is not None]
    sure = f"{sum(flags)} of {len(flags)} modules decided by an ensemble of {ensemble}"
    rest = f"{len(flags) - sum(flags)} undecided"
    return f"{sure} (a repeat would do the same in at least {100 * DECIDED:.0f} %), {rest}"
