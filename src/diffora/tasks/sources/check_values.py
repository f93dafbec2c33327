"""Checks of whole columns. Messages name the file, the row (the first data row is 1), the column and the value."""

import json

import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import first_line
from diffora.tasks.messages import more

TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
"""Tests for the arrow types of text."""
_WHY_IDX = "which a submission quotes; without this column rows are numbered from 0"


def report(problems: list[str], file: str, name: str, values: pa.ChunkedArray, bad: pa.ChunkedArray, what: str) -> bool:
    """Append one problem for the first row where ``bad`` is true or null.

    Args:
        file, name: file and column, for the message.
        values: the column, whose value the message shows.
        what: what is wrong, in words that follow the value.

    Returns:
        Whether there is such a row.
    """
    bad = pc.fill_null(bad, True)
    count = pc.sum(bad).as_py()
    if count:
        row = pc.index(bad, True).as_py()
        value = json.dumps(values[row].as_py(), ensure_ascii=False)[:80]
        where = f"{file}, row {row + 1} (data rows, counted from 1), column '{name}'"
        problems.append(f"{where}: {value} {what}{more(count)}.")
    return bool(count)


def check_text(column: pa.ChunkedArray, file: str, name: str, problems: list[str]) -> pa.ChunkedArray:
    """The column as arrow strings. A null, another type or a text that is not UTF-8 is a problem."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not any(test(kind) for test in (*TEXT_TYPES, pa.types.is_null)):
        problems.append(f"{file}: column '{name}' holds {column.type}, expected text (string).")
        return column
    report(
        problems,
        file,
        name,
        column,
        pc.is_null(column),
        "in place of a text; an empty text is written as an empty string",
    )
    return check_utf8(column, file, name, problems)


def check_utf8(column: pa.ChunkedArray, file: str, name: str, problems: list[str]) -> pa.ChunkedArray:
    """A column of texts and nulls as arrow strings. A text that is not UTF-8 is a problem."""
    try:
        text = column.cast(pa.string())
        text.validate(full=True)  # tokenizers need valid UTF-8, and parquet readers do not check it
    except pa.ArrowInvalid as error:
        rows = enumerate(column.cast(pa.binary()), start=1)
        row = next((row for row, value in rows if not _is_utf8(value.as_py())), None)
        problems.append(
            f"{file}, column '{name}': {first_line(error)}."
            if row is None
            else f"{file}, row {row} (data rows, counted from 1), column '{name}' is not valid UTF-8."
        )
        return column
    return text


def _is_utf8(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True


def check_index(column: pa.ChunkedArray, file: str, problems: list[str]) -> pa.ChunkedArray:
    """The column ``idx`` as int64: the row numbers of the source, which a submission quotes."""
    try:
        number = column.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        problems.append(f"{file}: column 'idx' holds {column.type}, not the whole number of each row, {_WHY_IDX}.")
        return column
    wrong = pc.less(number, 0)
    what = f"is not the number of a row, {_WHY_IDX}"
    return column if report(problems, file, "idx", number, wrong, what) else number


def check_unique(numbers: pa.ChunkedArray, files: str, problems: list[str]) -> None:
    """Append a problem if the column ``idx`` has the same number twice."""
    counts = pc.value_counts(numbers)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        number, count = twice[0]["values"], twice[0]["counts"]
        problems.append(f"{files}: column 'idx': {number} is the number of {count} rows, {_WHY_IDX}.")
