"""Rows of a source and a target text, from .csv, .tsv, .jsonl or .parquet files or from the hub."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from diffora.errors import first_line
from diffora.tasks.account import Account, note_ignored
from diffora.tasks.messages import more
from diffora.tasks.sources.check_values import check_text
from diffora.tasks.sources.csv_file import read_csv
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.lines import BadLine, json_lines, utf8
from diffora.tasks.sources.part import Part
from diffora.tasks.sources.place import Place
from diffora.tasks.sources.readers import read_parquet
from diffora.tasks.sources.tables import check_columns, with_numbers

FORMATS = ("csv", "tsv", "jsonl", "parquet")
ID = "id"
"""A column of this name, if there is one, is kept for the predictions."""
LONGEST = 100_000
"""Longer texts are cut here, in characters. No tokenizer keeps that many, and encoding all of them takes long."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of sources and targets."""

    source: str
    target: str


def read_split(place: Place, split: str, columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
    """The checked rows of a split; None, and messages in ``problems``, if something is wrong.

    The table has ``source``, ``target`` (if the rows have targets), ``number`` (of the row, from 1) and ``id`` (text;
    if the rows have such a column).

    Args:
        split: its name here: "train", "validation", or another name at the source.
        labelled: whether every row must have a target. Otherwise no row needs one.
    """
    if place.is_hub:
        found = place.hub_split(split, problems)
        return _read_hub_split(*found, columns, labelled, problems) if found else None
    files = place.files(split, problems)
    return _read_files(files, columns, labelled, problems) if files else None


def _read_files(files: Sequence[Path], columns: Columns, labelled: bool, problems: list[str]) -> Part | None:
    """Read one split from its file, or from its shards in their order."""
    before, account, tables = len(problems), Account(), []
    for file in files:
        try:
            table = _READERS[file.suffix](file, columns, account.notes)
        except READ_ERRORS as error:
            problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
            continue
        if (checked := _checked(table, str(file), columns, labelled, account, problems)) is not None:
            tables.append(checked)
    where = ", ".join(map(str, files))
    if len({tuple(table.column_names) for table in tables}) > 1:
        problems.append(f"{where}: these files do not have the same columns.")
    return None if len(problems) > before else _part(where, tables, account)


def _read_hub_split(
    where: str, rows: datasets.Dataset, columns: Columns, labelled: bool, problems: list[str]
) -> Part | None:
    before, account = len(problems), Account()
    table = _checked(rows.data.table, where, columns, labelled, account, problems)
    return None if table is None or len(problems) > before else _part(where, [table], account)


def _part(where: str, tables: Sequence[pa.Table], account: Account) -> Part:
    whole = pa.concat_tables(tables)
    account.read = whole.num_rows
    return Part(where, with_numbers(whole), account)


# --- the formats ---


def _read_csv(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    separator = "\t" if file.suffix == ".tsv" else ","
    header, rows = read_csv(utf8(file), (columns.source,), lambda row: None, notes, separator)
    values = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in values], names=header)


def _read_jsonl(file: Path, columns: Columns, notes: list[str]) -> pa.Table:
    """The columns that are read. Other columns are there without their values, for messages."""
    names: dict[str, None] = {}
    found: dict[str, list[str | None]] = {name: [] for name in (columns.source, columns.target, ID)}
    for line, row in json_lines(utf8(file).encode().splitlines(), notes):
        if isinstance(row, BadLine):
            raise ValueError(f"line {line} {row}")
        names |= dict.fromkeys(row)
        for name, values in found.items():
            value = row.get(name)
            if name == ID and name not in (columns.source, columns.target) and value is not None:
                value = value if isinstance(value, str) else json.dumps(value)
            if not isinstance(value, str | None):
                raise ValueError(f"line {line}, column '{name}': {json.dumps(value)[:60]} is not text")
            if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"line {line}, column '{name}': {ascii(value)[:60]} is not valid Unicode")
            values.append(value)
    empty: list[str | None] = [None] * len(found[columns.source])
    return pa.table({name: pa.array(found.get(name, empty), pa.string()) for name in names})


_READERS = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": lambda file, columns, notes: read_parquet(file),
}


# --- checks ---


def _checked(
    table: pa.Table, where: str, columns: Columns, labelled: bool, account: Account, problems: list[str]
) -> pa.Table | None:
    """``source``, ``target`` and ``id`` of a table, as far as they are there; None if ``problems`` grew."""
    before = len(problems)
    if table.num_rows == 0:
        problems.append(f"{where}: no rows.")
        return None
    names = table.column_names
    has_targets = columns.target in names
    keys = {columns.source: "task.source_column"}
    keys |= {columns.target: "task.target_column"} if labelled or has_targets else {}
    check_columns(names, keys, where, problems, keys)
    if len(problems) > before:
        return None
    note_ignored(account, [name for name in names if name not in (columns.source, columns.target, ID)])
    found = {"source": check_text(table.column(columns.source), where, columns.source, problems)}
    targets = table.column(columns.target) if has_targets else None
    if targets is not None and (labelled or not _all_missing(targets)):
        found["target"] = check_text(targets, where, columns.target, problems)
    if len(problems) > before:
        return None
    for name, column in (("source", columns.source), ("target", columns.target)):
        if name in found:
            _refuse_empty(found[name], where, column, name, problems)
    if len(problems) > before:
        return None
    for name in tuple(found):
        too_long = pc.sum(pc.greater(pc.utf8_length(found[name]), LONGEST)).as_py() or 0
        account.change(f"{name} longer than {LONGEST:,} characters, cut there", too_long)
        found[name] = pc.utf8_slice_codeunits(found[name], 0, LONGEST)
    if names.count(ID) == 1 and ID not in (columns.source, columns.target):
        found[ID] = pa.chunked_array([pa.array([_as_text(value) for value in table.column(ID).to_pylist()])])
    return pa.table(found)


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


def _all_missing(column: pa.ChunkedArray) -> bool:
    """Whether no row has a target: nulls or empty texts throughout, as in a file to predict."""
    return all(value is None or value == "" for value in column.to_pylist())


def _refuse_empty(column: pa.ChunkedArray, where: str, name: str, what: str, problems: list[str]) -> None:
    empty = pc.equal(pc.utf8_trim_whitespace(column), "")
    if count := pc.sum(empty).as_py():
        row = pc.index(empty, True).as_py() + 1
        place = f"{where}, row {row} (data rows, counted from 1), column '{name}'"
        problems.append(f"{place}: the {what} is empty; remove the row, or fill it{more(count)}.")
