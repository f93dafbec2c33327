"""What a person sees while waiting: a bar and a few lines in a terminal or notebook, and log messages elsewhere."""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

log = logging.getLogger("diffora")


def is_watched() -> bool:
    """Whether standard error is a terminal, or a notebook shows it."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(
    progress: bool, name: str, unit: str, total: int | None = None, items: Iterable[Any] | None = None
) -> "tqdm[Any]":
    """A progress bar, over ``items`` if they are given; it shows nothing unless somebody is watching."""
    return tqdm(items, total=total, desc=name, unit=unit, disable=not (progress and is_watched()))


def say(progress: bool, lines: Iterable[str]) -> None:
    """Show lines next to a progress bar, or log them where there is none."""
    for line in filter(None, lines):
        if progress and is_watched():
            tqdm.write(line, file=sys.stderr)
        else:
            log.info(line)
