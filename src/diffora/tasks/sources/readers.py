"""Reading the rows of a text task from a .parquet, .jsonl or .csv file, without checking their values."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from diffora.errors import UserError, first_line
from diffora.tasks.sources.csv_file import read_csv
from diffora.tasks.sources.faults import READ_ERRORS
from diffora.tasks.sources.files import check_folder, split_files
from diffora.tasks.sources.lines import BadLine, json_lines, note_blank, utf8
from diffora.tasks.spec import SCORE_RANGE, TaskSpec

NUMBER = r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?"
"""Regular expression for a label that is a number."""


@dataclass(frozen=True)
class Piece:
    """The unchecked table of one file, and notes about how it was read."""

    table: pa.Table
    notes: tuple[str, ...] = ()


Pieces = dict[str, dict[str, Piece]]
"""For each split, its files by the name that messages use for them."""


def local_pieces(spec: TaskSpec, folder: Path, splits: Sequence[str]) -> Pieces:
    """Read splits from the files of a folder.

    Raises:
        UserError: every file that is missing or cannot be read.
    """
    check_folder(folder, f"{', '.join(splits)} as .parquet, .jsonl or .csv")
    problems: list[str] = []
    pieces: Pieces = {}
    for split in splits:
        pieces[split] = {}
        for file in split_files(folder, split, problems):
            try:
                notes: list[str] = []
                table = _READERS[file.suffix](file, spec, notes)
                pieces[split][str(file)] = Piece(table, tuple(notes))
            except READ_ERRORS as error:
                problems.append(f"{file} cannot be read as {file.suffix}: {first_line(error)}")
    if problems:
        raise UserError(problems)
    return pieces


def read_parquet(file: Path) -> pa.Table:
    """All rows of a .parquet file.

    Raises:
        ValueError: the file is damaged; the message names rows and column if it can.
        ArrowException, OSError: it is no parquet file, or cannot be opened.
    """
    with pa.parquet.ParquetFile(file, page_checksum_verification=True) as parquet:
        try:
            return parquet.read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_first_parquet_fault(parquet) or first_line(error)) from error


def _first_parquet_fault(parquet: pa.parquet.ParquetFile) -> str | None:
    """Where a file is damaged: arrow's messages do not say, so read it again column by column up to the first fault."""
    first = 1
    for group in range(parquet.num_row_groups):
        last = first + parquet.metadata.row_group(group).num_rows - 1
        for name in parquet.schema_arrow.names:
            try:
                parquet.read_row_group(group, [name])
            except (pa.ArrowException, OSError) as error:
                where = f"rows {first} to {last} (data rows, counted from 1), column '{name}'"
                return f"{where}: damaged, {first_line(error)}"
        first = last + 1
    return None


def _read_csv(file: Path, spec: TaskSpec, notes: list[str]) -> pa.Table:
    def is_record(row: dict[str, str]) -> bool | None:
        """Whether the label and the number fit; None if the task has neither, so nothing can tell."""
        told = [_is_label(spec, row["label"])] if "label" in row else []
        told += [row["idx"].strip().isdigit()] if "idx" in row else []
        return all(told) if told else None

    # Read every column as text. An empty field is an empty text; labels are parsed later, where messages can name rows.
    header, rows = read_csv(utf8(file), spec.text_columns, is_record, notes)
    columns = zip(*rows, strict=True) if rows else [()] * len(header)
    return pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], names=header)


def _is_label(spec: TaskSpec, value: str) -> bool:
    """Whether a text can be a label of the task, as a number or as a name."""
    value = value.strip()
    if value == "-1":  # GLUE's mark for an unlabelled row of a test set
        return True
    if spec.is_regression:
        return bool(re.fullmatch(NUMBER, value)) and SCORE_RANGE[0] <= float(value) <= SCORE_RANGE[1]
    return value in spec.label_names or value in map(str, range(spec.num_labels))


def _read_jsonl(file: Path, spec: TaskSpec, notes: list[str]) -> pa.Table:
    content = utf8(file).encode()
    lines = content.splitlines()
    full = sum(1 for line in lines if line.strip())
    if full == 0:
        return pa.table({name: pa.array([], pa.string()) for name in (*spec.text_columns, "label")})
    table = _parse_jsonl(content, spec, pa.float64())
    if table is None:
        table = _parse_jsonl(content, spec, pa.string())  # labels that are class names
    if table is None or table.num_rows != full:
        if fault := _first_json_fault(lines, spec):
            raise ValueError(fault)
        table = _slow_jsonl(lines, spec)  # arrow cannot read some other column, which has values of several types
    note_blank(notes, len(lines) - full)
    # Arrow adds the columns of an explicit schema even if no row has them.
    empty = [name for name in (*spec.text_columns, "label") if table.column(name).null_count == table.num_rows]
    if empty:
        keys = {key for _, row in json_lines(lines) if isinstance(row, dict) for key in row}
        table = table.drop_columns([name for name in empty if name not in keys])
    return table


def _parse_jsonl(content: bytes, spec: TaskSpec, label: pa.DataType) -> pa.Table | None:
    """The rows, or None if arrow cannot read them; it does not say which row is at fault."""
    # Without explicit types, arrow would read a text that looks like a date as a date.
    schema = pa.schema([*((name, pa.string()) for name in spec.text_columns), ("label", label)])
    try:
        return pa.json.read_json(
            pa.BufferReader(content),
            read_options=pa.json.ReadOptions(block_size=16 << 20),  # a row must fit into one block
            parse_options=pa.json.ParseOptions(explicit_schema=schema),
        )
    except pa.ArrowInvalid:
        return None


def _slow_jsonl(lines: list[bytes], spec: TaskSpec) -> pa.Table:
    """The rows of lines that have no fault. Columns that the task does not read are left empty."""
    rows = [row for _, row in json_lines(lines)]
    used = (*spec.text_columns, "label", "idx")
    columns = {name: [row.get(name) if name in used else None for row in rows] for row in rows for name in row}
    if "idx" in columns and len({type(value) for value in columns["idx"]}) > 1:
        columns["idx"] = list(map(str, columns["idx"]))
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def _first_json_fault(lines: list[bytes], spec: TaskSpec) -> str | None:
    """Read line by line up to the first fault, and describe it; None if there is none."""
    texts = dict.fromkeys(spec.text_columns, str)
    labels: type | None = None
    for number, row in json_lines(lines):
        where = f"row {number} (counted from 1)"
        if isinstance(row, BadLine):
            return f"{where} {row}"
        for column in texts:
            value = row.get(column)
            if value is not None and not isinstance(value, str):
                return f"{where}, column '{column}': {json.dumps(value)[:60]} is not text"
            try:
                (value or "").encode()
            except UnicodeEncodeError:
                return f"{where}, column '{column}': {ascii(value)[:60]} is not valid Unicode"
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, int | float | str | None):
            return f"{where}, column 'label': {json.dumps(label)[:60]} is not {spec.expected_label}"
        if label is not None:
            kind = str if isinstance(label, str) else float
            if labels not in (None, kind):
                which = "text, but a number in earlier rows" if kind is str else "a number, but text in earlier rows"
                return f"{where}, column 'label': {json.dumps(label)[:60]} is {which}"
            labels = kind
    return None


_READERS: dict[str, Callable[[Path, TaskSpec, list[str]], pa.Table]] = {
    ".parquet": lambda file, spec, notes: read_parquet(file),
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
}
