"""Writing files so that a reader finds the old content or the new one, never a half."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A scratch path beside ``path`` that takes its place when the block ends well and vanishes when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield scratch
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically; what UTF-8 does not have (a half of a surrogate pair) is written as its escape."""
    with atomic(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
