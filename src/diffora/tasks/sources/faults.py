"""The faults of rows that are checked one by one."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from diffora.tasks.messages import more

READ_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError)
"""What reading a damaged file may raise; OverflowError for a whole number of more than 64 bits."""


class Faults:
    """The faults of one file: for each kind, the first row that has it and how many rows have it.

    Args:
        file: file or split, for messages.
        unit: what the numbers of rows count: "row" for data rows, "line" for lines of the file.
    """

    def __init__(self, file: str, unit: str = "row") -> None:
        self.file, self.unit = file, unit
        self.found: dict[tuple[str, str], list[Any]] = {}

    def add(self, row: int, column: str, value: Any, kind: str, detail: str = "") -> None:
        """Note a fault.

        Args:
            value: what is wrong; the message shows it.
            kind: what is wrong with it, in words that follow the value. Equal faults have equal words.
            detail: more words, of the first row only.
        """
        entry = self.found.setdefault((column, kind), [0, row, value, detail])
        entry[0] += 1

    def messages(self) -> Iterator[str]:
        """One message for each kind of fault."""
        for (column, kind), (count, row, value, detail) in self.found.items():
            shown = json.dumps(value, ensure_ascii=False, default=str)[:80].encode(errors="backslashreplace").decode()
            where = f"{self.file}, {self.unit} {row}"
            where += " (data rows, counted from 1)" if self.unit == "row" else ""
            yield f"{where}, column '{column}': {shown} {kind}{detail}{more(count)}."


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode without NUL. JSON can spell half of a surrogate pair, which is not."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
