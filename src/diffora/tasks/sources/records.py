"""Rows whose columns may hold lists, read one by one from .jsonl, .parquet, .csv and .tsv files or from the hub."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from diffora.tasks.labels import class_names
from diffora.tasks.sources.csv_file import read_csv
from diffora.tasks.sources.lines import BadLine, json_lines, utf8
from diffora.tasks.sources.readers import read_parquet
from diffora.tasks.sources.tables import row_dicts

Row = tuple[int, dict[str, Any]]
ROWS_AT_ONCE = 1000  # bounds memory


@dataclass(frozen=True)
class Records:
    """The rows of one file, or of one split of a hub dataset.

    Attributes:
        where: the file or split, for messages.
        names: its columns; of JSON lines, the keys of the first row. Empty if the file has no rows.
        rows: (number, row) for each row; the number is that of the data row, or of the line.
        unit: what the numbers count: "row" or "line".
        schema: types and features of the columns, if the source has them.
        word_lines: whether each word of a row has its own line; the number is then that of the first one.
    """

    where: str
    names: Sequence[str]
    rows: Iterable[Row]
    unit: str = "row"
    schema: pa.Schema | None = None
    word_lines: bool = False

    def class_names(self, column: str) -> list[str] | None:
        """The class names that the source stores for a column of class numbers; None if it stores none."""
        return None if self.schema is None else class_names(self.schema, column)


def open_records(file: Path, wanted: Sequence[str], notes: list[str]) -> Records:
    """The rows of a file.

    Args:
        wanted: columns that must be there; they reveal a CSV file with another separator.
        notes: grows by remarks about how the file was read.

    Raises:
        ValueError, ArrowException, OSError: it cannot be read. The rows of JSON lines can raise a ValueError too.
    """
    if file.suffix == ".parquet":
        table = read_parquet(file)
        return Records(str(file), table.column_names, _of_table(table), schema=table.schema)
    if file.suffix == ".jsonl":
        lines = _of_lines(file, notes)
        first = next(lines, None)
        if first is None:
            return Records(str(file), (), ())
        return Records(str(file), list(first[1]), _chained(first, lines), unit="line")
    separator = "\t" if file.suffix == ".tsv" else ","
    header, values = read_csv(utf8(file), wanted, lambda row: None, notes, separator)
    rows = ((number, dict(zip(header, fields, strict=True))) for number, fields in enumerate(values, start=1))
    return Records(str(file), header, rows)


def hub_records(where: str, split: datasets.Dataset) -> Records:
    """The rows of a split of a hub dataset."""
    return Records(where, split.column_names, _of_table(split.data.table), schema=split.features.arrow_schema)


def _of_table(table: pa.Table) -> Iterator[Row]:
    before = 0
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from enumerate(row_dicts(batch, before), start=before + 1)
        before += batch.num_rows


def _of_lines(file: Path, notes: list[str]) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, row in json_lines(lines, notes):
            if isinstance(row, BadLine):
                raise ValueError(f"line {number} {row}")
            yield number, row


def _chained(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest
