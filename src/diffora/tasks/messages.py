"""Short forms that many messages about data share."""

from collections.abc import Sequence


def more(count: int) -> str:
    """Text for "and so many more rows have this fault", to append to the message about the first one; "" for 1.

    Args:
        count: rows that have the fault, the first one included.
    """
    return f" (and {count - 1} more such row{'s' if count > 2 else ''})" if count > 1 else ""


def some(names: Sequence[str]) -> str:
    """The names, separated by commas; of more than ten, the first ten and how many there are."""
    return ", ".join(names[:10]) + (f", … ({len(names)} in all)" if len(names) > 10 else "")
